"""What the attention kernels share: a ring of slots in shared memory, and products of tiles.

A thread block is two warpgroups of 64 rows each, which walk through the same partner blocks. Step
`s` uses slot ``s % NUM_SLOTS`` of the ring: warpgroup 0 starts the copies for a step one step ahead
(`start`, `prefetch`), a barrier a slot says that they have arrived, another that both warpgroups
are done with what stood there.

There is no third warpgroup that only loads. It would pay if the others could take its registers,
but ptxas, as jax's wheels call it (nvJitLink of CUDA 13.5), ignores ``setmaxnreg``: three
warpgroups have 168 registers a thread, two have 255, and these kernels take up to 238.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

plgpu: Any = mosaic_gpu  # types are checked with jax 0.10, whose signatures are older

ROWS = 64  # rows of a warpgroup: those of one wgmma
NUM_WARPGROUPS = 2
BLOCK = NUM_WARPGROUPS * ROWS  # tokens that a thread block owns
NUM_SLOTS = 2
AXIS = "warpgroup"


def tile(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory for 16-bit operands of wgmma, in the 128-byte swizzle that TMA writes."""
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def kernel(
    body: Callable[..., None],
    *,
    name: str,
    out_type: Any,
    scratch_types: Any,
    grid: tuple[int, int, int],
    interpret: Any,
) -> Callable[..., Any]:
    """`body` as a function of arrays, run by a thread block for every head, block and row."""
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch_types,
        grid=grid,
        grid_names=("head", "block", "row"),  # heads first: those of a group share keys in L2
        num_threads=NUM_WARPGROUPS,
        thread_name=AXIS,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name=name,
        interpret=plgpu.InterpretGPUParams() if interpret is True else interpret,
    )


def own(num_copies: int) -> Any:
    """A barrier a warpgroup, for `num_copies` copies of what only it reads."""
    return plgpu.Barrier(num_arrivals=num_copies, num_barriers=NUM_WARPGROUPS)


def loaded(num_copies: int) -> Any:
    """A barrier a slot, for the `num_copies` copies into it."""
    return plgpu.Barrier(num_arrivals=num_copies, num_barriers=NUM_SLOTS)


def free() -> Any:
    """A barrier a slot, at which each warpgroup arrives when it is done with the slot."""
    return plgpu.Barrier(num_arrivals=NUM_WARPGROUPS, num_barriers=NUM_SLOTS)


def slot_of(step: jax.Array) -> jax.Array:
    """The slot that a step uses."""
    return lax.rem(step, jnp.int32(NUM_SLOTS))


def start(copy: Callable[[jax.Array], None], num_steps: jax.Array) -> None:
    """Start the copies of the steps for which there are slots before any is used up."""
    for step in range(NUM_SLOTS - 1):

        @pl.when((lax.axis_index(AXIS) == 0) & (step < num_steps))
        def _(step: int = step) -> None:
            copy(jnp.int32(step))


def prefetch(
    copy: Callable[[jax.Array], None], free: Any, step: jax.Array, num_steps: jax.Array
) -> None:
    """Start, during `step`, the copies into the slot of the step before it."""
    ahead = step + (NUM_SLOTS - 1)

    @pl.when((lax.axis_index(AXIS) == 0) & (ahead < num_steps))
    def _() -> None:
        @pl.when(step > 0)
        def _() -> None:
            plgpu.barrier_wait(free.at[slot_of(ahead)])

        copy(ahead)


def release(free: Any, slot: jax.Array) -> None:
    """This warpgroup is done with the slot, numbers that it loaded from it into registers too."""
    plgpu.commit_smem()  # without it, copies by TMA might overtake such loads
    plgpu.barrier_arrive(free.at[slot])


def product(left: Any, right: Any) -> jax.Array:
    """``left @ right`` in float32 registers, waited for; `right` and perhaps `left` in SMEM."""

    def multiply(accumulator: Any) -> jax.Array:
        plgpu.wgmma(accumulator, left, right)
        return accumulator[...]

    shape = (left.shape[0], right.shape[1])
    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def added_product(total: jax.Array, left: jax.Array, right: Any, *, interpret: Any) -> jax.Array:
    """``total + left @ right`` for `left` in registers and `right` in SMEM, waited for."""
    if interpret:  # the interpreter of jax 0.12.0 takes both sides of wgmma from SMEM only
        return total + jnp.dot(left, right[...], preferred_element_type=jnp.float32)

    def multiply(accumulator: Any) -> None:
        plgpu.wgmma(accumulator, left, right)

    return pl.run_state(multiply)(plgpu.ACC.init(total))


def filled(shape: tuple[int, ...], value: float) -> jax.Array:
    """A float32 constant in registers: a tile, or one number for every row of a tile."""
    layout = plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1)
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def load_rows(smem: Any) -> jax.Array:
    """One number for every row of a tile, from shared memory."""
    return plgpu.load(smem, layout=plgpu.Layout.WGMMA.reduce(1))


def load_columns(smem: Any) -> jax.Array:
    """One number for every column of a tile, from shared memory."""
    return plgpu.load(smem, layout=plgpu.Layout.WGMMA.reduce(0))


def by_row(numbers: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """One number for every row, repeated along it."""
    return lax.broadcast_in_dim(numbers, shape, (0,))


def by_column(numbers: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """One number for every column, repeated down it."""
    return lax.broadcast_in_dim(numbers, shape, (1,))


def masked_scores(
    scores: jax.Array, *, first_query: jax.Array, first_key: jax.Array, ends: Any, query_axis: int
) -> jax.Array:
    """Scores, -inf where the query does not see the key.

    Indices are counted from the token of the first column, so that a thread holds two of them, one
    for each of its rows, and columns are constants of the code: whole indices would spill.

    Args:
        scores: queries by keys, or keys by queries.
        first_query: index in the row of the first query.
        first_key: of the first key.
        ends: subtree ends of the keys, in shared memory.
        query_axis: which axis of `scores` runs over queries.
    """
    first_row, first_column = (first_query, first_key)[:: 1 if query_axis == 0 else -1]
    by_rows = plgpu.Layout.WGMMA.reduce(1)
    row = plgpu.broadcasted_iota(jnp.int32, scores.shape[:1], 0, layout=by_rows)
    row = by_row(row + (first_row - first_column), scores.shape)
    column = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA)
    if query_axis == 0:
        query, key = row, column
        end = by_column(load_columns(ends) - first_column, scores.shape)
    else:
        query, key = column, row
        end = by_row(load_rows(ends) - first_column, scores.shape)
    return jnp.where((key <= query) & (query < end), scores, -jnp.inf)
