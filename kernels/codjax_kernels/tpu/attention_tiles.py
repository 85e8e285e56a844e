"""What the attention kernels share: their operands laid out in blocks, and idioms of one tile.

Rows stand end to end, each padded to whole blocks, so that the kernels know one long sequence and
no rows. On it a key is a number J and the size W of its subtree, a query is a number I, and the
mask is ``0 <= I - J < W``. Padding keys have W = 0. Padding queries are numbered on, and see what
they see: they are cut off, and weigh nothing in gradients, as theirs are 0. The query heads of one
key-value head follow each other like queries: `queries` in shapes counts queries times heads.
"""

from __future__ import annotations

import enum
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from codjax_kernels import pairs
from codjax_kernels.tpu.attention_blocks import LANES, MAX_KEYS, MAX_TILE_ROWS, Blocks, fitted

MASKED_SCORE = -1e30  # finite, so that no mask can make a nan
NOTHING_SEEN = 1e30  # log-normaliser of a query that sees nothing: all its weights are 0
STRIP = 128  # tokens of a strip of a tile on the diagonal
LOG2_E = math.log2(math.e)  # the hardware has powers of 2: exp(s) = 2 ** (s LOG2_E)


class Layout(NamedTuple):
    """The list of pairs that a kernel walks, and the numbers of queries and keys."""

    pairs: pairs.Pairs
    key_major: bool
    group: int  # query heads of a key-value head
    block_q: int  # tokens
    block_k: int
    query_start: Int[Array, " blocks"]  # I of the first query of a block
    subtree_size: Int[Array, "1 keys"]  # W


def layout(
    subtree_end: Int[Array | np.ndarray, "B T"],
    query_start: int | Int[Array, ""],
    *,
    num_queries: int,
    group: int,
    blocks: Blocks,
    key_major: bool,
) -> Layout:
    """Cuts rows into the blocks of a kernel, numbers their tokens and lists the pairs."""
    rows, num_keys = subtree_end.shape
    most_queries = max(MAX_TILE_ROWS // group // LANES, 1) * LANES
    block_q = fitted(min(blocks.queries, most_queries), num_queries)
    block_k = fitted(blocks.keys, num_keys)
    most_pairs = functools.partial(
        pairs.most_pairs,
        subtree_end.shape,
        num_queries=num_queries,
        query_start=query_start,
        block_q=block_q,
    )
    # Long rows of large groups: narrow blocks of queries would make too long a list.
    while most_pairs(block_k=block_k) > pairs.MAX_PAIRS and block_k < MAX_KEYS:
        block_k *= 2
    listed = pairs.block_pairs(
        subtree_end,
        num_queries=num_queries,
        query_start=query_start,
        block_q=block_q,
        block_k=block_k,
        key_major=key_major,
    )
    row_length = math.ceil(num_keys / block_k) * block_k
    row_start = row_length * jnp.arange(rows, dtype=jnp.int32)[:, None]
    block_start = jnp.arange(0, num_queries, block_q, dtype=jnp.int32)[None]
    size = jnp.minimum(subtree_end, num_keys) - jnp.arange(num_keys, dtype=jnp.int32)[None]
    return Layout(
        listed,
        key_major,
        group,
        block_q,
        block_k,
        query_start=(row_start + query_start + block_start).reshape(-1),
        subtree_size=join_rows(jnp.maximum(size, 0)[None, :, :, None], block_k),
    )


def join_rows(array: Array, block: int) -> Array:
    """[M B T g …] → [M B·T'·g …]: tokens padded with zeros to whole blocks, all in one line."""
    padding = [(0, 0)] * array.ndim
    padding[2] = (0, -array.shape[2] % block)
    return jnp.pad(array, padding).reshape(array.shape[0], -1, *array.shape[4:])


def split_rows(array: Array, *, rows: int, num_tokens: int, group: int) -> Array:
    """Undoes `join_rows`: [M B·T'·g …] → [M B T g …]."""
    split = array.reshape(array.shape[0], rows, -1, group, *array.shape[2:])
    return split[:, :, :num_tokens]


def zero_unless_visited(array: Array, visited: Array | np.ndarray) -> Array:
    """[M blocks·n …] with zeros where no step has written: blocks that no pair is in."""
    written = jnp.repeat(visited, array.shape[1] // visited.shape[0])
    return jnp.where(written.reshape(1, -1, *[1] * (array.ndim - 2)), array, 0)


class Specs(NamedTuple):
    """Block specifications of the operands, on the grid of key-value heads by pairs."""

    query: pl.BlockSpec  # [M queries H]
    query_number: pl.BlockSpec  # [M 1 queries]
    key: pl.BlockSpec  # [M keys H]
    subtree_size: pl.BlockSpec  # [1 keys]


def specs(layout: Layout, head_dim: int) -> Specs:
    """Where the words of the list send a step of the grid."""
    of_query, of_key = pairs.major_block, pairs.minor_block
    if layout.key_major:
        of_query, of_key = of_key, of_query
    queries, keys = layout.block_q * layout.group, layout.block_k
    return Specs(
        query=pl.BlockSpec((None, queries, head_dim), lambda m, i, w, _: (m, of_query(w[i]), 0)),
        query_number=pl.BlockSpec((None, 1, queries), lambda m, i, w, _: (m, 0, of_query(w[i]))),
        key=pl.BlockSpec((None, keys, head_dim), lambda m, i, w, _: (m, of_key(w[i]), 0)),
        subtree_size=pl.BlockSpec((1, keys), lambda m, i, w, _: (0, of_key(w[i]))),
    )


def call(  # type: ignore[no-untyped-def]
    kernel: Callable[..., None],
    operands: tuple[Array, ...],
    layout: Layout,
    *,
    in_specs: list[pl.BlockSpec],
    out_specs: list[pl.BlockSpec],
    outputs: list[jax.ShapeDtypeStruct],
    scratch: list[Any],
    vmem_bytes: int,
    interpret: Any,
    name: str,
):
    """Runs a kernel over key-value heads, which cores may share, and pairs, which are in order."""
    subtree_size = specs(layout, head_dim=1).subtree_size
    return pl.pallas_call(
        functools.partial(kernel, group=layout.group),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(operands[0].shape[0], layout.pairs.num_pairs),
            in_specs=[*in_specs, subtree_size],
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        out_shape=outputs,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem_bytes
        ),
        interpret=interpret,
        name=f"forest_attention_{name}",
    )(layout.pairs.words, layout.query_start, *operands, layout.subtree_size)


# What follows is used inside of kernels.


class Part(NamedTuple):
    """Some queries of a tile with some of its keys, as tokens of their blocks."""

    queries: slice
    keys: slice

    def rows(self, group: int) -> slice:
        """The queries in blocks that hold `group` heads of each token."""
        return slice(self.queries.start * group, self.queries.stop * group)


def below_diagonal(block: int, *, key_major: bool) -> list[Part]:
    """Strips of a tile of as many queries as keys without those that come after a whole strip.

    What a strip leaves out is on the streaming side.

    >>> [part.keys.stop for part in below_diagonal(512, key_major=False)]
    [128, 256, 384, 512]
    """
    starts = range(0, block, STRIP)
    if key_major:
        return [Part(slice(i, block), slice(i, i + STRIP)) for i in starts]
    return [Part(slice(i, i + STRIP), slice(0, i + STRIP)) for i in starts]


class Turn(enum.Enum):
    """What a tile does with its sums."""

    SETS = enum.auto()  # the first of a run; filling sums with zeros would take longer
    ADDS = enum.auto()
    FINISHES = enum.auto()  # the only one of a run: its sums are the result, and stay unwritten


def each_pair(
    words: Any,
    query_start: Any,
    *,
    block_q: int,
    block_k: int,
    key_major: bool,
    first: Callable[[], None],
    tile: Callable[[Array, Part, bool, Turn], None],
    last: Callable[[], None],
) -> None:
    """One step: the beginning of a run of pairs, a tile (word, part, masked, turn), and the end.

    A tile on the diagonal is done in parts, without what lies above it. Where it is a run of its
    own, as in every packed row of short segments, it begins and ends that run itself.
    """
    word = words[pl.program_id(1)]
    is_first, is_last, is_masked = (
        (word & x) != 0 for x in (pairs.FIRST, pairs.LAST, pairs.MASKED)
    )
    whole = [Part(slice(0, block_q), slice(0, block_k))]
    kinds = [(~is_masked, False, whole), (is_masked, True, whole)]
    is_alone = False

    def run(parts: list[Part], masked: bool, turn: Turn) -> None:
        for part in parts:
            tile(word, part, masked, turn)

    if block_q == block_k:
        key_block, query_block = pairs.minor_block(word), pairs.major_block(word)
        if key_major:
            key_block, query_block = query_block, key_block
        is_diagonal = query_start[query_block] == key_block * block_k
        is_alone = is_diagonal & is_first & is_last
        parts = below_diagonal(block_q, key_major=key_major)
        kinds[1:] = [(is_masked & ~is_diagonal, True, whole), (is_diagonal, True, parts)]
        pl.when(is_alone)(functools.partial(run, parts, True, Turn.FINISHES))
        is_first, is_last = is_first & ~is_alone, is_last & ~is_alone
    pl.when(is_first)(first)
    adds = ~(is_first | is_alone)
    for (chosen, masked, parts), (begins, turn) in itertools.product(
        kinds, ((is_first, Turn.SETS), (adds, Turn.ADDS))
    ):
        pl.when(chosen & begins)(functools.partial(run, parts, masked, turn))
    pl.when(is_last)(last)


def dot(left: Array, right: Array, *, contract: tuple[int, int]) -> Float[Array, "rows columns"]:
    """Matrix product in float32; of float32 operands in full precision, not in bfloat16 passes."""
    return jax.lax.dot_general(
        left,
        right,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def column(row: Array) -> Array:
    """[1 n] → [n LANES]: a number for each row of a tile, in all its lanes."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def row(column: Array) -> Array:
    """[n LANES], all columns alike → [1 n]: undoes `column`."""
    # Off the diagonal of square parts: three times cheaper than turning them.
    first, second = (jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), axis) for axis in (0, 1))
    parts = [
        jnp.sum(jnp.where(first == second, column[i : i + LANES], 0), axis=0, keepdims=True)
        for i in range(0, column.shape[0], LANES)
    ]
    return jnp.concatenate(parts, axis=1)


def lanes(wide: Array, width: int) -> Array:
    """[n LANES], all columns alike → [n width]."""
    return jnp.tile(wide, (1, math.ceil(width / LANES)))[:, :width]


def numbered(
    first: Array, shape: tuple[int, ...], axis: int, *, repeats: int = 1
) -> Int[Array, "rows columns"]:
    """Integers from `first` along an axis of a tile, each `repeats` times."""
    index = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
    if repeats > 1:  # vector units have no division of integers; this is exact below 2 ** 22
        index = ((index.astype(jnp.float32) + 0.5) * (1.0 / repeats)).astype(jnp.int32)
    return first + index


def masked(
    scores: Float[Array, "rows keys"],
    first_query: Array,
    first_key: Array,
    subtree_size: Int[Array, "1 keys"],
    group: int,
) -> Float[Array, "rows keys"]:
    """Scores with MASKED_SCORE where a query, of `group` heads each, does not see a key."""
    key = numbered(first_key, subtree_size.shape, 1)
    query = numbered(first_query, scores.shape, 0, repeats=group)
    return jnp.where(sees(query, key, subtree_size), scores, MASKED_SCORE)


def sees(query: Array, key: Array, subtree_size: Array) -> Bool[Array, "rows columns"]:
    """The mask of a tile: ``0 <= query - key < subtree_size``, in one comparison.

    Where the range of integers wraps around, a negative difference is above every size.
    """
    lowest = jnp.int32(-(2**31))
    return (query + lowest) - key < subtree_size + lowest
