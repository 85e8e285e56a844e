"""The backward kernels: one for queries, one for keys and values.

With weights p, ``d score = p (d p - delta)``, where ``d p = out_bar . v`` and ``delta`` is
``sum(out * out_bar)`` of the query. Both kernels compute p again from the saved log-normaliser.
Tiles of the second stand on their side, a row for each key: so what belongs to the streaming
block, of queries, is a row of numbers that needs no turning, and both its sums are plain products.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from codjax_kernels import pairs
from codjax_kernels.tpu import attention_tiles as tiles
from codjax_kernels.tpu.attention_blocks import LANES


class Operands(NamedTuple):
    """What both kernels read, padded to the blocks of one of them."""

    q: Float[Array, "M queries H"]
    k: Float[Array, "M keys H"]
    v: Float[Array, "M keys H"]
    out_bar: Float[Array, "M queries H"]
    log_normaliser: Float[Array, "M 1 queries"]
    delta: Float[Array, "M 1 queries"]


def query_gradient(
    operands: Operands, layout: tiles.Layout, *, vmem_bytes: int, interpret: Any
) -> Float[Array, "M queries H"]:
    """Gradient of the queries; blocks that no pair is in are not written."""
    q = operands.q
    specs = tiles.specs(layout, q.shape[2])
    block = layout.block_q * layout.group
    (q_bar,) = tiles.call(
        _query_kernel,
        operands,
        layout,
        in_specs=_in_specs(specs),
        out_specs=[specs.query],
        outputs=[jax.ShapeDtypeStruct(q.shape, q.dtype)],
        scratch=[
            pltpu.VMEM((block, LANES), jnp.float32),
            pltpu.VMEM((block, LANES), jnp.float32),
            pltpu.VMEM((block, q.shape[2]), jnp.float32),
        ],
        vmem_bytes=vmem_bytes,
        interpret=interpret,
        name="query_gradient",
    )
    return q_bar


def key_value_gradient(
    operands: Operands, layout: tiles.Layout, *, vmem_bytes: int, interpret: Any
) -> tuple[Float[Array, "M keys H"], Float[Array, "M keys H"]]:
    """Gradients of keys and of values; blocks that no pair is in are not written."""
    k = operands.k
    specs = tiles.specs(layout, k.shape[2])
    k_bar, v_bar = tiles.call(
        _key_value_kernel,
        operands,
        layout,
        in_specs=_in_specs(specs),
        out_specs=[specs.key, specs.key],
        outputs=[jax.ShapeDtypeStruct(k.shape, k.dtype)] * 2,
        scratch=[
            pltpu.VMEM((layout.block_k, LANES), jnp.int32),
            pltpu.VMEM((layout.block_k, k.shape[2]), jnp.float32),
            pltpu.VMEM((layout.block_k, k.shape[2]), jnp.float32),
        ],
        vmem_bytes=vmem_bytes,
        interpret=interpret,
        name="key_value_gradient",
    )
    return k_bar, v_bar


def _in_specs(specs: tiles.Specs) -> list[pl.BlockSpec]:
    number = specs.query_number
    return [specs.query, specs.key, specs.key, specs.query, number, number]


def _query_kernel(  # type: ignore[no-untyped-def] # noqa: PLR0917 - the order of the call
    words,
    query_start,
    q,
    k,
    v,
    out_bar,
    log_normaliser,
    delta,
    subtree_size,
    q_bar,
    log_column,
    delta_column,
    total,
    *,
    group: int,
) -> None:
    block_k, head_dim = k.shape
    scale = tiles.LOG2_E / math.sqrt(head_dim)

    def first() -> None:
        log_column[...] = tiles.column(log_normaliser[...])
        delta_column[...] = tiles.column(delta[...])

    def tile(word: Array, part: tiles.Part, masked: bool, turn: tiles.Turn) -> None:
        rows, keys = part.rows(group), part.keys
        num_keys = keys.stop
        scores = tiles.dot(q[rows], k[keys], contract=(1, 1))
        if masked:
            first_query = query_start[pairs.major_block(word)] + part.queries.start
            first_key = pairs.minor_block(word) * block_k
            scores = tiles.masked(scores, first_query, first_key, subtree_size[:, keys], group)
        if turn is tiles.Turn.FINISHES:
            log, of_out = tiles.column(log_normaliser[:, rows]), tiles.column(delta[:, rows])
        else:
            log, of_out = log_column[rows], delta_column[rows]
        weights = jnp.exp2((scores - tiles.lanes(log, num_keys)) * scale)
        weights_bar = tiles.dot(out_bar[rows], v[keys], contract=(1, 1))
        scores_bar = weights * (weights_bar - tiles.lanes(of_out, num_keys))
        products = tiles.dot(scores_bar.astype(k.dtype), k[keys], contract=(1, 0))
        if turn is tiles.Turn.FINISHES:
            finish(rows, products)
        else:
            total[rows] = products if turn is tiles.Turn.SETS else total[rows] + products

    def finish(rows: slice, products: Array) -> None:
        q_bar[rows] = (products * (1.0 / math.sqrt(head_dim))).astype(q_bar.dtype)

    def last() -> None:
        finish(slice(0, q.shape[0]), total[...])

    tiles.each_pair(
        words,
        query_start,
        block_q=q.shape[0] // group,
        block_k=block_k,
        key_major=False,
        first=first,
        tile=tile,
        last=last,
    )


def _key_value_kernel(  # type: ignore[no-untyped-def] # noqa: PLR0917 - the order of the call
    words,
    query_start,
    q,
    k,
    v,
    out_bar,
    log_normaliser,
    delta,
    subtree_size,
    k_bar,
    v_bar,
    size_column,
    k_total,
    v_total,
    *,
    group: int,
) -> None:
    block_k, head_dim = k.shape
    scale = tiles.LOG2_E / math.sqrt(head_dim)

    def first() -> None:
        size_column[...] = tiles.column(subtree_size[...])

    def tile(word: Array, part: tiles.Part, masked: bool, turn: tiles.Turn) -> None:
        columns, keys = part.rows(group), part.keys
        scores = tiles.dot(k[keys], q[columns], contract=(1, 1))
        if masked:
            first_key = pairs.major_block(word) * block_k + keys.start
            key = tiles.numbered(first_key, scores.shape, 0)
            first_query = query_start[pairs.minor_block(word)] + part.queries.start
            query = tiles.numbered(first_query, (1, scores.shape[1]), 1, repeats=group)
            alone = turn is tiles.Turn.FINISHES
            size = tiles.column(subtree_size[:, keys]) if alone else size_column[keys]
            sees = tiles.sees(query, key, tiles.lanes(size, scores.shape[1]))
            scores = jnp.where(sees, scores, tiles.MASKED_SCORE)
        weights = jnp.exp2((scores - log_normaliser[:, columns]) * scale)
        of_v = tiles.dot(weights.astype(v.dtype), out_bar[columns], contract=(1, 0))
        weights_bar = tiles.dot(v[keys], out_bar[columns], contract=(1, 1))
        scores_bar = weights * (weights_bar - delta[:, columns])
        of_k = tiles.dot(scores_bar.astype(q.dtype), q[columns], contract=(1, 0))
        if turn is tiles.Turn.FINISHES:
            finish(keys, of_k, of_v)
            return
        if turn is tiles.Turn.ADDS:
            of_k, of_v = k_total[keys] + of_k, v_total[keys] + of_v
        k_total[keys], v_total[keys] = of_k, of_v

    def finish(keys: slice, of_k: Array, of_v: Array) -> None:
        k_bar[keys] = (of_k * (1.0 / math.sqrt(head_dim))).astype(k_bar.dtype)
        v_bar[keys] = of_v.astype(v_bar.dtype)

    def last() -> None:
        finish(slice(0, block_k), k_total[...], v_total[...])

    tiles.each_pair(
        words,
        query_start,
        block_q=q.shape[0] // group,
        block_k=block_k,
        key_major=True,
        first=first,
        tile=tile,
        last=last,
    )
