"""The forward kernel: blocks of queries stay, blocks of keys and values stream by."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from codjax_kernels import pairs
from codjax_kernels.tpu import attention_tiles as tiles
from codjax_kernels.tpu.attention_blocks import LANES


def forward(
    q: Float[Array, "M queries H"],
    k: Float[Array, "M keys H"],
    v: Float[Array, "M keys H"],
    layout: tiles.Layout,
    *,
    vmem_bytes: int,
    interpret: Any,
) -> tuple[Float[Array, "M queries H"], Float[Array, "M 1 queries"]]:
    """Outputs and log-normalisers of queries; 1e30 of a query that sees nothing.

    Log-normalisers are in units of q . k, before the division by sqrt(H): then the difference to a
    score that weighs something is exact, and weights get no error beside that of q . k itself.

    Blocks that no pair is in are not written.
    """
    num_kv_heads, num_queries, head_dim = q.shape
    specs = tiles.specs(layout, head_dim)
    block = layout.block_q * layout.group
    out, log_normaliser = tiles.call(
        _kernel,
        (q, k, v),
        layout,
        in_specs=[specs.query, specs.key, specs.key],
        out_specs=[specs.query, specs.query_number],
        outputs=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((num_kv_heads, 1, num_queries), jnp.float32),
        ],
        scratch=[
            pltpu.VMEM((block, LANES), jnp.float32),
            pltpu.VMEM((block, LANES), jnp.float32),
            pltpu.VMEM((block, head_dim), jnp.float32),
        ],
        vmem_bytes=vmem_bytes,
        interpret=interpret,
        name="forward",
    )
    return out, log_normaliser


def _kernel(  # type: ignore[no-untyped-def] # noqa: PLR0917 - the order of the call
    words,
    query_start,
    q,
    k,
    v,
    subtree_size,
    out,
    log_normaliser,
    highest,
    total,
    weighted,
    *,
    group: int,
) -> None:
    """`highest` and `total` fill the lanes: all alike, and partial sums, one for each lane."""
    block_k, head_dim = k.shape
    scale = tiles.LOG2_E / math.sqrt(head_dim)

    def tile(word: Array, part: tiles.Part, masked: bool, turn: tiles.Turn) -> None:
        rows, keys = part.rows(group), part.keys
        num_keys = keys.stop
        scores = tiles.dot(q[rows], k[keys], contract=(1, 1))
        if masked:
            first_query = query_start[pairs.major_block(word)] + part.queries.start
            first_key = pairs.minor_block(word) * block_k
            scores = tiles.masked(scores, first_query, first_key, subtree_size[:, keys], group)
        after = jnp.max(scores, axis=1, keepdims=True)
        after = jnp.broadcast_to(after, (scores.shape[0], LANES))
        if turn is tiles.Turn.ADDS:
            before = highest[rows]
            after = jnp.maximum(before, after)
            shrunk = jnp.exp2((before - after) * scale)
        # The difference first: it is exactly 0 for masked scores under a masked highest.
        weights = jnp.exp2((scores - tiles.lanes(after, num_keys)) * scale)
        sums = functools.reduce(
            jnp.add, [weights[:, i : i + LANES] for i in range(0, num_keys, LANES)]
        )
        products = tiles.dot(weights.astype(v.dtype), v[keys], contract=(1, 0))
        if turn is tiles.Turn.FINISHES:
            finish(rows, after, sums, products)
            return
        if turn is tiles.Turn.ADDS:
            sums = total[rows] * shrunk + sums
            products = weighted[rows] * tiles.lanes(shrunk, head_dim) + products
        highest[rows], total[rows], weighted[rows] = after, sums, products

    def finish(rows: slice, most: Array, sums: Array, products: Array) -> None:
        sums = jnp.sum(sums, axis=1, keepdims=True)
        out[rows] = (products / sums).astype(out.dtype)
        most, sums = tiles.row(most), tiles.row(jnp.broadcast_to(sums, most.shape))
        log = most + jnp.log2(sums) * (1.0 / scale)
        log_normaliser[:, rows] = jnp.where(most <= tiles.MASKED_SCORE, tiles.NOTHING_SEEN, log)

    def last() -> None:
        finish(slice(0, q.shape[0]), highest[...], total[...], weighted[...])

    tiles.each_pair(
        words,
        query_start,
        block_q=q.shape[0] // group,
        block_k=block_k,
        key_major=False,
        first=lambda: None,
        tile=tile,
        last=last,
    )
