"""The backward pass that reads the logits back instead of computing them again.

`stored_statistics` has left the products of a block of rows in main memory, so that two matrix
products remain, and both take the same ``dz``. One kernel does both: a block of the table stays
while the rows pass by, float32 sums of the hidden gradient of *all* these rows stay in vector
memory until the last block of the table, and the table's gradient is added to a float32 total that
lies where it lay. Of more rows than the vector memory has room for, groups are done in turn. Main
memory sees 4 bytes of each logit, once written and once read, and 8 of each element of the total:
with 1,024 rows of width 1,024 that takes v5e four fifths of the time of the three products, and
v6e almost twice that time, so that v6e wants more rows or a wider table.

Where two cores share a chip (v5p), each takes half of the table, and the halves of the hidden
gradient are added afterwards.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from codjax_kernels.records import LogitGradient, Rows
from codjax_kernels.tpu import blocks as tuned
from codjax_kernels.tpu import launch, tiles
from codjax_kernels.tpu.launch import Interpret, Problem, scratch
from codjax_kernels.tpu.tiles import Ref, Shape


def stored_gradients(
    rows: Rows,
    table: Float[Array, "V D"],
    stored: Float[Array, "V lanes"],
    gradient: LogitGradient,
    total: Float[Array, "V D"],
    *,
    interpret: Interpret = False,
    blocks: tuned.Blocks | None = None,
) -> tuple[Float[Array, "K D"], Float[Array, "V D"]]:
    """Gradient of the hidden states, and `total` with that of the table.

    Args:
        rows: as `stored_statistics` had them.
        table: likewise.
        stored: what it made of them.
        gradient: derivative by the logits.
        total: gradient of the table so far, float32; its memory is used again.
        interpret: as `pallas_call` takes it.
        blocks: instead of the tuned ones.
    """
    blocks = blocks or launch.tuned_blocks(table, interpret=interpret).stored_gradients
    given = launch.problem(rows, table, blocks, interpret=interpret)
    shape = given.shape
    bars = launch.bars(given, gradient)
    resident = given.chip.resident_bytes // (4 * shape.width * shape.blocks.rows)
    parts = []
    for first in range(0, shape.num_row_blocks, max(resident, 1)):
        count = min(max(resident, 1), shape.num_row_blocks - first)
        part, total = _of_row_blocks(given, rows, table, stored, bars, total, first, count)
        parts.append(part)
    hidden_bar = jnp.concatenate(parts) if len(parts) > 1 else parts[0]
    return hidden_bar[: shape.num_rows].astype(rows.hidden.dtype), total


def _of_row_blocks(  # noqa: PLR0917
    given: Problem,
    rows: Rows,
    table: Array,
    stored: Array,
    bars: Array,
    total: Array,
    first: int,
    count: int,
) -> tuple[Array, Array]:
    """Gradients from `count` blocks of rows, whose hidden gradients stay in vector memory."""
    shape, block = given.shape, given.shape.blocks
    num_cores = min(given.chip.num_cores, shape.num_vocab_blocks)
    a_core = pl.cdiv(shape.num_vocab_blocks, num_cores)
    here = jnp.clip(given.num_row_blocks - first, 0, count) if rows.num_valid is not None else count

    def table_block(core, turn):  # type: ignore[no-untyped-def]
        return jnp.minimum(core * a_core + turn, shape.num_vocab_blocks - 1)

    of_table = pl.BlockSpec((block.vocab, shape.width), lambda c, j, i: (table_block(c, j), 0))
    of_stored = pl.BlockSpec(
        (block.vocab, block.rows), lambda c, j, i: (table_block(c, j), first + i)
    )
    operands = launch.operands(
        given, [(rows.hidden, table)], bars, lambda c, j, i: (first + i, table_block(c, j))
    )
    # Only the last turn has something to write; before it the block stays the first, unwritten.
    of_hidden_bar = pl.BlockSpec(
        (1, block.rows, shape.width), lambda c, j, i: (c, jnp.where(j == a_core - 1, i, 0), 0)
    )
    dtype = rows.hidden.dtype if num_cores == 1 else jnp.float32
    part, total = launch.launch(
        given,
        functools.partial(_kernel, shape=shape, first=first, a_core=a_core),
        name="logprob_stored_gradients",
        grid=(num_cores, a_core, here),
        operands=[*operands, (stored, of_stored), (total, of_table)],
        results=[
            (
                jax.ShapeDtypeStruct((num_cores, count * block.rows, shape.width), dtype),
                of_hidden_bar,
            ),
            (jax.ShapeDtypeStruct(total.shape, jnp.float32), of_table),
        ],
        memory=[
            scratch(block.vocab, block.rows, dtype=rows.hidden.dtype),
            scratch(count, block.rows, shape.width),
            *(
                [scratch(block.rows, shape.width, dtype=rows.hidden.dtype)]
                if shape.is_padded
                else []
            ),
        ],
        products=2,
        aliases={len(operands) + 1: 1},
    )
    return (part[0] if num_cores == 1 else jnp.sum(part, axis=0)), total


def _kernel(*refs: Ref, shape: Shape, first: int, a_core: int) -> None:
    given, (stored, total, hidden_bar, new_total, *memory) = launch.operands_of(refs, shape)
    logit_bars, hidden_total, *cleared = memory
    turn, row_block = pl.program_id(1), pl.program_id(2)
    block = pl.program_id(0) * a_core + turn
    (hidden,), (table,) = given.hiddens, given.tables
    sums = hidden_total.at[row_block]
    if shape.is_padded:
        rows_here = given.num_valid[0] - (first + row_block) * shape.blocks.rows
        cleared[0][...] = tiles.existing(hidden[...], rows_here)
        hidden = cleared[0]

    @pl.when(turn == 0)
    def _() -> None:
        sums[...] = jnp.zeros(sums.shape, jnp.float32)

    @pl.when((row_block == 0) & (block < shape.num_vocab_blocks))
    def _() -> None:
        new_total[...] = total[...]

    def of_block(num_lines: int) -> None:
        (lines,) = tiles.pieces(num_lines, shape.blocks.vocab)
        along_table = tiles.pieces(num_lines, shape.blocks.piece)

        def make(index: int) -> None:
            piece = along_table[index]
            tile_first = block * shape.blocks.vocab + piece.begin
            products = stored.at[piece.span, :]
            tile = given.tile(products, piece, first=tile_first)
            out = logit_bars.at[piece.span, :]
            assert given.bars is not None
            given.bars.put(tile, None, out, may_be_nan=shape.is_padded)

        def use(index: int) -> None:
            span = along_table[index].span
            new_total[span, :] += tiles.product(logit_bars[span, :], hidden[...], (1, 0))

        tiles.in_turns(len(along_table), make, use)
        for piece in tiles.pieces(shape.blocks.rows, shape.blocks.piece):
            sums[piece.span, :] += tiles.product(
                logit_bars[lines.span, piece.span], tiles.table_lines(table, lines), (0, 0)
            )

    # The last core may have a turn more than there are blocks.
    pl.when(block < shape.num_vocab_blocks)(lambda: tiles.over_table(shape, block, of_block))

    @pl.when(turn == a_core - 1)
    def _() -> None:
        hidden_bar[0] = sums[...].astype(hidden_bar.dtype)
