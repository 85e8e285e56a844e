"""The backward pass of `attention.py`: gradients of queries, and of keys and values.

With scores ``s``, probabilities ``p = 2 ** (s - log_normaliser)`` and ``dp = out_bar . v``, the
derivative of a score is ``ds = p (dp - mean_bar)``, where ``mean_bar = out_bar . out`` is the mean
of `dp`. Then, over the pairs of a query and a key that it sees,

    q_bar = sum of ds k / sqrt(H)      k_bar = sum of ds q / sqrt(H)      v_bar = sum of p out_bar

`query_gradient` sums over keys: a thread block owns `ring.BLOCK` queries of one head.
`key_value_gradients` sums over queries: a thread block owns `ring.BLOCK` keys of one key-value
head and walks through the partner blocks once for every query head that reads it, with tiles
transposed, keys by queries.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu
from jaxtyping import Array, Float, Int

from codjax_kernels.gpu import block_lists, ring

plgpu: Any = mosaic_gpu  # types are checked with jax 0.10, whose signatures are older

LOG2_E = math.log2(math.e)
# Tokens of a partner block. Of 128 as in the forward pass, registers would not hold two tiles.
PARTNER_BLOCK = 64


class Problem(NamedTuple):
    """What the gradients are made from; lengths are whole blocks, padding is 0."""

    q: Float[Array, "B Q N H"]
    k: Float[Array, "B T M H"]
    v: Float[Array, "B T M H"]
    out_bar: Float[Array, "B Q N H"]
    log_normaliser: Float[Array, "B N Q"]  # of scaled scores, to base 2
    mean_bar: Float[Array, "B N Q"]
    subtree_end: Int[Array, "B T"]
    query_start: Int[Array, ""]


class _QueryScratch(NamedTuple):
    """Shared memory of `query_gradient`."""

    q: Any
    out_bar: Any
    log_normaliser: Any
    mean_bar: Any
    k: Any
    v: Any
    ends: Any
    own: Any
    loaded: Any
    free: Any


class _KeyScratch(NamedTuple):
    """Shared memory of `key_value_gradients`."""

    k: Any
    v: Any
    ends: Any
    q: Any
    out_bar: Any
    log_normaliser: Any
    mean_bar: Any
    own: Any
    loaded: Any
    free: Any


class _Totals(NamedTuple):
    """Float32 sums over the queries seen so far."""

    k_bar: jax.Array
    v_bar: jax.Array


def query_gradient(
    problem: Problem, *, num_queries: int, interpret: Any
) -> Float[Array, "B Q N H"]:
    """Gradient of the queries, of which `num_queries` are not padding."""
    q = problem.q
    num_rows, padded_queries, num_heads, head_size = q.shape
    visible = block_lists.visible_blocks(
        problem.subtree_end,
        problem.query_start,
        num_queries,
        query_block=ring.BLOCK,
        key_block=PARTNER_BLOCK,
    )
    own = (ring.NUM_WARPGROUPS, ring.ROWS)
    slots = (ring.NUM_SLOTS, PARTNER_BLOCK)
    run = ring.kernel(
        functools.partial(
            _query_kernel, group=num_heads // problem.k.shape[2], interpret=interpret
        ),
        name="forest_attention_query_gradient",
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=_QueryScratch(
            q=ring.tile((*own, head_size), q.dtype),
            out_bar=ring.tile((*own, head_size), q.dtype),
            log_normaliser=plgpu.SMEM(own, jnp.float32),
            mean_bar=plgpu.SMEM(own, jnp.float32),
            k=ring.tile((*slots, head_size), q.dtype),
            v=ring.tile((*slots, head_size), q.dtype),
            ends=plgpu.SMEM(slots, jnp.int32),
            own=ring.own(4),
            loaded=ring.loaded(3),
            free=ring.free(),
        ),
        grid=(num_heads, padded_queries // ring.BLOCK, num_rows),
        interpret=interpret,
    )
    lists = block_lists.block_lists(visible)
    return run(*lists, *problem._replace(query_start=problem.query_start.reshape(1)))


def key_value_gradients(
    problem: Problem, *, num_queries: int, interpret: Any
) -> tuple[Float[Array, "B T M H"], Float[Array, "B T M H"]]:
    """Gradients of keys and values from `num_queries` queries that are not padding."""
    k, num_heads = problem.k, problem.q.shape[2]
    num_rows, padded_tokens, num_kv_heads, head_size = k.shape
    visible = block_lists.visible_blocks(
        problem.subtree_end,
        problem.query_start,
        num_queries,
        query_block=PARTNER_BLOCK,
        key_block=ring.BLOCK,
    )
    own = (ring.NUM_WARPGROUPS, ring.ROWS)
    slots = (ring.NUM_SLOTS, PARTNER_BLOCK)
    run = ring.kernel(
        functools.partial(_key_kernel, group=num_heads // num_kv_heads, interpret=interpret),
        name="forest_attention_key_value_gradients",
        out_type=(jax.ShapeDtypeStruct(k.shape, k.dtype),) * 2,
        scratch_types=_KeyScratch(
            k=ring.tile((*own, head_size), k.dtype),
            v=ring.tile((*own, head_size), k.dtype),
            ends=plgpu.SMEM(own, jnp.int32),
            q=ring.tile((*slots, head_size), k.dtype),
            out_bar=ring.tile((*slots, head_size), k.dtype),
            log_normaliser=plgpu.SMEM(slots, jnp.float32),
            mean_bar=plgpu.SMEM(slots, jnp.float32),
            own=ring.own(3),
            loaded=ring.loaded(4),
            free=ring.free(),
        ),
        grid=(num_kv_heads, padded_tokens // ring.BLOCK, num_rows),
        interpret=interpret,
    )
    lists = block_lists.block_lists(block_lists.transposed(visible))
    return run(*lists, *problem._replace(query_start=problem.query_start.reshape(1)))


def _query_kernel(*refs: Any, group: int, interpret: Any) -> None:
    num_arrays = 3 + len(Problem._fields)
    lists: Any = block_lists.BlockLists(*refs[:3])
    arrays: Any = Problem(*refs[3:num_arrays])
    q_bar, scratch = refs[num_arrays], _QueryScratch(*refs[num_arrays + 1 :])
    row, head = lax.axis_index("row"), lax.axis_index("head")
    # Later blocks have more ancestors: they start first, so that none of them ends last.
    block = lists.num_partners.shape[1] - 1 - lax.axis_index("block")
    warpgroup = lax.axis_index(ring.AXIS)
    num_whole, num_partners = lists.num_whole[row, block], lists.num_partners[row, block]
    first_query = block * ring.BLOCK + warpgroup * ring.ROWS
    queries = pl.ds(first_query, ring.ROWS)
    own, q = scratch.own.at[warpgroup], scratch.q.at[warpgroup]

    def first_key(step: jax.Array) -> jax.Array:
        return lists.partners[row, block, step] * PARTNER_BLOCK

    def copy(step: jax.Array) -> None:
        keys = pl.ds(first_key(step), PARTNER_BLOCK)
        kv_head, slot = lax.div(head, jnp.int32(group)), ring.slot_of(step)
        loaded = scratch.loaded.at[slot]
        plgpu.copy_gmem_to_smem(arrays.k.at[row, keys, kv_head], scratch.k.at[slot], loaded)
        plgpu.copy_gmem_to_smem(arrays.v.at[row, keys, kv_head], scratch.v.at[slot], loaded)
        plgpu.copy_gmem_to_smem(arrays.subtree_end.at[row, keys], scratch.ends.at[slot], loaded)

    for source, into in (
        (arrays.q.at[row, queries, head], scratch.q),
        (arrays.out_bar.at[row, queries, head], scratch.out_bar),
        (arrays.log_normaliser.at[row, head, queries], scratch.log_normaliser),
        (arrays.mean_bar.at[row, head, queries], scratch.mean_bar),
    ):
        plgpu.copy_gmem_to_smem(source, into.at[warpgroup], own)
    ring.start(copy, num_partners)
    plgpu.barrier_wait(own)
    log_normaliser = ring.load_rows(scratch.log_normaliser.at[warpgroup])
    mean_bar = ring.load_rows(scratch.mean_bar.at[warpgroup])

    def step(index: jax.Array, total: jax.Array, *, is_whole: bool) -> jax.Array:
        first = (arrays.query_start[0] + first_query, first_key(index))
        return _query_step(
            scratch,
            ring.slot_of(index),
            total,
            normalisers=(log_normaliser, mean_bar),
            prefetch=lambda: ring.prefetch(copy, scratch.free, index, num_partners),
            first=None if is_whole else first,
            interpret=interpret,
        )

    total = ring.filled((ring.ROWS, q.shape[1]), 0.0)
    total = lax.fori_loop(0, num_whole, functools.partial(step, is_whole=True), total)
    total = lax.fori_loop(num_whole, num_partners, functools.partial(step, is_whole=False), total)
    q[...] = (total * (1.0 / math.sqrt(q.shape[1]))).astype(q.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q, q_bar.at[row, queries, head])
    plgpu.wait_smem_to_gmem(0)


def _query_step(
    scratch: _QueryScratch,
    slot: jax.Array,
    total: jax.Array,
    *,
    normalisers: tuple[jax.Array, jax.Array],
    prefetch: Callable[[], None],
    first: tuple[jax.Array, jax.Array] | None,
    interpret: Any,
) -> jax.Array:
    """One block of keys more; `first` query and key of the block, or None where all are seen."""
    warpgroup = lax.axis_index(ring.AXIS)
    q, out_bar = scratch.q.at[warpgroup], scratch.out_bar.at[warpgroup]
    k, v = scratch.k.at[slot], scratch.v.at[slot]
    log_normaliser, mean_bar = normalisers
    plgpu.barrier_wait(scratch.loaded.at[slot])
    scores = ring.product(q, k.transpose((1, 0))) * (LOG2_E / math.sqrt(q.shape[1]))
    if first is not None:
        scores = ring.masked_scores(
            scores,
            first_query=first[0],
            first_key=first[1],
            ends=scratch.ends.at[slot],
            query_axis=0,
        )
    prefetch()
    probabilities = jnp.exp2(scores - ring.by_row(log_normaliser, scores.shape))
    of_score = ring.product(out_bar, v.transpose((1, 0)))
    of_score = probabilities * (of_score - ring.by_row(mean_bar, scores.shape))
    total = ring.added_product(total, of_score.astype(q.dtype), k, interpret=interpret)
    ring.release(scratch.free, slot)
    return total


def _key_kernel(*refs: Any, group: int, interpret: Any) -> None:
    num_arrays = 3 + len(Problem._fields)
    lists: Any = block_lists.BlockLists(*refs[:3])
    arrays: Any = Problem(*refs[3:num_arrays])
    k_bar, v_bar = refs[num_arrays : num_arrays + 2]
    scratch = _KeyScratch(*refs[num_arrays + 2 :])
    row, kv_head, block = (lax.axis_index(name) for name in ("row", "head", "block"))
    warpgroup = lax.axis_index(ring.AXIS)
    # Every partner block comes once for each query head of the group.
    num_whole = lists.num_whole[row, block] * group
    num_steps = lists.num_partners[row, block] * group
    first_key = block * ring.BLOCK + warpgroup * ring.ROWS
    keys = pl.ds(first_key, ring.ROWS)
    own, k, v = (scratch_of.at[warpgroup] for scratch_of in (scratch.own, scratch.k, scratch.v))

    def first_query(step: jax.Array) -> jax.Array:
        return lists.partners[row, block, lax.div(step, jnp.int32(group))] * PARTNER_BLOCK

    def copy(step: jax.Array) -> None:
        queries = pl.ds(first_query(step), PARTNER_BLOCK)
        head, slot = kv_head * group + lax.rem(step, jnp.int32(group)), ring.slot_of(step)
        for source, into in (
            (arrays.q.at[row, queries, head], scratch.q),
            (arrays.out_bar.at[row, queries, head], scratch.out_bar),
            (arrays.log_normaliser.at[row, head, queries], scratch.log_normaliser),
            (arrays.mean_bar.at[row, head, queries], scratch.mean_bar),
        ):
            plgpu.copy_gmem_to_smem(source, into.at[slot], scratch.loaded.at[slot])

    plgpu.copy_gmem_to_smem(arrays.k.at[row, keys, kv_head], k, own)
    plgpu.copy_gmem_to_smem(arrays.v.at[row, keys, kv_head], v, own)
    plgpu.copy_gmem_to_smem(arrays.subtree_end.at[row, keys], scratch.ends.at[warpgroup], own)
    ring.start(copy, num_steps)
    plgpu.barrier_wait(own)

    def step(index: jax.Array, totals: _Totals, *, is_whole: bool) -> _Totals:
        first = (arrays.query_start[0] + first_query(index), first_key)
        return _key_step(
            scratch,
            ring.slot_of(index),
            totals,
            prefetch=lambda: ring.prefetch(copy, scratch.free, index, num_steps),
            first=None if is_whole else first,
            interpret=interpret,
        )

    zeros = ring.filled((ring.ROWS, k.shape[1]), 0.0)
    totals = _Totals(zeros, zeros)
    totals = lax.fori_loop(0, num_whole, functools.partial(step, is_whole=True), totals)
    totals = lax.fori_loop(num_whole, num_steps, functools.partial(step, is_whole=False), totals)
    k[...] = (totals.k_bar * (1.0 / math.sqrt(k.shape[1]))).astype(k.dtype)
    v[...] = totals.v_bar.astype(v.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(k, k_bar.at[row, keys, kv_head])
    plgpu.copy_smem_to_gmem(v, v_bar.at[row, keys, kv_head])
    plgpu.wait_smem_to_gmem(0)


def _key_step(
    scratch: _KeyScratch,
    slot: jax.Array,
    totals: _Totals,
    *,
    prefetch: Callable[[], None],
    first: tuple[jax.Array, jax.Array] | None,
    interpret: Any,
) -> _Totals:
    """One block of queries more; tiles are keys by queries. `first` as in `_query_step`."""
    warpgroup = lax.axis_index(ring.AXIS)
    k, v = scratch.k.at[warpgroup], scratch.v.at[warpgroup]
    q, out_bar = scratch.q.at[slot], scratch.out_bar.at[slot]
    plgpu.barrier_wait(scratch.loaded.at[slot])
    scores = ring.product(k, q.transpose((1, 0))) * (LOG2_E / math.sqrt(k.shape[1]))
    if first is not None:
        scores = ring.masked_scores(
            scores,
            first_query=first[0],
            first_key=first[1],
            ends=scratch.ends.at[warpgroup],
            query_axis=1,
        )
    prefetch()
    log_normaliser = ring.load_columns(scratch.log_normaliser.at[slot])
    probabilities = jnp.exp2(scores - ring.by_column(log_normaliser, scores.shape))
    probabilities_16 = probabilities.astype(k.dtype)
    v_bar = ring.added_product(totals.v_bar, probabilities_16, out_bar, interpret=interpret)
    of_score = ring.product(v, out_bar.transpose((1, 0)))
    # Loaded after the product: numbers that wait for one in registers would spill.
    mean_bar = ring.load_columns(scratch.mean_bar.at[slot])
    of_score = probabilities * (of_score - ring.by_column(mean_bar, scores.shape))
    k_bar = ring.added_product(totals.k_bar, of_score.astype(k.dtype), q, interpret=interpret)
    ring.release(scratch.free, slot)
    return _Totals(k_bar, v_bar)
