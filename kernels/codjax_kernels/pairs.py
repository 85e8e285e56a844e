"""Which blocks of queries meet which blocks of keys under the mask ``j <= i < subtree_end[j]``.

A kernel walks a list of such pairs instead of a rectangle of blocks, so that what the mask leaves
out costs nothing: `block_pairs` makes the list (under jit, or on the host from a numpy array),
`minimal_pairs` counts it from the dense mask, which is what tests hold the list against. Rows are
laid end to end, each padded to whole blocks, and one list serves them all.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

AnyArray = Array | np.ndarray

# A pair is one int32: major block, minor block, flags. Pairs of one major block stand together,
# minor blocks ascending.
FLAG_BITS = 3
BLOCK_BITS = 14
FIRST, LAST, MASKED = 1, 2, 4  # of its major block's run; whether some pair of tokens is masked
NO_PAIR = 2**31 - 1
MAX_BLOCKS = 2**BLOCK_BITS - 1  # so that NO_PAIR's major block is nobody's
# The list stands in scalar memory; half a MiB leaves room for what the compiler puts there.
MAX_PAIRS = 2**17


class Pairs(NamedTuple):
    """The active pairs of blocks, grouped by their major block.

    Made on the host, `num_pairs` is a plain int and `words` has no tail.
    """

    words: Int[AnyArray, " capacity"]  # packed pairs, NO_PAIR from `num_pairs` on
    num_pairs: Int[Array, ""] | int
    visited: Bool[AnyArray, " blocks"]  # whether a major block is in any pair


def block_pairs(
    subtree_end: Int[AnyArray, "B T"],
    *,
    num_queries: int,
    query_start: int | Int[Array, ""] = 0,
    block_q: int,
    block_k: int,
    key_major: bool = False,
) -> Pairs:
    """The pairs of blocks in which some query sees some key: exactly those, each once.

    Block ``r * ceil(Q / block_q) + a`` holds queries from ``a * block_q`` of row `r`; blocks of
    keys are numbered alike.

    Args:
        subtree_end: index one past a key's last descendant; a key with an end at or below its own
            index is seen by nobody.
        num_queries: Q, queries of every row.
        query_start: index in the row of the first of them.
        block_q: queries in a block.
        block_k: keys in a block.
        key_major: group pairs by block of keys, for the gradients of keys and values; otherwise
            by block of queries.

    Returns:
        `Pairs`, counted on the host if `subtree_end` is a numpy array and `query_start` an int.

    Raises:
        ValueError: more blocks or pairs than the list has room for.
    """
    rows, num_keys = subtree_end.shape
    num_q, num_k = math.ceil(num_queries / block_q), math.ceil(num_keys / block_k)
    capacity = most_pairs(
        subtree_end.shape,
        num_queries=num_queries,
        query_start=query_start,
        block_q=block_q,
        block_k=block_k,
    )
    if rows * max(num_q, num_k) > MAX_BLOCKS or capacity > MAX_PAIRS:
        raise ValueError(
            f"{rows} rows of {num_keys} tokens are up to {capacity} pairs of blocks of {block_q} "
            f"queries and {block_k} keys; the list holds {MAX_PAIRS}, of {MAX_BLOCKS} blocks: take "
            "fewer rows at a time, larger blocks, or implementation 'xla'."
        )
    on_host = isinstance(subtree_end, np.ndarray) and isinstance(query_start, int)
    xp = np if on_host else jnp
    offset = query_start + block_q * xp.arange(num_q, dtype=np.int32)
    last = xp.minimum(offset + block_q, query_start + num_queries) - 1
    seen_by_some, seen_by_all = _seen_by(
        subtree_end, offset, last, xp=xp, padded_keys=num_k * block_k
    )
    blocks = (rows, num_q, num_k, block_k)
    active = seen_by_some.reshape(blocks).any(-1)
    has_padding = (last - offset < block_q - 1)[None, :, None]  # such blocks count as masked
    full = seen_by_all.reshape(blocks).all(-1) & ~has_padding
    query_block = xp.arange(rows * num_q, dtype=np.int32).reshape(rows, num_q, 1)
    key_block = xp.arange(rows * num_k, dtype=np.int32).reshape(rows, 1, num_k)
    major, minor = (key_block, query_block) if key_major else (query_block, key_block)
    words = (major << BLOCK_BITS | minor) << FLAG_BITS | xp.where(full, 0, MASKED)
    # A sort compacts and orders at once; on TPUs it is far cheaper than a scatter.
    words = xp.sort(xp.where(active, words, NO_PAIR).reshape(-1))
    num_pairs = active.sum(dtype=np.int32)
    if on_host:
        num_pairs = capacity = int(num_pairs)
    # A list is never empty: scalar memory has no arrays of size 0.
    words = _with_flags(words[: max(capacity, 1)], xp=xp)
    visited = xp.any(active, axis=1 if key_major else 2).reshape(-1)
    return Pairs(words, num_pairs, visited)


def most_pairs(
    keys_shape: tuple[int, ...],
    *,
    num_queries: int,
    query_start: int | Int[Array, ""],
    block_q: int,
    block_k: int,
) -> int:
    """Pairs that `block_pairs` may list, whatever the forests: those of rows without branches."""
    rows, num_keys = keys_shape
    latest_start = query_start if isinstance(query_start, int) else num_keys - num_queries
    return rows * _causal_pairs(num_queries, num_keys, latest_start, block_q, block_k)


def major_block(word: AnyArray) -> AnyArray:
    """Block that a pair is grouped by: of queries, or of keys if the list is key-major."""
    return word >> (BLOCK_BITS + FLAG_BITS)


def minor_block(word: AnyArray) -> AnyArray:
    """The other block of a pair."""
    return (word >> FLAG_BITS) & (2**BLOCK_BITS - 1)


def minimal_pairs(
    subtree_end: Int[np.ndarray, "B T"],
    block_q: int,
    block_k: int,
    *,
    num_queries: int | None = None,
    query_start: int = 0,
) -> int:
    """Number of pairs of blocks that hold a visible pair of tokens, from the dense mask.

    >>> minimal_pairs(np.array([[2, 2, 4, 4]]), 2, 2)  # two segments of two tokens
    2
    """
    rows, num_keys = subtree_end.shape
    num_queries = num_keys if num_queries is None else num_queries
    query = query_start + np.arange(num_queries)[:, None]
    count = 0
    for row in range(rows):
        mask = (np.arange(num_keys) <= query) & (query < subtree_end[row])
        mask = np.pad(mask, ((0, -num_queries % block_q), (0, -num_keys % block_k)))
        blocks = mask.reshape(-1, block_q, mask.shape[1] // block_k, block_k)
        count += int(blocks.any((1, 3)).sum())
    return count


def _seen_by(  # type: ignore[no-untyped-def]
    subtree_end: Int[AnyArray, "B T"],
    first: Int[AnyArray, " blocks"],
    last: Int[AnyArray, " blocks"],
    *,
    xp,
    padded_keys: int,
) -> tuple[Bool[AnyArray, "B blocks keys"], Bool[AnyArray, "B blocks keys"]]:
    """Whether some, and whether every, query of `first … last` sees a key; padding keys: nobody."""
    key = xp.arange(padded_keys, dtype=np.int32)[None, None, :]
    num_padding = padded_keys - subtree_end.shape[1]
    end = xp.pad(subtree_end, ((0, 0), (0, num_padding)))[:, None, :]
    first, last = first[None, :, None], last[None, :, None]
    some = (key <= last) & (xp.maximum(first, key) < end)
    every = (key <= first) & (last < end)
    return some, every


def _with_flags(words: Int[AnyArray, " capacity"], *, xp) -> Int[AnyArray, " capacity"]:  # type: ignore[no-untyped-def]
    """Marks the first and the last pair of every major block; NO_PAIR stays as it is."""
    edge = xp.ones(1, bool)
    changes = major_block(words[1:]) != major_block(words[:-1])
    first = xp.where(xp.concatenate([edge, changes]), FIRST, 0)
    last = xp.where(xp.concatenate([changes, edge]), LAST, 0)
    return xp.where(words == NO_PAIR, words, words | first | last).astype(np.int32)


def _causal_pairs(
    num_queries: int, num_keys: int, query_start: int, block_q: int, block_k: int
) -> int:
    """Pairs of blocks of a row without branches, queries starting at `query_start`."""
    first = np.arange(0, num_queries, block_q)
    last = query_start + np.minimum(first + block_q, num_queries) - 1
    return int((np.minimum(last, num_keys - 1) // block_k + 1).sum())
