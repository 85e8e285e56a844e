"""A sharded train step with the Pallas kernels, compiled for a TPU topology that is not there.

    row = compile_step("v5e:4x4", axes={"data": 1, "fsdp": 4, "context": 2, "tensor": 2}, …)

What is compiled is the learner's own program of a micro-batch: forward, gradients made on the way,
accumulation. Shapes alone go in.
"""

from __future__ import annotations

import functools
import math
import re
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from codjax_kernels import topologies
from flax import nnx

from codjax import learner, losses, models, sharding, types
from codjax.bench.material import Row

_WHOLE_ROW_FIELDS = {"tokens", "token_positions", "subtree_end"}
_NUMBERS = {"normaliser", "num_scored"}
_FLOATS = {"sampler_logprobs", "ref_logprobs", "advantages", "weights", "normaliser"}
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_GIB = 2**30

QWEN3_8B: Mapping[str, Any] = {
    "vocab_size": 151936,
    "num_layers": 36,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_heads": 32,
    "num_kv_heads": 8,
    "head_dim": 128,
    "rope_theta": 1e6,
    "norm_eps": 1e-6,
    "tie_embeddings": False,
}


def compile_step(
    topology: str,
    *,
    axes: Mapping[str, int],
    sizes: Mapping[str, Any],
    row_length: int,
    scored_per_row: int,
    implementation: str = "pallas_tpu",
) -> Row:
    """Seconds, memory per device and kernels of a compiled micro-batch step.

    Args:
        topology: as for `topologies.devices`.
        axes: devices along `sharding.MESH_AXES`; one along those that are not there.
        sizes: of the model, as `DecoderConfig` takes them.
        row_length: T; a micro-batch has a row for every device that rows are cut over.
        scored_per_row: K.
        implementation: of the kernels.

    Raises:
        ModuleNotFoundError: libtpu is not installed.
        jax.errors.JaxRuntimeError: the step does not fit, or a kernel does not compile.
    """
    mesh = topologies.mesh(topology, {axis: axes.get(axis, 1) for axis in sharding.MESH_AXES})
    made = _learner(
        mesh,
        sizes,
        rows=math.prod(mesh.shape[axis] for axis in sharding.RULES["batch"]),
        implementation=implementation,
    )
    state = made.abstract_state()
    grads, sums = jax.eval_shape(made._zeros_fn, state.params)
    grads = jax.tree.map(
        lambda x, p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=p.sharding),
        grads,
        state.params,
    )
    batch = _batch(mesh, made, row_length=row_length, scored_per_row=scored_per_row)
    begin = time.perf_counter()
    compiled = topologies.compile(
        made._accumulate_fn,
        state.params,
        grads,
        sums,
        batch,
        topology=mesh,
        donate_argnums=(1,),
    )
    seconds = time.perf_counter() - begin
    memory, program = topologies.memory(compiled), compiled.as_text() or ""
    kinds = Counter(re.findall(rf" ({'|'.join(_COLLECTIVES)})(?:-start)?\(", program))
    return {
        "step": f"{topology}, " + ", ".join(f"{axis} {axes[axis]}" for axis in axes),
        "row_length": row_length,
        "compile_s": seconds,
        "kernels": program.count('custom_call_target="tpu_custom_call"'),
        "arguments_gib": memory.arguments / _GIB,
        "temporaries_gib": memory.temporaries / _GIB,
        "peak_gib": memory.peak / _GIB,
        **{kind: kinds[kind] for kind in _COLLECTIVES},
    }


def _learner(
    mesh: jax.sharding.Mesh, sizes: Mapping[str, Any], *, rows: int, implementation: str
) -> learner.Learner:
    config = models.DecoderConfig(
        **sizes,
        dtype="bfloat16",
        param_dtype="float32",
        remat="full",
        init_std=0.02,
        embedding_std=0.02,
    )
    policy_loss = functools.partial(losses.rec_loss, clip_mode="one_side", weight_mode="none")
    return learner.Learner(
        nnx.eval_shape(lambda: models.init(config, seed=0)),
        optimizer=optax.adamw(1e-6),
        schedule=optax.constant_schedule(1e-6),
        objective=learner.Objective(policy_loss=policy_loss, is_per_token=True, temperature=1.0),
        mesh=mesh,
        rows_per_microbatch=rows,
        implementation=implementation,
    )


def _batch(
    mesh: jax.sharding.Mesh, made: learner.Learner, *, row_length: int, scored_per_row: int
) -> types.TokenBatch:
    """Shapes of a micro-batch, laid out on the mesh."""

    def field(name: str, placed: jax.sharding.NamedSharding) -> jax.ShapeDtypeStruct:
        shape: tuple[int, ...] = (made._rows, scored_per_row)
        if name in _WHOLE_ROW_FIELDS:
            shape = (made._rows, row_length)
        elif name in _NUMBERS:
            shape = ()
        dtype = jnp.float32 if name in _FLOATS else jnp.int32
        return jax.ShapeDtypeStruct(shape, dtype, sharding=placed)

    placed = sharding.batch_shardings(mesh)._asdict()
    return types.TokenBatch(**{name: field(name, place) for name, place in placed.items()})
