"""The forward pass of `attention.py`: weighted means of values, and log-normalisers.

A thread block owns `ring.BLOCK` queries of one head, half of them to each warpgroup. For every
partner block of keys: scores → mask → running maximum and sum → running mean of values. Exponents
are to base 2, the base of the hardware.
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

KEY_BLOCK = 128
LOG2_E = math.log2(math.e)
# Below all scores, and finite: the maximum of a query that has seen nothing yet, without a nan.
LOWEST = -1e30


class _Arrays(NamedTuple):
    """What lies in global memory."""

    partners: Any
    num_whole: Any
    num_partners: Any
    query_start: Any
    q: Any
    k: Any
    v: Any
    ends: Any
    out: Any
    log_normaliser: Any


class _Scratch(NamedTuple):
    """What lies in shared memory."""

    q: Any
    k: Any
    v: Any
    ends: Any
    log_normaliser: Any
    q_loaded: Any
    k_loaded: Any
    v_loaded: Any
    free: Any


class _State(NamedTuple):
    """What a query has seen so far; scores are scaled and to base 2."""

    highest: jax.Array
    total: jax.Array  # of 2 ** (score - highest)
    mean: jax.Array  # times total


def forward(
    q: Float[Array, "B Q N H"],
    k: Float[Array, "B T M H"],
    v: Float[Array, "B T M H"],
    *,
    subtree_end: Int[Array, "B T"],
    query_start: Int[Array, ""],
    num_queries: int,
    interpret: Any,
) -> tuple[Float[Array, "B Q N H"], Float[Array, "B N Q"]]:
    """Weighted means of values and, to base 2, log-normalisers of the scaled scores.

    Args:
        q: queries; a whole number of blocks, as all lengths here.
        k: keys.
        v: values.
        subtree_end: 0 for padding.
        query_start: index of the first query in its row.
        num_queries: those before the padding.
        interpret: as in `attention.forest_attention`.
    """
    num_rows, padded_queries, num_heads, head_size = q.shape
    visible = block_lists.visible_blocks(
        subtree_end, query_start, num_queries, query_block=ring.BLOCK, key_block=KEY_BLOCK
    )
    run = ring.kernel(
        functools.partial(_kernel, group=num_heads // k.shape[2], interpret=interpret),
        name="forest_attention_forward",
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((num_rows, num_heads, padded_queries), jnp.float32),
        ),
        scratch_types=_Scratch(
            q=ring.tile((ring.NUM_WARPGROUPS, ring.ROWS, head_size), q.dtype),
            k=ring.tile((ring.NUM_SLOTS, KEY_BLOCK, head_size), q.dtype),
            v=ring.tile((ring.NUM_SLOTS, KEY_BLOCK, head_size), q.dtype),
            ends=plgpu.SMEM((ring.NUM_SLOTS, KEY_BLOCK), jnp.int32),
            log_normaliser=plgpu.SMEM((ring.NUM_WARPGROUPS, ring.ROWS), jnp.float32),
            q_loaded=ring.own(1),
            k_loaded=ring.loaded(2),
            v_loaded=ring.loaded(1),
            free=ring.free(),
        ),
        grid=(num_heads, padded_queries // ring.BLOCK, num_rows),
        interpret=interpret,
    )
    lists = block_lists.block_lists(visible)
    return run(*lists, query_start.reshape(1), q, k, v, subtree_end)


def _kernel(*refs: Any, group: int, interpret: Any) -> None:
    num_arrays = len(_Arrays._fields)
    arrays, scratch = _Arrays(*refs[:num_arrays]), _Scratch(*refs[num_arrays:])
    row, head = lax.axis_index("row"), lax.axis_index("head")
    # Later blocks have more ancestors: they start first, so that none of them ends last.
    block = arrays.num_partners.shape[1] - 1 - lax.axis_index("block")
    warpgroup = lax.axis_index(ring.AXIS)
    num_whole, num_partners = arrays.num_whole[row, block], arrays.num_partners[row, block]
    first = block * ring.BLOCK + warpgroup * ring.ROWS
    queries = pl.ds(first, ring.ROWS)
    q, log_normaliser = scratch.q.at[warpgroup], scratch.log_normaliser.at[warpgroup]

    def copy(step: jax.Array) -> None:
        keys = pl.ds(arrays.partners[row, block, step] * KEY_BLOCK, KEY_BLOCK)
        kv_head, slot = lax.div(head, jnp.int32(group)), ring.slot_of(step)
        loaded = scratch.k_loaded.at[slot]
        plgpu.copy_gmem_to_smem(arrays.k.at[row, keys, kv_head], scratch.k.at[slot], loaded)
        plgpu.copy_gmem_to_smem(arrays.ends.at[row, keys], scratch.ends.at[slot], loaded)
        loaded = scratch.v_loaded.at[slot]
        plgpu.copy_gmem_to_smem(arrays.v.at[row, keys, kv_head], scratch.v.at[slot], loaded)

    def step(index: jax.Array, state: _State, *, is_whole: bool) -> _State:
        first_query = arrays.query_start[0] + first
        first_key = arrays.partners[row, block, index] * KEY_BLOCK
        return _step(
            scratch,
            ring.slot_of(index),
            state,
            prefetch=lambda: ring.prefetch(copy, scratch.free, index, num_partners),
            first=None if is_whole else (first_query, first_key),
            interpret=interpret,
        )

    loaded = scratch.q_loaded.at[warpgroup]
    plgpu.copy_gmem_to_smem(arrays.q.at[row, queries, head], q, loaded)
    ring.start(copy, num_partners)
    plgpu.barrier_wait(loaded)
    state = _State(
        highest=ring.filled((ring.ROWS,), LOWEST),
        total=ring.filled((ring.ROWS,), 0.0),
        mean=ring.filled((ring.ROWS, q.shape[1]), 0.0),
    )
    state = lax.fori_loop(0, num_whole, functools.partial(step, is_whole=True), state)
    state = lax.fori_loop(num_whole, num_partners, functools.partial(step, is_whole=False), state)

    # A query that sees nothing has a total of 0 and a mean of 0.
    total = jnp.maximum(state.total, jnp.finfo(jnp.float32).tiny)
    q[...] = (state.mean * ring.by_row(1.0 / total, state.mean.shape)).astype(q.dtype)
    log_normaliser[...] = state.highest + jnp.log(total) * LOG2_E
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q, arrays.out.at[row, queries, head])
    plgpu.copy_smem_to_gmem(log_normaliser, arrays.log_normaliser.at[row, head, queries])
    plgpu.wait_smem_to_gmem(0)


def _step(
    scratch: _Scratch,
    slot: jax.Array,
    state: _State,
    *,
    prefetch: Callable[[], None],
    first: tuple[jax.Array, jax.Array] | None,
    interpret: Any,
) -> _State:
    """One block of keys more; `first` query and key of the block, or None where all are seen."""
    q = scratch.q.at[lax.axis_index(ring.AXIS)]
    plgpu.barrier_wait(scratch.k_loaded.at[slot])
    scores = ring.product(q, scratch.k.at[slot].transpose((1, 0)))
    scores *= LOG2_E / math.sqrt(q.shape[1])
    if first is not None:
        scores = ring.masked_scores(
            scores,
            first_query=first[0],
            first_key=first[1],
            ends=scratch.ends.at[slot],
            query_axis=0,
        )
    prefetch()

    highest = jnp.maximum(state.highest, scores.max(axis=1))
    kept = jnp.exp2(state.highest - highest)
    weights = jnp.exp2(scores - ring.by_row(highest, scores.shape))
    total = state.total * kept + weights.sum(axis=1)
    mean = state.mean * ring.by_row(kept, state.mean.shape)

    plgpu.barrier_wait(scratch.v_loaded.at[slot])
    weights_16 = weights.astype(q.dtype)
    mean = ring.added_product(mean, weights_16, scratch.v.at[slot], interpret=interpret)
    ring.release(scratch.free, slot)
    return _State(highest, total, mean)
