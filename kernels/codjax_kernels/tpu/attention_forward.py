"""The forward kernel: blocks of queries stay, blocks of keys and values stream by."""

from __future__ import annotations

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
    """Outputs and base-2 log-normalisers of queries; 1e30 of a query that sees nothing.

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

    def tile(word: Array, masked: bool, is_first: bool) -> None:
        scores = tiles.dot(q[...], k[...], contract=(1, 1))
        if masked:
            key = tiles.numbered(pairs.minor_block(word) * block_k, (1, block_k), 1)
            first_query = query_start[pairs.major_block(word)]
            query = tiles.numbered(first_query, scores.shape, 0, repeats=group)
            sees = tiles.sees(query, key, subtree_size[...])
            scores = jnp.where(sees, scores, tiles.MASKED_SCORE)
        after = jnp.broadcast_to(jnp.max(scores, axis=1, keepdims=True), highest.shape)
        if not is_first:
            before = highest[...]
            after = jnp.maximum(before, after)
            shrunk = jnp.exp2((before - after) * scale)
        # The difference first: it is exactly 0 for masked scores under a masked highest.
        weights = jnp.exp2((scores - tiles.lanes(after, block_k)) * scale)
        sums = sum(weights[:, i : i + LANES] for i in range(0, block_k, LANES))
        products = tiles.dot(weights.astype(v.dtype), v[...], contract=(1, 0))
        highest[...] = after
        total[...] = sums if is_first else total[...] * shrunk + sums
        weighted[...] = (
            products if is_first else weighted[...] * tiles.lanes(shrunk, head_dim) + products
        )

    def last() -> None:
        sums = jnp.sum(total[...], axis=1, keepdims=True)
        out[...] = (weighted[...] / sums).astype(out.dtype)
        most, sums = tiles.row(highest[...]), tiles.row(jnp.broadcast_to(sums, total.shape))
        log = most * scale + jnp.log2(sums)
        log_normaliser[...] = jnp.where(most <= tiles.MASKED_SCORE, tiles.NOTHING_SEEN, log)

    tiles.each_pair(words, first=lambda: None, tile=tile, last=last)
