"""Divergence from a teacher over the whole vocabulary, without either's logits in main memory.

With the logits z' of a teacher, which has hidden states and a table of its own (and the
temperature of the student), l' its log-normaliser and p the student's probabilities:

    KL(student || teacher) = sum_v p_v (log p_v - log p'_v) = (c - l) - (c' - l')
    c = sum_v p_v z_v,  c' = sum_v p_v z'_v
    d KL / d z_v = p_v (z_v - l - z'_v + l' - KL)

Forward, both tables pass by the same rows, and c' is one more rescaled sum: 1 product with each
table. Backward, the kernels of `logprobs_backward` run with a second stream of logits: 2 products
with the student's table and 1 with the teacher's in each of the two. The teacher gets no gradient.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from codjax_kernels.records import (
    KlGradient,
    LogitGradient,
    Rows,
    Statistics,
    Teacher,
    TeacherStatistics,
)
from codjax_kernels.tpu import blocks as tuned
from codjax_kernels.tpu import launch, logprobs_backward, tiles
from codjax_kernels.tpu.launch import Interpret, scratch
from codjax_kernels.tpu.tiles import CHUNK, Ref, Running, Shape, Tile, Values

_NUM_RESULTS = 5


def kl_statistics(
    rows: Rows,
    table: Float[Array, "V D"],
    teacher: Teacher,
    *,
    interpret: Interpret = False,
    blocks: tuned.Blocks | None = None,
) -> tuple[Statistics, TeacherStatistics]:
    """The student's statistics, and the teacher's."""
    blocks = blocks or launch.tuned_blocks(table, teacher.table, interpret=interpret).kl
    given = launch.problem(rows, table, blocks, interpret=interpret)
    shape, block = given.shape, given.shape.blocks
    streams = [(rows.hidden, table), (teacher.hidden, teacher.table)]
    result = jax.ShapeDtypeStruct((_NUM_RESULTS, given.targets.shape[1]), jnp.float32)
    (lines,) = launch.launch(
        given,
        functools.partial(_kernel, shape=shape),
        name="logprob_kl_statistics",
        grid=(given.num_row_blocks, shape.num_vocab_blocks),
        operands=launch.operands(given, streams, None, lambda i, j: (i, j)),
        results=[(result, pl.BlockSpec((_NUM_RESULTS, block.rows), lambda i, j: (0, i)))],
        memory=[
            *[scratch(CHUNK, block.rows)] * (len(Running._fields) + len(_Teacher._fields)),
            *[scratch(2, block.piece, block.rows)] * len(streams),
        ],
        products=2,
    )
    made = lines[:, : shape.num_rows]
    return Statistics(*made[:3]), TeacherStatistics(*made[3:])


def kl_gradients(
    rows: Rows,
    table: Float[Array, "V D"],
    teacher: Teacher,
    gradient: KlGradient,
    *,
    interpret: Interpret = False,
    blocks: tuned.Blocks | None = None,
) -> tuple[Float[Array, "K D"], Float[Array, "V D"]]:
    """Gradients of the student's hidden states and table."""
    blocks = blocks or launch.tuned_blocks(table, teacher.table, interpret=interpret).kl
    given = launch.problem(rows, table, blocks, interpret=interpret)
    cotangent = gradient.cotangent
    shift = gradient.teacher_log_normaliser - gradient.log_normaliser - gradient.kl
    by_logit = LogitGradient(
        log_normaliser=gradient.log_normaliser,
        of_target=jnp.zeros_like(cotangent),
        of_all=cotangent * shift,
        of_logit=cotangent,
    )
    bars = launch.bars(given, by_logit, of_teacher=-cotangent)
    streams = [(rows.hidden, table), (teacher.hidden, teacher.table)]
    hidden_bar = logprobs_backward.to_hidden(given, streams, bars)
    return hidden_bar, logprobs_backward.to_table(given, streams, bars)


def _kernel(*refs: Ref, shape: Shape) -> None:
    given, (out, *memory) = launch.operands_of(refs, shape, 2, has_bars=False)
    split = len(Running._fields)
    state, teacher, products = Running(*memory[:split]), _Teacher(*memory[split:-2]), memory[-2:]
    block = pl.program_id(1)

    @pl.when(block == 0)
    def _() -> None:
        state.clear()
        teacher.clear()

    def of_block(num_lines: int) -> None:
        pieces = tiles.pieces(num_lines, shape.blocks.piece)

        def views(turn: int) -> list[Ref]:
            return [ref.at[turn % 2, : pieces[turn].size, :] for ref in products]

        def make(turn: int) -> None:
            for view, hidden, table in zip(views(turn), given.hiddens, given.tables, strict=True):
                view[...] = tiles.logits(table[pieces[turn].span, :], hidden[...])

        def use(turn: int) -> None:
            first = block * shape.blocks.vocab + pieces[turn].begin
            tile, teacher_tile = (
                given.tile(view, pieces[turn], first=first) for view in views(turn)
            )
            _accumulate(state, teacher, tile, teacher_tile)

        tiles.in_turns(len(pieces), make, use)

    tiles.over_table(shape, block, of_block)

    @pl.when(block == shape.num_vocab_blocks - 1)
    def _() -> None:
        for line, values in enumerate((*state.statistics(), *teacher.statistics(state))):
            out[line : line + 1, :] = values


class _Teacher(NamedTuple):
    """Sums over the teacher's logits, `[CHUNK rows]`, as `tiles.Running`."""

    highest: Ref  # m', of the teacher
    total: Ref  # sum of exp(z' - m')
    mixed: Ref  # sum of exp(z - m) (z' - m'), with m of the student

    def clear(self) -> None:
        """Makes them the sums of nothing."""
        self.highest[...] = jnp.full(self.highest.shape, tiles.MASKED, jnp.float32)
        for ref in self[1:]:
            ref[...] = jnp.zeros(ref.shape, jnp.float32)

    def statistics(self, student: Running) -> tuple[Values, Values]:
        """Log-normalisers, and means under the student's probabilities, `[1 rows]`."""
        highest = jnp.max(self.highest[...], axis=0, keepdims=True)
        fall = self.highest[...] - highest
        total = jnp.sum(self.total[...] * jnp.exp(fall), axis=0, keepdims=True)
        share = jnp.exp(student.highest[...] - jnp.max(student.highest[...], axis=0, keepdims=True))
        mixed = (self.mixed[...] + student.total[...] * fall) * share
        of_student = jnp.sum(student.total[...] * share, axis=0, keepdims=True)
        mean = jnp.sum(mixed, axis=0, keepdims=True) / of_student
        return highest + jnp.log(total), highest + mean


def _accumulate(student: Running, teacher: _Teacher, tile: Tile, teacher_tile: Tile) -> None:
    """Both sums with those of one more tile."""
    for strip in tiles.strips(student.highest.shape[1]):
        read, read_teacher = tile.reader(strip), teacher_tile.reader(strip)
        target = tile.target_chunk(strip)
        before, before_teacher = student.highest[:, strip], teacher.highest[:, strip]
        highest = tile.highest(read, before)
        highest_teacher = teacher_tile.highest(read_teacher, before_teacher)
        fall, fall_teacher = before - highest, before_teacher - highest_teacher
        total = teacher.total[:, strip] * jnp.exp(fall_teacher)
        mixed = teacher.mixed[:, strip] + student.total[:, strip] * fall_teacher
        mixed, sums = mixed * jnp.exp(fall), student.rescaled(strip, fall)
        for chunk in range(tile.num_chunks):
            sums, exp = tiles.added(sums, read(chunk), highest, target == chunk * CHUNK)
            below = read_teacher(chunk) - highest_teacher
            total, mixed = total + jnp.exp(below), mixed + exp * below
        student.store(strip, highest, sums)
        for ref, value in zip(teacher, (highest_teacher, total, mixed), strict=True):
            ref[:, strip] = value
