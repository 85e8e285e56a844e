"""The four kernels of `logprobs.py`, each beside the grid that it runs on.

Neighbouring thread blocks share ROW_BLOCKS blocks of rows (1,024 rows are 8 MiB at D 4,096, of 50
MiB of second-level cache) and walk the vocabulary together, so that the table comes from memory
once per 1,024 rows. Logits are kept to base 2, ``z log2 e``, as the hardware exponentiates. Thread
blocks of padding end at once; columns past the vocabulary are read as zeros, then masked.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu
from jaxtyping import Array, Float, Int

from codjax_kernels.gpu import products
from codjax_kernels.gpu.products import COLUMNS, HALF, ROW_LAYOUT, ROWS, STEP, WARPGROUPS

SPAN_TILES = 32  # tiles of the vocabulary a thread block: 2,048 rows and 151,936 columns are 304
SLICE_TILES = 4  # the same where derivatives are stored
SLICE_UNIT = SLICE_TILES * COLUMNS
ROW_BLOCKS = 8  # neighbours in the order of thread blocks

LOG2_E = math.log2(math.e)
LOWEST = -1e30  # logit of a column past the vocabulary; finite, because 0 * -inf is not a number

plgpu: Any = mosaic_gpu  # checked by its use: its types changed with jax 0.12


class PaddedRows(NamedTuple):
    """Rows in whole tiles; those from `num_valid` on never count."""

    hidden: Float[Array, "K D"]
    targets: Int[Array, " K"]
    scale: Float[Array, " K"]  # logits to base 2 are this times h . W_v
    num_valid: Int[Array, " 1"]


def statistics_of_spans(
    rows: PaddedRows, table: Float[Array, "V D"], *, vocab_size: int, interpret: Any
) -> Float[Array, "4 S K"]:
    """Maximum, sum, weighted sum and target logit of every row in each span, to base 2."""
    num_rows, width = rows.hidden.shape
    num_tiles = pl.cdiv(vocab_size, COLUMNS)
    num_spans = pl.cdiv(num_tiles, SPAN_TILES)

    def body(*references: Any, state: Any, **buffers: Any) -> None:
        hidden, table, targets, scale, num_valid, out = references
        first_row, span = _first_row(), lax.axis_index("across")
        own, half = _own_half(first_row), _own_half(0)
        first_column = span * (SPAN_TILES * COLUMNS)

        def consume(tile: Any, product: Array) -> None:
            # In two parts: there are not the registers for a function of the whole tile.
            for start in (0, COLUMNS // 2):
                part = product[:, start : start + COLUMNS // 2]
                add(first_column + tile * COLUMNS + start, part)

        def add(first: Any, product: Array) -> None:
            column = _columns(first, product)
            logits = product * _by_row(scale.at[own], product)
            logits = jnp.where(column < vocab_size, logits, LOWEST)
            is_target = column == _by_row(targets.at[own], product)
            target_logit = jnp.sum(jnp.where(is_target, logits, 0.0), axis=1)
            maximum, total, weighted, found = (
                plgpu.load(state.at[i, half], layout=ROW_LAYOUT) for i in range(4)
            )
            larger = jnp.maximum(maximum, jnp.max(logits, axis=1))
            shrink = jnp.exp2(maximum - larger)
            power = jnp.exp2(logits - lax.broadcast_in_dim(larger, logits.shape, (0,)))
            state[0, half] = larger
            state[1, half] = total * shrink + jnp.sum(power, axis=1)
            state[2, half] = weighted * shrink + jnp.sum(power * logits, axis=1)
            state[3, half] = found + target_logit

        @pl.when(first_row < num_valid[0])
        def _() -> None:
            # Between tiles the numbers stay in shared memory: registers are for the products.
            for i, value in enumerate((LOWEST, 0.0, 0.0, 0.0)):
                number = jnp.full((HALF,), value, jnp.float32)
                state[i, half] = plgpu.layout_cast(number, ROW_LAYOUT)
            products.tile_products(
                _logit_windows(hidden, table, first_row, first_column),
                consume,
                num_tiles=jnp.minimum(SPAN_TILES, num_tiles - span * SPAN_TILES),
                num_steps=width // STEP,
                transposed=(False, True),
                buffers=buffers,
            )
            plgpu.commit_smem()
            for i in range(4):
                plgpu.copy_smem_to_gmem(state.at[i, half], out.at[i, span, own])
            plgpu.wait_smem_to_gmem(0)

    kernel = _call(
        "statistics",
        body,
        jax.ShapeDtypeStruct((4, num_spans, num_rows), jnp.float32),
        grid=_row_grid(num_rows, num_spans),
        scratch={
            "state": plgpu.SMEM((4, ROWS), jnp.float32),
            **products.ring((ROWS, STEP), (COLUMNS, STEP)),
        },
        interpret=interpret,
    )
    return kernel(rows.hidden, table, rows.targets, rows.scale, rows.num_valid)


def derivatives(
    rows: PaddedRows,
    table: Float[Array, "V D"],
    factors: Float[Array, "4 K"],
    first: Int[Array, " 1"],
    *,
    vocab_size: int,
    length: int,
    interpret: Any,
) -> Float[Array, "K C"]:
    """Derivative of the loss by ``h . W_v``, bfloat16, for a slice of the vocabulary.

    With `z` the logit to base 2, ``2^(z - l) (of_all + of_logit z) + [v = y] of_target``. Tiles of
    padding are not written.

    Args:
        rows: as they count.
        table: all of it; rows past `vocab_size` are padding.
        factors: of each row `l`, `of_target`, `of_all` and `of_logit`.
        first: column at which the slice begins, a multiple of SLICE_UNIT.
        vocab_size: entries of the table that exist.
        length: columns of the slice, a multiple of SLICE_UNIT.
        interpret: parameters of the interpreter, or False.
    """
    num_rows, width = rows.hidden.shape

    def body(*references: Any, staged: Any, **buffers: Any) -> None:
        hidden, table, targets, scale, factors, first, num_valid, out = references
        first_row = _first_row()
        own = _own_half(first_row)
        first_entry = lax.axis_index("across") * SLICE_UNIT  # of the slice
        first_column = pl.multiple_of(first[0], SLICE_UNIT) + first_entry

        def consume(tile: Any, product: Array) -> None:
            def derivative(start: int, piece: Array) -> Array:
                column = _columns(first_column + tile * COLUMNS + start, piece)
                log_normaliser, of_target, of_all, of_logit = (
                    _by_row(factors.at[i, own], piece) for i in range(4)
                )
                logits = piece * _by_row(scale.at[own], piece)
                of_piece = jnp.exp2(logits - log_normaliser) * (of_all + of_logit * logits)
                is_target = column == _by_row(targets.at[own], piece)
                of_piece = jnp.where(is_target, of_piece + of_target, of_piece)
                return jnp.where(column < vocab_size, of_piece, 0.0)

            entries = pl.ds(first_entry + tile * COLUMNS, COLUMNS)
            products.store(product, staged, out.at[own, entries], derivative)

        @pl.when(first_row < num_valid[0])
        def _() -> None:
            products.tile_products(
                _logit_windows(hidden, table, first_row, first_column),
                consume,
                num_tiles=SLICE_TILES,
                num_steps=width // STEP,
                transposed=(False, True),
                buffers=buffers,
            )
            plgpu.wait_smem_to_gmem(0)

    kernel = _call(
        "derivatives",
        body,
        jax.ShapeDtypeStruct((num_rows, length), jnp.bfloat16),
        grid=_row_grid(num_rows, length // SLICE_UNIT),
        scratch={
            "staged": products.staging(COLUMNS, jnp.bfloat16),
            **products.ring((ROWS, STEP), (COLUMNS, STEP)),
        },
        interpret=interpret,
    )
    return kernel(rows.hidden, table, rows.targets, rows.scale, factors, first, rows.num_valid)


def times_table(
    derivatives: Float[Array, "K C"],
    table: Float[Array, "V D"],
    first: Int[Array, " 1"],
    num_valid: Int[Array, " 1"],
    *,
    interpret: Any,
) -> Float[Array, "K D"]:
    """Gradient of the hidden states through a slice, float32; tiles of padding are not written."""
    (num_rows, length), width = derivatives.shape, table.shape[1]

    def windows(references: Any, rows: Any, columns: Any, step: Any) -> tuple[Any, Any]:
        derivatives, table, first, _ = references
        start = pl.multiple_of(first[0], SLICE_UNIT) + step * STEP
        left = derivatives.at[pl.ds(rows, ROWS), pl.ds(step * STEP, STEP)]
        return left, table.at[pl.ds(start, STEP), columns]

    return _plain_product(
        "times_table",
        (derivatives, table, first, num_valid),
        windows,
        jax.ShapeDtypeStruct((num_rows, width), jnp.float32),
        is_transposed=False,
        is_needed=lambda rows, num_valid: rows < num_valid,
        num_steps=lambda num_valid: length // STEP,
        interpret=interpret,
    )


def times_hidden(
    derivatives: Float[Array, "K C"], rows: PaddedRows, *, interpret: Any
) -> Float[Array, "C D"]:
    """Gradient of a slice of the table, summed over the valid rows, bfloat16.

    What follows the valid rows in their last step must be 0.
    """

    def windows(references: Any, entries: Any, columns: Any, step: Any) -> tuple[Any, Any]:
        derivatives, hidden, _ = references
        rows = pl.ds(step * STEP, STEP)
        return derivatives.at[rows, pl.ds(entries, ROWS)], hidden.at[rows, columns]

    return _plain_product(
        "times_hidden",
        (derivatives, rows.hidden, rows.num_valid),
        windows,
        jax.ShapeDtypeStruct((derivatives.shape[1], rows.hidden.shape[1]), jnp.bfloat16),
        is_transposed=True,
        is_needed=lambda entries, num_valid: entries >= 0,
        num_steps=lambda num_valid: lax.div(num_valid + STEP - 1, STEP),
        interpret=interpret,
    )


def _plain_product(
    name: str,
    operands: tuple[Array, ...],
    windows: Callable[[Any, Any, Any, Any], tuple[Any, Any]],
    out: jax.ShapeDtypeStruct,
    *,
    is_transposed: bool,
    is_needed: Callable[[Any, Any], Any],
    num_steps: Callable[[Any], Any],
    interpret: Any,
) -> Array:
    """A product of matrices, a tile a thread block.

    Args:
        name: of the kernel.
        operands: in global memory; the last is `num_valid`.
        windows: (operands, first row of the tile, columns of the tile, step) → blocks.
        out: the product.
        is_transposed: whether left blocks are [STEP ROWS].
        is_needed: (first row of the tile, number of valid rows) → whether to compute the tile.
        num_steps: number of valid rows → steps of a tile.
        interpret: parameters of the interpreter, or False.
    """
    columns_of_tile = math.gcd(out.shape[1], COLUMNS)

    def body(*references: Any, staged: Any, **buffers: Any) -> None:
        *inputs, result = references
        rows = lax.axis_index("block") * ROWS
        columns = pl.ds(lax.axis_index("across") * columns_of_tile, columns_of_tile)
        num_valid = inputs[-1][0]

        def consume(tile: Any, product: Array) -> None:
            products.store(product, staged, result.at[_own_half(rows), columns])

        @pl.when(is_needed(rows, num_valid))
        def _() -> None:
            products.tile_products(
                lambda tile, step: windows(inputs, rows, columns, step),
                consume,
                num_tiles=1,
                num_steps=num_steps(num_valid),
                transposed=(is_transposed, False),
                buffers=buffers,
            )
            plgpu.wait_smem_to_gmem(0)

    left = (STEP, ROWS) if is_transposed else (ROWS, STEP)
    kernel = _call(
        name,
        body,
        out,
        grid={"block": out.shape[0] // ROWS, "across": out.shape[1] // columns_of_tile},
        scratch={
            "staged": products.staging(columns_of_tile, out.dtype),
            **products.ring(left, (STEP, columns_of_tile)),
        },
        interpret=interpret,
    )
    return kernel(*operands)


def _call(
    name: str,
    body: Callable[..., None],
    out: jax.ShapeDtypeStruct,
    *,
    grid: dict[str, int],
    scratch: dict[str, Any],
    interpret: Any,
) -> Callable[..., Array]:
    """The kernel `body` on this grid, the last axis of which runs fastest."""
    return plgpu.kernel(
        body,
        out_type=out,
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=2,
        thread_name=WARPGROUPS,
        # 2^x is one instruction, 2 units in the last place off.
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name=name,
        interpret=plgpu.InterpretGPUParams() if interpret is True else interpret,
    )


def _row_grid(num_rows: int, across: int) -> dict[str, int]:
    """Grid over blocks of rows, ROW_BLOCKS of them in turn for each of `across`."""
    num_blocks = num_rows // ROWS
    together = min(ROW_BLOCKS, num_blocks)
    return {"group": pl.cdiv(num_blocks, together), "across": across, "block": together}


def _first_row() -> Any:
    """First row of this thread block of a `_row_grid`; the last group may reach past the end."""
    return (lax.axis_index("group") * lax.axis_size("block") + lax.axis_index("block")) * ROWS


def _own_half(first_row: Any) -> Any:
    """Rows of this warpgroup in the tile that begins there."""
    return pl.ds(first_row + lax.axis_index(WARPGROUPS) * HALF, HALF)


def _logit_windows(
    hidden: Any, table: Any, first_row: Any, first_column: Any
) -> Callable[[Any, Any], tuple[Any, Any]]:
    """Blocks of the tiles of logits from there on, for `tile_products`."""

    def windows(tile: Any, step: Any) -> tuple[Any, Any]:
        entries = pl.ds(step * STEP, STEP)
        columns = pl.ds(first_column + tile * COLUMNS, COLUMNS)
        return hidden.at[pl.ds(first_row, ROWS), entries], table.at[columns, entries]

    return windows


def _by_row(reference: Any, like: Array) -> Array:
    """Numbers of each row from global memory, beside every column of the tile."""
    numbers = plgpu.load(reference, layout=ROW_LAYOUT, optimized=False)
    return lax.broadcast_in_dim(numbers, like.shape, (0,))


def _columns(first: Any, like: Array) -> Array:
    """Column of every entry of the tile."""
    return plgpu.broadcasted_iota(jnp.int32, like.shape, 1, layout=plgpu.Layout.WGMMA) + first
