"""Products of tiles on one Hopper thread block: what the logprob kernels have in common.

A thread block is two warpgroups, which multiply 64 rows each of a tile of 128 x `columns`. Blocks
of the operands come into a ring of slots in shared memory: step `s` uses slot ``s % SLOTS``, and
warpgroup 0 starts the copies for step ``s + SLOTS - 1`` before it goes on to the next step, also
across the ends of tiles. One barrier a slot says that its copies have arrived, another that both
warpgroups are done with it.

A step of 128 x 256 x 64 takes 48 KiB of copies for 4.2 MFLOP, 85 operations a byte. There is no
third warpgroup that only copies: ptxas ignores ``setmaxnreg`` as jax's wheels call it
(for linking), and a thread of three warpgroups would have 168 registers, one of two has 255; the
accumulator alone takes 128.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

plgpu: Any = mosaic_gpu  # checked by its use: its types changed with jax 0.12

ROWS = 128  # of a tile
HALF = 64  # rows of each warpgroup
STEP = 64  # entries of the contracted axis in a step: 128 bytes, the widest swizzle
COLUMNS = 256  # of a tile at most: the widest wgmma
SLOTS = 4  # of the ring: 192 KiB of the 227 that a thread block can have

WARPGROUPS = "warpgroup"  # name of the axis over the two
ROW_LAYOUT = plgpu.Layout.WGMMA.reduce(1)  # one number a row, as an accumulator keeps its rows


def blocks(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
    """Shared memory for blocks, laid out as copies write them and wgmma reads them."""
    width = 128 // jnp.dtype(dtype).itemsize
    transforms = (plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def ring(left: tuple[int, int], right: tuple[int, int]) -> dict[str, Any]:
    """Scratch of `tile_products`: slots for blocks of these shapes, and their barriers."""
    return {
        "left": blocks(SLOTS, *left),
        "right": blocks(SLOTS, *right),
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS),  # of the two copies
        "free": plgpu.Barrier(num_arrivals=2, num_barriers=SLOTS),  # of the two warpgroups
    }


def staging(columns: int, dtype: Any) -> Any:
    """Scratch of `store` for results of this width: at most 16 KiB a warpgroup."""
    width = min(columns, 256 // jnp.dtype(dtype).itemsize)
    return blocks(2, HALF, width, dtype=dtype)


def store(
    product: jax.Array,
    staged: Any,
    destination: Any,
    result: Callable[[int, jax.Array], jax.Array] = lambda start, piece: piece,
) -> None:
    """Start to write this warpgroup's half of a tile to global memory.

    Before the kernel ends, `plgpu.wait_smem_to_gmem(0)` must see the last piece written.

    Args:
        product: what `tile_products` hands over.
        staged: the scratch of `staging`.
        destination: where it goes, of the shape of `product`.
        result: (first column, piece of the product) → what is written in its place. A piece at a
            time, because registers hold little more than the product.
    """
    own = staged.at[lax.axis_index(WARPGROUPS)]
    width = staged.shape[2]
    for start in range(0, product.shape[1], width):
        columns = slice(start, start + width)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the piece before has left
        own[...] = result(start, product[:, columns]).astype(staged.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(own, destination.at[:, columns])


def tile_products(
    windows: Callable[[Any, Any], tuple[Any, Any]],
    consume: Callable[[Any, jax.Array], None],
    *,
    num_tiles: Any,
    num_steps: Any,
    transposed: tuple[bool, bool],
    buffers: dict[str, Any],
) -> None:
    """Multiply `num_tiles` tiles one after the other, each summed over `num_steps` blocks.

    Args:
        windows: (tile, step) → left and right block in global memory, [ROWS STEP] and
            [STEP columns] unless transposed.
        consume: called by each warpgroup with the tile's number and its half of the product,
            float32 [HALF columns] in registers.
        num_tiles: tiles of this thread block.
        num_steps: steps of each; may be 0, then products are 0.
        transposed: whether left blocks are [STEP ROWS], and whether right ones are [columns STEP].
        buffers: the scratch of `ring`, for blocks of these shapes.
    """
    left, right, full, free = (buffers[name] for name in ("left", "right", "full", "free"))
    total = jnp.int32(num_tiles * num_steps)
    is_copying = lax.axis_index(WARPGROUPS) == 0

    def copy(count: Any) -> None:
        slot = lax.rem(count, jnp.int32(SLOTS))
        tile = lax.div(count, jnp.int32(num_steps))
        left_window, right_window = windows(tile, count - tile * num_steps)
        plgpu.copy_gmem_to_smem(left_window, left.at[slot], full.at[slot])
        plgpu.copy_gmem_to_smem(right_window, right.at[slot], full.at[slot])

    def copy_ahead(count: Any) -> None:
        @pl.when(is_copying & (count < total))
        def _() -> None:
            @pl.when(count >= SLOTS)
            def _() -> None:
                plgpu.barrier_wait(free.at[lax.rem(count, jnp.int32(SLOTS))])

            copy(count)

    for count in range(SLOTS - 1):
        pl.when(is_copying & (count < total))(functools.partial(copy, jnp.int32(count)))

    @pl.loop(0, num_tiles)
    def _(tile: Any) -> None:
        first = tile * num_steps
        consume(tile, _product(first, num_steps, copy_ahead, transposed=transposed, **buffers))


def _product(
    first: Any,
    num_steps: Any,
    copy_ahead: Callable[[Any], None],
    *,
    transposed: tuple[bool, bool],
    left: Any,
    right: Any,
    full: Any,
    free: Any,
) -> jax.Array:
    """This warpgroup's half of the tile whose blocks come `first` and after."""
    half = pl.ds(lax.axis_index(WARPGROUPS) * HALF, HALF)

    def release(count: Any) -> None:
        plgpu.barrier_arrive(free.at[lax.rem(count, jnp.int32(SLOTS))])

    def accumulate(accumulator: Any) -> jax.Array:
        @pl.loop(0, num_steps)
        def _(step: Any) -> None:
            count = first + step
            slot = lax.rem(count, jnp.int32(SLOTS))
            plgpu.barrier_wait(full.at[slot])
            rows = left.at[slot, :, half] if transposed[0] else left.at[slot, half]
            plgpu.wgmma(
                accumulator,
                rows.transpose((1, 0)) if transposed[0] else rows,
                right.at[slot].transpose((1, 0)) if transposed[1] else right.at[slot],
            )
            # One product stays in flight; the one before it has read its blocks.
            plgpu.wgmma_wait(1)
            pl.when(step > 0)(lambda: release(count - 1))
            copy_ahead(count + SLOTS - 1)

        product = accumulator[...]  # waits for the last one
        pl.when(num_steps > 0)(lambda: release(first + num_steps - 1))
        return product

    columns = right.shape[1] if transposed[1] else right.shape[2]
    return pl.run_scoped(accumulate, plgpu.ACC((HALF, columns), jnp.float32))
