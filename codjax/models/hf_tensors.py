"""The parameters on the devices as named host tensors of a Hugging Face checkpoint, one at a time.

    layouts(config, "bfloat16")                    # name → dtype and shape, in the order of:
    for name, array in tensors(config, params, "bfloat16"):
        …                                          # NumPy; the next one is read when asked for

This is what the learner hands to a server of another process (`codjax.rollout.sglang.weights`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from codjax.models import hf_names, hf_shards
from codjax.models.config import DecoderConfig


def layouts(config: DecoderConfig, dtype: str) -> dict[str, hf_shards.Layout]:
    """Dtype and shape of every tensor of the model, by name, in the order of `tensors`.

    Args:
        config: of the model; with tied embeddings there is no `lm_head.weight`.
        dtype: "float32" | "bfloat16", that all tensors are to have.
    """
    return {
        name: hf_shards.Layout(np.dtype(dtype), counterpart.tensor_shape)
        for counterpart in hf_names.counterparts(config).values()
        for name, _ in counterpart.tensors()
    }


def tensors(
    config: DecoderConfig, params: Mapping[str, Any], dtype: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Name and values of every tensor; on the host there is one of them at a time.

    Of what is sharded, one tensor is gathered on every device. With several hosts, all of them must
    take all tensors, since they gather together.

    Args:
        config: of the model.
        params: its parameters, as `TrainState.params` or by dotted name.
        dtype: to cast to, on the device.
    """
    flat = traverse_util.flatten_dict(params, sep=".")
    for param, counterpart in hf_names.counterparts(config).items():
        for name, index in counterpart.tensors():
            part = _part(flat[param], np.asarray(index, np.int32), dtype=dtype)
            yield name, counterpart.to_tensor(np.asarray(part))


def _part(param: jax.Array, index: np.ndarray, *, dtype: str) -> jax.Array:
    """The values at an index of the axes that a parameter begins with, where the host can read."""
    if isinstance(param.sharding, jax.sharding.NamedSharding):
        everywhere = jax.sharding.NamedSharding(param.sharding.mesh, jax.sharding.PartitionSpec())
        return _taking(everywhere)(param, index, dtype=dtype)
    return _taking(None)(param, index, dtype=dtype)


@functools.cache
def _taking(out_shardings: jax.sharding.Sharding | None) -> Any:
    """The program; one per shape of a parameter, since the index is an argument."""
    return jax.jit(_take, static_argnames="dtype", out_shardings=out_shardings)


def _take(param: jax.Array, index: jax.Array, *, dtype: str) -> jax.Array:
    for number in index:
        param = jax.lax.dynamic_index_in_dim(param, number, axis=0, keepdims=False)
    return param.astype(jnp.dtype(dtype))
