"""Backward passes that compute the logits again.

With ``dz_v = p_v (a + b z_v) + [v = y] g`` (`tiles.Bars`):

    hidden_bar = sum_v dz_v W_v    rows stay, the table passes by; float32 sums of a block of rows
    table_bar = sum_k dz_v h_k     the table stays, rows pass by; float32 sums of a block of it

Each is a kernel of two products, logits included, that keeps its sums in vector memory and writes
them once, rounded; nothing but the results is in main memory. One kernel for both would save a
product and read and write float32 sums of table gradient instead, 4 V D bytes of main memory.
`dz` is rounded to the dtype of the operands, as the matrix units take it.
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

Stream = tuple[Array, Array]  # hidden states [K D] and their table [V D]


def gradients(
    rows: Rows, table: Float[Array, "V D"], gradient: LogitGradient, *, interpret: Interpret = False
) -> tuple[Float[Array, "K D"], Float[Array, "V D"]]:
    """Gradients of hidden states and table."""
    hidden_bar = hidden_gradient(rows, table, gradient, interpret=interpret)
    return hidden_bar, table_gradient(rows, table, gradient, interpret=interpret)


def hidden_gradient(
    rows: Rows,
    table: Float[Array, "V D"],
    gradient: LogitGradient,
    *,
    interpret: Interpret = False,
    blocks: tuned.Blocks | None = None,
) -> Float[Array, "K D"]:
    """Gradient of the hidden states."""
    blocks = blocks or launch.tuned_blocks(table, interpret=interpret).hidden
    given = launch.problem(rows, table, blocks, interpret=interpret)
    return to_hidden(given, [(rows.hidden, table)], launch.bars(given, gradient))


def table_gradient(
    rows: Rows,
    table: Float[Array, "V D"],
    gradient: LogitGradient,
    *,
    interpret: Interpret = False,
    blocks: tuned.Blocks | None = None,
) -> Float[Array, "V D"]:
    """Gradient of the table, summed over all rows in float32 and rounded once."""
    blocks = blocks or launch.tuned_blocks(table, interpret=interpret).table
    given = launch.problem(rows, table, blocks, interpret=interpret)
    return to_table(given, [(rows.hidden, table)], launch.bars(given, gradient))


def to_hidden(given: Problem, streams: list[Stream], bars: Array) -> Float[Array, "K D"]:
    """Gradient of the hidden states of the first stream.

    Args:
        given: the problem.
        streams: what makes the logits and, where there is a second, those of the teacher.
        bars: as `launch.bars` makes them.
    """
    shape, block = given.shape, given.shape.blocks
    hidden = streams[0][0]
    of_rows = pl.BlockSpec((block.rows, shape.width), lambda i, j: (i, 0))
    (hidden_bar,) = launch.launch(
        given,
        functools.partial(_hidden_kernel, shape=shape, num_streams=len(streams)),
        name="logprob_hidden_gradient",
        grid=(given.num_row_blocks, shape.num_vocab_blocks),
        operands=launch.operands(given, streams, bars, lambda i, j: (i, j)),
        results=[(jax.ShapeDtypeStruct(hidden.shape, hidden.dtype), of_rows)],
        memory=[
            *[scratch(2, block.vocab, block.piece)] * len(streams),
            scratch(2, block.vocab, block.piece, dtype=hidden.dtype),
            scratch(block.rows, shape.width),
        ],
        products=1 + len(streams),
    )
    return hidden_bar


def to_table(given: Problem, streams: list[Stream], bars: Array) -> Float[Array, "V D"]:
    """Gradient of the table of the first stream; arguments as for `to_hidden`."""
    shape, block = given.shape, given.shape.blocks
    table = streams[0][1]
    of_table = pl.BlockSpec((block.vocab, shape.width), lambda j, i: (j, 0))
    cleared = [scratch(block.rows, shape.width, dtype=table.dtype)] if shape.is_padded else []
    (table_bar,) = launch.launch(
        given,
        functools.partial(_table_kernel, shape=shape, num_streams=len(streams)),
        name="logprob_table_gradient",
        grid=(shape.num_vocab_blocks, given.num_row_blocks),
        operands=launch.operands(given, streams, bars, lambda j, i: (i, j)),
        results=[(jax.ShapeDtypeStruct(table.shape, table.dtype), of_table)],
        memory=[
            *[scratch(2, block.piece, block.rows)] * len(streams),
            scratch(2, block.piece, block.rows, dtype=table.dtype),
            scratch(block.vocab, shape.width),
            *cleared,
        ],
        products=1 + len(streams),
    )
    return table_bar


def _hidden_kernel(*refs: Ref, shape: Shape, num_streams: int) -> None:
    given, (hidden_bar, *memory) = launch.operands_of(refs, shape, num_streams)
    products, (logit_bars, total) = memory[:num_streams], memory[num_streams:]
    block = pl.program_id(1)

    @pl.when(block == 0)
    def _() -> None:
        total[...] = jnp.zeros(total.shape, jnp.float32)

    def of_block(num_lines: int) -> None:
        (lines,) = tiles.pieces(num_lines, shape.blocks.vocab)
        pieces = tiles.pieces(shape.blocks.rows, shape.blocks.piece)
        first = block * shape.blocks.vocab

        def views(refs: list[Ref], turn: int) -> list[Ref]:
            return [ref.at[turn % 2, lines.span, : pieces[turn].size] for ref in refs]

        def make(turn: int) -> None:
            for view, hidden, table in zip(
                views(products, turn), given.hiddens, given.tables, strict=True
            ):
                view[...] = tiles.logits(table[lines.span, :], hidden[pieces[turn].span, :])

        def use(turn: int) -> None:
            span = pieces[turn].span
            tile, *others = (
                given.tile(view, lines, first=first, lanes=span) for view in views(products, turn)
            )
            teacher = others[0] if others else None
            (logit_bar,) = views([logit_bars], turn)
            assert given.bars is not None
            given.bars.of(span).put(tile, teacher, logit_bar, may_be_nan=False)
            total[span, :] += tiles.product(
                logit_bar[...], tiles.table_lines(given.tables[0], lines), (0, 0)
            )

        tiles.in_turns(len(pieces), make, use)

    tiles.over_table(shape, block, of_block)

    @pl.when(block == shape.num_vocab_blocks - 1)
    def _() -> None:
        hidden_bar[...] = total[...].astype(hidden_bar.dtype)


def _table_kernel(*refs: Ref, shape: Shape, num_streams: int) -> None:
    given, (table_bar, *memory) = launch.operands_of(refs, shape, num_streams)
    products, (logit_bars, total, *cleared) = memory[:num_streams], memory[num_streams:]
    block, row_block = pl.program_id(0), pl.program_id(1)
    hiddens = given.hiddens
    if shape.is_padded:
        rows_here = given.num_valid[0] - row_block * shape.blocks.rows
        cleared[0][...] = tiles.existing(hiddens[0][...], rows_here)
        hiddens = [cleared[0], *hiddens[1:]]

    @pl.when(row_block == 0)
    def _() -> None:
        total[...] = jnp.zeros(total.shape, jnp.float32)

    def of_block(num_lines: int) -> None:
        pieces = tiles.pieces(num_lines, shape.blocks.piece)

        def views(refs: list[Ref], turn: int) -> list[Ref]:
            return [ref.at[turn % 2, : pieces[turn].size, :] for ref in refs]

        def make(turn: int) -> None:
            for view, hidden, table in zip(
                views(products, turn), hiddens, given.tables, strict=True
            ):
                view[...] = tiles.logits(table[pieces[turn].span, :], hidden[...])

        def use(turn: int) -> None:
            piece = pieces[turn]
            first = block * shape.blocks.vocab + piece.begin
            tile, *others = (given.tile(view, piece, first=first) for view in views(products, turn))
            teacher = others[0] if others else None
            (logit_bar,) = views([logit_bars], turn)
            may_be_nan = shape.is_padded and teacher is not None
            assert given.bars is not None
            given.bars.put(tile, teacher, logit_bar, may_be_nan=may_be_nan)
            total[piece.span, :] += tiles.product(logit_bar[...], hiddens[0][...], (1, 0))

        tiles.in_turns(len(pieces), make, use)

    tiles.over_table(shape, block, of_block)

    @pl.when(row_block == pl.num_programs(1) - 1)
    def _() -> None:
        table_bar[...] = total[...].astype(table_bar.dtype)
