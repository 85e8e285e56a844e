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

    def tile(word: Array, masked: bool, is_first: bool) -> None:
        scores = tiles.dot(q[...], k[...], contract=(1, 1))
        if masked:
            key = tiles.numbered(pairs.minor_block(word) * block_k, (1, block_k), 1)
            first_query = query_start[pairs.major_block(word)]
            query = tiles.numbered(first_query, scores.shape, 0, repeats=group)
            sees = tiles.sees(query, key, subtree_size[...])
            scores = jnp.where(sees, scores, tiles.MASKED_SCORE)
        weights = jnp.exp2(scores * scale - tiles.lanes(log_column[...], block_k))
        weights_bar = tiles.dot(out_bar[...], v[...], contract=(1, 1))
        scores_bar = weights * (weights_bar - tiles.lanes(delta_column[...], block_k))
        products = tiles.dot(scores_bar.astype(k.dtype), k[...], contract=(1, 0))
        total[...] = products if is_first else total[...] + products

    def last() -> None:
        q_bar[...] = (total[...] * (1.0 / math.sqrt(head_dim))).astype(q_bar.dtype)

    tiles.each_pair(words, first=first, tile=tile, last=last)


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

    def tile(word: Array, masked: bool, is_first: bool) -> None:
        scores = tiles.dot(k[...], q[...], contract=(1, 1))
        if masked:
            key = tiles.numbered(pairs.major_block(word) * block_k, scores.shape, 0)
            first_query = query_start[pairs.minor_block(word)]
            query = tiles.numbered(first_query, (1, scores.shape[1]), 1, repeats=group)
            sees = tiles.sees(query, key, tiles.lanes(size_column[...], scores.shape[1]))
            scores = jnp.where(sees, scores, tiles.MASKED_SCORE)
        weights = jnp.exp2(scores * scale - log_normaliser[...])
        of_v = tiles.dot(weights.astype(v.dtype), out_bar[...], contract=(1, 0))
        v_total[...] = of_v if is_first else v_total[...] + of_v
        weights_bar = tiles.dot(v[...], out_bar[...], contract=(1, 1))
        scores_bar = weights * (weights_bar - delta[...])
        of_k = tiles.dot(scores_bar.astype(q.dtype), q[...], contract=(1, 0))
        k_total[...] = of_k if is_first else k_total[...] + of_k

    def last() -> None:
        k_bar[...] = (k_total[...] * (1.0 / math.sqrt(head_dim))).astype(k_bar.dtype)
        v_bar[...] = v_total[...].astype(v_bar.dtype)

    tiles.each_pair(words, first=first, tile=tile, last=last)
