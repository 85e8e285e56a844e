"""Forward passes: statistics of every row, alone, with the mean row of the table, or with logits.

`statistics` walks the table once for every block of rows and keeps, for each row, sums that are
rescaled when a higher logit turns up (`tiles.Running`). One matrix product of K D V.

`statistics_and_mean` also sums ``exp(z_v - m) W_v`` over all but the target: attention with the
table for keys and values. It is the part of the hidden gradient that costs a product with the
table, so that the backward pass needs no logits for it. Two products.

`stored_statistics` is `statistics` with the block of logits for a result: the matrix units write
them where the statistics read them, and from there they go to main memory, float32, vocabulary
by rows. One product.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from codjax_kernels.records import Rows, Statistics
from codjax_kernels.tpu import blocks as tuned
from codjax_kernels.tpu import launch, tiles
from codjax_kernels.tpu.launch import Interpret, Problem, scratch
from codjax_kernels.tpu.tiles import Ref, Running, Shape

_NUM_STATISTICS = 3  # lines of the array in which a kernel returns them


def statistics(
    rows: Rows,
    table: Float[Array, "V D"],
    *,
    interpret: Interpret = False,
    blocks: tuned.Blocks | None = None,
) -> Statistics:
    """Target logit, log-normaliser and mean logit of every row."""
    blocks = blocks or launch.tuned_blocks(table, interpret=interpret).statistics
    given = launch.problem(rows, table, blocks, interpret=interpret)
    shape = given.shape
    (lines,) = launch.launch(
        given,
        functools.partial(_statistics_kernel, shape=shape, is_stored=False),
        name="logprob_statistics",
        grid=(given.num_row_blocks, shape.num_vocab_blocks),
        operands=_operands(given, rows, table),
        results=[_statistics_result(given)],
        memory=[*_running(shape), scratch(2, shape.blocks.piece, shape.blocks.rows)],
        products=1,
    )
    return _statistics(given, lines)


def statistics_and_mean(
    rows: Rows,
    table: Float[Array, "V D"],
    *,
    interpret: Interpret = False,
    blocks: tuned.Blocks | None = None,
) -> tuple[Statistics, Float[Array, "K D"]]:
    """Statistics, and the mean row of the table but for the target: ``sum_{v != y} p_v W_v``."""
    blocks = blocks or launch.tuned_blocks(table, interpret=interpret).mean
    given = launch.problem(rows, table, blocks, interpret=interpret)
    shape, hidden = given.shape, rows.hidden
    block = shape.blocks
    lines, others = launch.launch(
        given,
        functools.partial(_mean_kernel, shape=shape),
        name="logprob_statistics_and_mean",
        grid=(given.num_row_blocks, shape.num_vocab_blocks),
        operands=_operands(given, rows, table),
        results=[
            _statistics_result(given),
            (
                jax.ShapeDtypeStruct(hidden.shape, hidden.dtype),
                pl.BlockSpec((block.rows, shape.width), lambda i, j: (i, 0)),
            ),
        ],
        memory=[
            *_running(shape),
            scratch(2, block.vocab, block.piece),
            scratch(2, block.vocab, block.piece, dtype=hidden.dtype),
            scratch(1, block.rows),
            scratch(block.rows, shape.width),
        ],
        products=2,
    )
    return _statistics(given, lines), others


def stored_statistics(
    rows: Rows,
    table: Float[Array, "V D"],
    *,
    interpret: Interpret = False,
    blocks: tuned.Blocks | None = None,
) -> tuple[Statistics, Float[Array, "V K"]]:
    """Statistics, and the products ``W_v . h`` that they come from, without the temperature.

    Lanes are filled up to whole blocks of rows; blocks of padding alone are not written.
    """
    blocks = blocks or launch.tuned_blocks(table, interpret=interpret).stored_statistics
    given = launch.problem(rows, table, blocks, interpret=interpret)
    shape = given.shape
    block = shape.blocks
    num_lanes = shape.num_row_blocks * block.rows
    lines, products = launch.launch(
        given,
        functools.partial(_statistics_kernel, shape=shape, is_stored=True),
        name="logprob_stored_statistics",
        grid=(given.num_row_blocks, shape.num_vocab_blocks),
        operands=_operands(given, rows, table),
        results=[
            _statistics_result(given),
            (
                jax.ShapeDtypeStruct((shape.vocab_size, num_lanes), jnp.float32),
                pl.BlockSpec((block.vocab, block.rows), lambda i, j: (j, i)),
            ),
        ],
        memory=_running(shape),
        products=1,
    )
    return _statistics(given, lines), products


def _operands(given: Problem, rows: Rows, table: Array) -> list[tuple[Array, pl.BlockSpec]]:
    return launch.operands(given, [(rows.hidden, table)], None, lambda i, j: (i, j))


def _statistics_result(given: Problem) -> tuple[jax.ShapeDtypeStruct, pl.BlockSpec]:
    result = jax.ShapeDtypeStruct((_NUM_STATISTICS, given.targets.shape[1]), jnp.float32)
    return result, pl.BlockSpec((_NUM_STATISTICS, given.shape.blocks.rows), lambda i, j: (0, i))


def _statistics(given: Problem, lines: Array) -> Statistics:
    return Statistics(*lines[:, : given.shape.num_rows])


def _running(shape: Shape) -> list[object]:
    return [scratch(tuned.CHUNK, shape.blocks.rows)] * len(Running._fields)


def _statistics_kernel(*refs: Ref, shape: Shape, is_stored: bool) -> None:
    """One block of rows and one of the table.

    With `is_stored` the products go to the second result, otherwise to a buffer for two pieces.
    """
    given, (out, *memory) = launch.operands_of(refs, shape, has_bars=False)
    stored, *memory = memory if is_stored else [None, *memory]
    state, block = Running(*memory[: len(Running._fields)]), pl.program_id(1)
    pl.when(block == 0)(state.clear)

    def of_block(num_lines: int) -> None:
        pieces = tiles.pieces(num_lines, shape.blocks.piece)

        def products(turn: int) -> Ref:
            if stored is not None:
                return stored.at[pieces[turn].span, :]
            return memory[-1].at[turn % 2, : pieces[turn].size, :]

        def make(turn: int) -> None:
            table = given.tables[0][pieces[turn].span, :]
            products(turn)[...] = tiles.logits(table, given.hiddens[0][...])

        def use(turn: int) -> None:
            first = block * shape.blocks.vocab + pieces[turn].begin
            tile = given.tile(products(turn), pieces[turn], first=first)
            tiles.accumulate(state, tile)

        tiles.in_turns(len(pieces), make, use)

    tiles.over_table(shape, block, of_block)
    pl.when(block == shape.num_vocab_blocks - 1)(lambda: _finish(state, out))


def _mean_kernel(*refs: Ref, shape: Shape) -> None:
    given, (out, others, *memory) = launch.operands_of(refs, shape, has_bars=False)
    (hidden,), (table,) = given.hiddens, given.tables
    state, (products, shares, fall, total) = Running(*memory[:4]), memory[4:]
    block = pl.program_id(1)

    @pl.when(block == 0)
    def _() -> None:
        state.clear()
        total[...] = jnp.zeros(total.shape, jnp.float32)

    def of_block(num_lines: int) -> None:
        (lines,) = tiles.pieces(num_lines, shape.blocks.vocab)
        pieces = tiles.pieces(shape.blocks.rows, shape.blocks.piece)

        def make(turn: int) -> None:
            part = products.at[turn % 2, lines.span, : pieces[turn].size]
            part[...] = tiles.logits(table[lines.span, :], hidden[pieces[turn].span, :])

        def use(turn: int) -> None:
            span = pieces[turn].span
            lanes = slice(0, pieces[turn].size)
            share = shares.at[turn % 2, lines.span, lanes]
            part = products.at[turn % 2, lines.span, lanes]
            tile = given.tile(part, lines, first=block * shape.blocks.vocab, lanes=span)
            tiles.accumulate_shares(state.of(span), tile, share, fall.at[:, span])
            total[span, :] = total[span, :] * tiles.column(fall[:, span]) + tiles.product(
                share[...], tiles.table_lines(table, lines), (0, 0)
            )

        tiles.in_turns(len(pieces), make, use)

    tiles.over_table(shape, block, of_block)

    @pl.when(block == shape.num_vocab_blocks - 1)
    def _() -> None:
        _finish(state, out)
        share = 1.0 / jnp.sum(state.total[...], axis=0, keepdims=True)
        others[...] = (total[...] * tiles.column(share)).astype(others.dtype)


def _finish(state: Running, out: Ref) -> None:
    for line, values in enumerate(state.statistics()):
        out[line : line + 1, :] = values
