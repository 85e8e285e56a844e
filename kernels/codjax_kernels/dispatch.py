"""Which implementation runs: one table, looked up once per call, never swapped silently."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from codjax_kernels import xla
from codjax_kernels.records import LogprobPasses

Interpret = Any  # False, True, or parameters of a Pallas interpreter


class Implementation(NamedTuple):
    """Both operations of one implementation."""

    logprob_passes: Callable[[int, Interpret], LogprobPasses]  # (chunk_size, interpret)
    attention: Callable[[Interpret], Callable[..., jax.Array]]


def _xla_passes(chunk_size: int, interpret: Interpret) -> LogprobPasses:
    return xla.logprobs.passes(chunk_size)


def _xla_attention(interpret: Interpret) -> Callable[..., jax.Array]:
    return xla.attention.forest_attention


def _tpu_passes(chunk_size: int, interpret: Interpret) -> LogprobPasses:
    from codjax_kernels.tpu import logprobs

    return logprobs.passes(interpret)


def _tpu_attention(interpret: Interpret) -> Callable[..., jax.Array]:
    from codjax_kernels.tpu import attention

    return functools.partial(attention.forest_attention, interpret=interpret)


def _gpu_passes(chunk_size: int, interpret: Interpret) -> LogprobPasses:
    from codjax_kernels.gpu import logprobs

    return logprobs.passes(interpret)


def _gpu_attention(interpret: Interpret) -> Callable[..., jax.Array]:
    from codjax_kernels.gpu import attention

    return functools.partial(attention.forest_attention, interpret=interpret)


IMPLEMENTATIONS = {
    "xla": Implementation(_xla_passes, _xla_attention),
    "pallas_tpu": Implementation(_tpu_passes, _tpu_attention),
    "pallas_gpu": Implementation(_gpu_passes, _gpu_attention),
}

# What None stands for. XLA is the choice on GPUs until the Mosaic GPU kernels have been measured
# on one (docs/kernels.md).
BY_PLATFORM = {"cpu": "xla", "gpu": "xla", "tpu": "pallas_tpu"}


def implementation_of(platform: str) -> str:
    """Name of the implementation that None stands for on a platform."""
    return BY_PLATFORM.get(platform, "xla")


def why_not(name: str, *, head_dim: int, width: int, dtype: str) -> str | None:
    """Why an implementation cannot run a model, or None if it can.

    Args:
        name: of the implementation.
        head_dim: H.
        width: D.
        dtype: of the model's matrix products.
    """
    if name == "pallas_tpu":
        from codjax_kernels.tpu import attention

        least, most = attention.MIN_HEAD_DIM, attention.MAX_HEAD_DIM
        if not least <= head_dim <= most or head_dim % attention.HEAD_DIM_MULTIPLE:
            return (
                f"its attention takes heads of {least} to {most} in steps of "
                f"{attention.HEAD_DIM_MULTIPLE}, and the model's have {head_dim}"
            )
    if name == "pallas_gpu":
        from codjax_kernels.gpu import target

        try:
            target.require_jax()
        except ValueError as error:
            return str(error)
        from codjax_kernels.gpu.attention import HEAD_SIZES

        if head_dim not in HEAD_SIZES or width % 64 or dtype != "bfloat16":
            return (
                f"it takes bfloat16, heads of {' or '.join(map(str, HEAD_SIZES))} and widths in "
                f"steps of 64, and the model has {dtype}, heads of {head_dim} and width {width}"
            )
    return None


def has_gradient_in_forward(implementation: str | None) -> bool:
    """Whether `scored_loss` and `token_loss` can be had of an implementation."""
    return choose(implementation).logprob_passes(1, False).stored_statistics is not None


def choose(implementation: str | None, *, interpret: Interpret = False) -> Implementation:
    """The implementation of that name, or that of the default platform.

    Raises:
        ValueError: there is none of that name, or it cannot be interpreted.
    """
    name = implementation or implementation_of(jax.default_backend())
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be None or one of {', '.join(map(repr, IMPLEMENTATIONS))}; "
            f"got {name!r}."
        )
    if interpret and name == "xla":
        raise ValueError(
            "interpret applies to Pallas kernels only; leave it out for implementation 'xla'."
        )
    return IMPLEMENTATIONS[name]
