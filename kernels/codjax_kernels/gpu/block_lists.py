"""Which blocks of the attention mask a thread block of a GPU kernel visits, in which order.

A kernel gives every block of queries (or of keys) to one thread block, which walks through the
blocks of keys (of queries) that it shares a visible pair with: first those that are wholly visible,
which need no mask, then the rest. `visible_blocks` looks at the mask by blocks; `block_lists` makes
the lists, of queries as it stands, of keys after `transposed`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class VisibleBlocks(NamedTuple):
    """The mask ``j <= i < subtree_end[j]`` by blocks of queries and blocks of keys."""

    some: Bool[Array, "B blocks partners"]  # some query of the block sees some key of the other
    every: Bool[Array, "B blocks partners"]  # every query sees every key


class BlockLists(NamedTuple):
    """The blocks to visit, for every block of one side."""

    partners: Int[Array, "B blocks partners"]  # wholly visible ones first; what follows is unused
    num_whole: Int[Array, "B blocks"]  # so many partners are wholly visible
    num_partners: Int[Array, "B blocks"]


def visible_blocks(
    subtree_end: Int[Array, "B T"],
    query_start: Int[Array, ""],
    num_queries: int,
    *,
    query_block: int,
    key_block: int,
) -> VisibleBlocks:
    """Pairs of blocks with a visible pair of tokens, and those with no other.

    Padding, which fills the last block of either side, is seen by nobody. Padded queries make no
    block visible, but a block that they see in part is not wholly visible: so kernels mask them
    like the others, forward and backward alike.

    Args:
        subtree_end: index one past the last descendant of every key.
        query_start: index of the first query in its row.
        num_queries: queries from there on.
        query_block: queries in a block.
        key_block: keys in a block.
    """
    num_rows, num_tokens = subtree_end.shape
    num_key_blocks = -(-num_tokens // key_block)
    padding = ((0, 0), (0, num_key_blocks * key_block - num_tokens))
    ends = jnp.pad(subtree_end, padding).reshape(num_rows, 1, num_key_blocks, key_block)
    keys = jnp.arange(num_key_blocks * key_block).reshape(1, 1, num_key_blocks, key_block)
    start = query_start + jnp.arange(0, num_queries, query_block).reshape(1, -1, 1, 1)
    stop = jnp.minimum(start + query_block, query_start + num_queries)
    # A key is seen by the queries from itself to its end, and here by those of the block.
    some = jnp.any(jnp.maximum(keys, start) < jnp.minimum(ends, stop), axis=-1)
    every = jnp.all((keys <= start) & (ends >= start + query_block), axis=-1)
    return VisibleBlocks(some, every & some)


def transposed(visible: VisibleBlocks) -> VisibleBlocks:
    """The same by blocks of keys."""
    return VisibleBlocks(*(jnp.swapaxes(blocks, 1, 2) for blocks in visible))


def block_lists(visible: VisibleBlocks) -> BlockLists:
    """The partners of every block, in ascending order but those that need no mask first."""
    rank = jnp.where(visible.every, 0, jnp.where(visible.some, 1, 2))
    return BlockLists(
        partners=jnp.argsort(rank, axis=-1, stable=True).astype(jnp.int32),
        num_whole=jnp.sum(visible.every, axis=-1, dtype=jnp.int32),
        num_partners=jnp.sum(visible.some, axis=-1, dtype=jnp.int32),
    )
