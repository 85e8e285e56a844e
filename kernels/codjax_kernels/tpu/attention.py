"""Flash attention over forests on TPUs: the Pallas kernels behind `forest_attention`.

A row's tokens stand in depth-first order and query `i` sees key `j` iff ``j <= i < end_j``. With
scaled scores ``s = q . k / sqrt(H)``, weights ``p = exp(s - l)`` and the log-normaliser
``l = log sum_j exp(s_j)``, the output is ``sum_j p_j v_j``.

* forward (`attention_forward.py`): l and the mean by the online softmax; 2 matrix products.
* backward (`attention_backward.py`): scores are computed again; 3 products for the gradient of
  queries and 4 for those of keys and values. What is kept is q, k, v, the output and l.

Every kernel walks a scalar-prefetched list of the pairs of blocks that the mask leaves
(`codjax_kernels.pairs`), on a grid as long as the list. Query heads of a key-value head are rows
of the same tile, so that its keys and values are read once for all of them.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from codjax_kernels.tpu import attention_backward as backward
from codjax_kernels.tpu import attention_blocks
from codjax_kernels.tpu import attention_tiles as tiles
from codjax_kernels.tpu import blocks as tuned
from codjax_kernels.tpu.attention_blocks import AttentionBlocks
from codjax_kernels.tpu.attention_forward import forward

MIN_HEAD_DIM, MAX_HEAD_DIM, HEAD_DIM_MULTIPLE = 64, 256, 8


class _Plan(NamedTuple):
    """What is fixed when the program is traced."""

    blocks: AttentionBlocks
    vmem_bytes: int
    interpret: Any


def forest_attention(
    q: Float[Array, "B Q N H"],
    k: Float[Array, "B T M H"],
    v: Float[Array, "B T M H"],
    subtree_end: Int[Array | np.ndarray, "B T"],
    *,
    query_start: int | Int[Array, ""] = 0,
    interpret: Any = False,
    block_sizes: AttentionBlocks | None = None,
) -> Float[Array, "B Q N H"]:
    """See `codjax_kernels.forest_attention`; here with any slice of a row's queries.

    Args:
        q: queries of the tokens ``query_start … query_start + Q - 1`` of every row.
        k: keys of all tokens.
        v: values of all tokens.
        subtree_end: index one past the last descendant. A query that sees nothing, as only
            padding does, gives finite nonsense and moves no gradient.
        query_start: the same for all rows; with a device's index on the context axis times Q,
            queries are sharded over context and keys and values gathered.
        interpret: True or `pltpu.InterpretParams()`: run in the interpreter.
        block_sizes: None for those of the chip at hand.

    Returns:
        One weighted mean of values per query.

    Raises:
        ValueError: a head size that the kernels do not take, or rows with too many blocks.
    """
    head_dim = q.shape[-1]
    if not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM or head_dim % HEAD_DIM_MULTIPLE:
        raise ValueError(
            f"the TPU kernel of forest_attention takes head sizes from {MIN_HEAD_DIM} to "
            f"{MAX_HEAD_DIM} in steps of {HEAD_DIM_MULTIPLE}; got {head_dim}. Implementation "
            "'xla' takes any."
        )
    chip = tuned.chip(is_interpreted=bool(interpret))
    plan = _Plan(
        attention_blocks.of_chip(chip) if block_sizes is None else block_sizes,
        chip.vmem_bytes,
        interpret,
    )
    end, start = (jnp.asarray(x, jnp.int32) for x in (subtree_end, query_start))
    return _attend(q, k, v, end, start, plan)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(  # noqa: PLR0917 - a custom VJP takes no keywords
    q: Array, k: Array, v: Array, end: Array, start: Array, plan: _Plan
) -> Array:
    return _attend_forward(q, k, v, end, start, plan)[0]


def _attend_forward(  # noqa: PLR0917
    q: Array, k: Array, v: Array, end: Array, start: Array, plan: _Plan
) -> tuple[Array, tuple[Array, ...]]:
    num_kv_heads = k.shape[2]
    queries, keys, values = (_by_kv_head(x, num_kv_heads) for x in (q, k, v))
    layout = _layout(plan.blocks.forward, queries, end, start)
    out, log_normaliser = forward(
        tiles.join_rows(queries, layout.block_q),
        tiles.join_rows(keys, layout.block_k),
        tiles.join_rows(values, layout.block_k),
        layout,
        vmem_bytes=plan.vmem_bytes,
        interpret=plan.interpret,
    )
    out, log_normaliser = (
        tiles.split_rows(
            tiles.zero_unless_visited(array, layout.pairs.visited),
            rows=q.shape[0],
            num_tokens=q.shape[1],
            group=layout.group,
        )
        for array in (out, log_normaliser[:, 0])
    )
    out = _by_token(out)
    return out, (queries, keys, values, out, log_normaliser, end, start)


def _attend_backward(
    plan: _Plan, residuals: tuple[Array, ...], out_bar: Array
) -> tuple[Array | None, ...]:
    queries, keys, values, out, log_normaliser, end, start = residuals
    delta = jnp.sum(out.astype(jnp.float32) * out_bar.astype(jnp.float32), axis=-1, keepdims=True)
    out_bar, delta = (_by_kv_head(x, keys.shape[0]) for x in (out_bar, delta))

    def operands(layout: tiles.Layout) -> backward.Operands:
        numbers = log_normaliser, delta[..., 0]
        log, of_out = (tiles.join_rows(x, layout.block_q)[:, None] for x in numbers)
        q, bar = (tiles.join_rows(x, layout.block_q) for x in (queries, out_bar))
        k, v = (tiles.join_rows(x, layout.block_k) for x in (keys, values))
        return backward.Operands(q, k, v, bar, log, of_out)

    def finish(gradient: Array, layout: tiles.Layout, like: Array) -> Array:
        gradient = tiles.zero_unless_visited(gradient, layout.pairs.visited)
        _, rows, num_tokens, group, _ = like.shape
        return _by_token(tiles.split_rows(gradient, rows=rows, num_tokens=num_tokens, group=group))

    options: dict[str, Any] = {
        "vmem_bytes": plan.vmem_bytes,
        "interpret": plan.interpret,
    }
    layout = _layout(plan.blocks.query_gradient, queries, end, start)
    q_bar = finish(backward.query_gradient(operands(layout), layout, **options), layout, queries)
    layout = _layout(plan.blocks.key_value_gradient, queries, end, start, key_major=True)
    k_bar, v_bar = (
        finish(bar, layout, keys)
        for bar in backward.key_value_gradient(operands(layout), layout, **options)
    )
    return q_bar, k_bar, v_bar, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _layout(
    blocks: attention_blocks.Blocks,
    queries: Array,
    end: Array,
    start: Array,
    *,
    key_major: bool = False,
) -> tiles.Layout:
    return tiles.layout(
        end,
        start,
        num_queries=queries.shape[2],
        group=queries.shape[3],
        blocks=blocks,
        key_major=key_major,
    )


def _by_kv_head(array: Array, num_kv_heads: int) -> Array:
    """[B T N H] → [M B T g H]: g query heads, or one key-value head, of each of M."""
    rows, num_tokens, num_heads, head_dim = array.shape
    array = array.reshape(rows, num_tokens, num_kv_heads, num_heads // num_kv_heads, head_dim)
    return array.transpose(2, 0, 1, 3, 4)


def _by_token(array: Array) -> Array:
    """[M B T g H] → [B T N H]."""
    array = array.transpose(1, 2, 0, 3, 4)
    return array.reshape(*array.shape[:2], -1, array.shape[4])
