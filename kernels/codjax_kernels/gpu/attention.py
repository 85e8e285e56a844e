"""Attention over prefix forests on Hopper GPUs, forward and backward.

A token sees itself and its ancestors: query `i` sees key `j` iff ``j <= i < subtree_end[j]``. Only
pairs of blocks with a visible pair of tokens are visited (`block_lists.py`). The forward pass
(`attention_forward.py`) keeps, beside the output, the log-normaliser of every query, from which the
backward pass (`attention_backward.py`) makes the probabilities again: once by blocks of queries for
the gradient of `q`, once by blocks of keys for those of `k` and `v`. No two thread blocks add to
the same number, so results are the same in every run.

This file does the rest: checks, padding to whole blocks, the custom derivative.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from codjax_kernels.gpu import target

# Of 256, the float32 gradients of 64 keys and their values alone would be 256 registers a thread.
HEAD_SIZES = (64, 128)
DTYPES = (jnp.bfloat16, jnp.float16)
# What lengths are padded to; the block sizes of the three kernels divide it.
TOKEN_MULTIPLE = 128

_Saved = tuple[Array, ...]


def forest_attention(
    q: Float[Array, "B Q N H"],
    k: Float[Array, "B T M H"],
    v: Float[Array, "B T M H"],
    subtree_end: Int[Array | np.ndarray, "B T"],
    *,
    query_start: int | Int[Array, ""] = 0,
    interpret: Any = False,
) -> Float[Array, "B Q N H"]:
    """See `codjax_kernels.forest_attention`; here the queries may be a slice of the row.

    Products are of bfloat16 (float16) numbers with float32 sums; probabilities and, backward,
    their derivatives are rounded to bfloat16 (float16) before they enter a product.

    Args:
        q: queries, bfloat16 or float16; M divides N.
        k: keys of the whole row, of the same dtype.
        v: values, of the same dtype.
        subtree_end: index one past the last descendant of every token, above its own index.
        query_start: index in its row of the first query; ``query_start + Q <= T``.
        interpret: True or `plgpu.InterpretGPUParams()`: run the kernels in the interpreter.

    Returns:
        One weighted mean of values per query; 0 for a query that sees nothing, through which
        no gradient flows.

    Raises:
        ValueError: jax is too old, or a head size or dtype that the kernels do not take.
    """
    target.require_jax()
    if q.shape[-1] not in HEAD_SIZES:
        raise ValueError(
            f"forest_attention on GPUs takes heads of {' or '.join(map(str, HEAD_SIZES))} numbers; "
            f"got {q.shape[-1]}: use implementation 'xla'."
        )
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            "forest_attention on GPUs takes q, k and v of one dtype, bfloat16 or float16; got "
            f"{q.dtype}, {k.dtype} and {v.dtype}: use implementation 'xla'."
        )
    start = jnp.asarray(query_start, jnp.int32)
    return _attention(q, k, v, jnp.asarray(subtree_end, jnp.int32), start, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(  # noqa: PLR0917 - custom_vjp takes arguments by position
    q: Float[Array, "B Q N H"],
    k: Float[Array, "B T M H"],
    v: Float[Array, "B T M H"],
    subtree_end: Int[Array, "B T"],
    query_start: Int[Array, ""],
    interpret: Any,
) -> Float[Array, "B Q N H"]:
    return _attention_forward(q, k, v, subtree_end, query_start, interpret)[0]


def _attention_forward(  # noqa: PLR0917 - as `_attention`
    q: Array, k: Array, v: Array, subtree_end: Array, query_start: Array, interpret: Any
) -> tuple[Array, _Saved]:
    from codjax_kernels.gpu import attention_forward  # needs jax >= 0.12

    out, log_normaliser = attention_forward.forward(
        *(_padded(tokens) for tokens in (q, k, v)),
        subtree_end=_padded(subtree_end),
        query_start=query_start,
        num_queries=q.shape[1],
        interpret=interpret,
    )
    out = out[:, : q.shape[1]]
    return out, (q, k, v, subtree_end, query_start, out, log_normaliser)


def _attention_backward(
    interpret: Any, saved: _Saved, out_bar: Float[Array, "B Q N H"]
) -> tuple[Array, Array, Array, None, None]:
    from codjax_kernels.gpu import attention_backward  # needs jax >= 0.12

    q, k, v, subtree_end, query_start, out, log_normaliser = saved
    # The derivative of a score is p (dp - sum of p dp over keys), and that sum is out . out_bar.
    mean_bar = jnp.einsum("bqnh,bqnh->bnq", out, out_bar, preferred_element_type=jnp.float32)
    problem = attention_backward.Problem(
        q=_padded(q),
        k=_padded(k),
        v=_padded(v),
        out_bar=_padded(out_bar.astype(q.dtype)),
        log_normaliser=log_normaliser,
        mean_bar=_padded(mean_bar, axis=2),
        subtree_end=_padded(subtree_end),
        query_start=query_start,
    )
    options = {"num_queries": q.shape[1], "interpret": interpret}
    q_bar = attention_backward.query_gradient(problem, **options)
    k_bar, v_bar = attention_backward.key_value_gradients(problem, **options)
    num_tokens = k.shape[1]
    return q_bar[:, : q.shape[1]], k_bar[:, :num_tokens], v_bar[:, :num_tokens], None, None


_attention.defvjp(_attention_forward, _attention_backward)


def _padded(tokens: Array, axis: int = 1) -> Array:
    """Zeros after the last token, up to a whole block: a key that ends at 0 is seen by nobody."""
    missing = -tokens.shape[axis] % TOKEN_MULTIPLE
    widths = [(0, missing if dim == axis else 0) for dim in range(tokens.ndim)]
    return jnp.pad(tokens, widths) if missing else tokens
