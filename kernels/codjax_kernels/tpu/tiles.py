"""What the log-prob kernels do with a tile of logits in vector memory.

Tiles are laid out vocabulary by rows: a hidden state owns a lane, its logits lie below each other.
So maxima and sums over the vocabulary are plain operations between registers, what belongs to a
hidden state (target, temperature, normaliser) is one compact row of numbers that every line of a
tile meets as it is, and nothing crosses lanes until a kernel's end.

A tile is a piece of a block (`blocks.py`): rectangles of raw products that the matrix units put
into a buffer, read `CHUNK` lines at a time. The last block of the table may hold fewer rows than
the others; its number is known when a kernel is built, so it gets code of its own and the others
no masks. Rows of hidden states are counted at run time: a kernel whose sums run over them clears
padding rows first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from codjax_kernels.tpu.blocks import CHUNK, LANES, Blocks

MASKED = -1e30  # a logit that is not there; finite, so that no difference of two is nan
PADDING = 1e30  # log-normaliser of a row that does not count
NOWHERE = -(2**30)  # a target that no tile contains
STRIP = 256  # lanes done at once: as many sums as the registers hold

Ref = Any  # a reference into the memory of the chip, or a view of one
Values = Any  # an array inside of a kernel
Sums = tuple[Values, Values, Values]  # total, weighted and target of `Running`


class Shape(NamedTuple):
    """What a kernel knows of its problem when it is built."""

    num_rows: int
    width: int
    vocab_size: int
    blocks: Blocks
    has_temperature: bool
    is_padded: bool  # whether a block of rows may hold rows that do not count

    @property
    def num_vocab_blocks(self) -> int:
        """Blocks of the table."""
        return pl.cdiv(self.vocab_size, self.blocks.vocab)

    @property
    def num_row_blocks(self) -> int:
        """Blocks of rows, padding included."""
        return pl.cdiv(self.num_rows, self.blocks.rows)


class Piece(NamedTuple):
    """A part of a block."""

    begin: int
    size: int  # multiple of CHUNK
    valid: int  # of them exist

    @property
    def span(self) -> slice:
        """Its place in the block."""
        return slice(self.begin, self.begin + self.size)


def pieces(length: int, size: int) -> list[Piece]:
    """`length` lines in pieces of `size`, the last shorter.

    >>> pieces(300, 256)
    [Piece(begin=0, size=256, valid=256), Piece(begin=256, size=48, valid=44)]
    """
    made = []
    for begin in range(0, length, size):
        valid = min(size, length - begin)
        made.append(Piece(begin, pl.cdiv(valid, CHUNK) * CHUNK, valid))
    return made


def over_table(shape: Shape, block: Values, body: Callable[[int], None]) -> None:
    """`body(rows of the table that the block holds)`, for the block of that index."""
    last = shape.num_vocab_blocks - 1
    rest = shape.vocab_size - last * shape.blocks.vocab
    if rest == shape.blocks.vocab or last == 0:
        body(rest)
    else:
        pl.when(block < last)(lambda: body(shape.blocks.vocab))
        pl.when(block == last)(lambda: body(rest))


def in_turns(count: int, make: Callable[[int], None], use: Callable[[int], None]) -> None:
    """`make(n)` and `use(n)` of every n, in the order that lets ``make(n + 1)`` overlap `use(n)`.

    All in one stretch of straight code, of which the compiler's scheduler sees the whole.
    """
    make(0)
    for turn in range(count):
        if turn + 1 < count:
            make(turn + 1)
        use(turn)


def product(a: Values, b: Values, contract: tuple[int, int]) -> Values:
    """Sum of products over one dimension of each, float32."""
    exact = a.dtype == jnp.float32
    return jax.lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST if exact else None,
    )


def logits(table: Values, hidden: Values) -> Values:
    """Products ``W_v . h``, vocabulary by rows."""
    return product(table, hidden, (1, 1))


def existing(lines: Values, valid: Values | int) -> Values:
    """`lines` with zeros from line `valid` on, where there may be anything, nan included."""
    line = jax.lax.broadcasted_iota(jnp.int32, lines.shape, 0)
    return jnp.where(line < valid, lines, jnp.zeros_like(lines))


def table_lines(table: Ref, piece: Piece) -> Values:
    """Rows of the table, zeros where there are none."""
    lines = table[piece.span, :]
    return lines if piece.valid == piece.size else existing(lines, piece.valid)


def column(row: Values) -> Values:
    """`[1 n]` as `[n 1]`."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T[:, :1]


def strips(lanes: int) -> list[slice]:
    """Lanes in strips that are done one after the other."""
    size = STRIP if lanes % STRIP == 0 else LANES
    return [slice(begin, begin + size) for begin in range(0, lanes, size)]


class Tile(NamedTuple):
    """Logits of some rows of the table (lines) by some hidden states (lanes)."""

    products: Ref  # h . W, float32, `[≥ size, lanes]`
    scale: Ref | None  # inverse temperatures `[1 lanes]`
    targets: Ref  # `[1 lanes]`
    first: Values | int  # row of the table in line 0
    size: int
    valid: int

    @property
    def num_chunks(self) -> int:
        """Groups of CHUNK lines."""
        return self.size // CHUNK

    def reader(self, strip: slice) -> Callable[[int], Values]:
        """``chunk → logits [CHUNK strip]``; those that do not exist are MASKED."""
        lanes = strip.stop - strip.start
        scale = None if self.scale is None else over_chunk(self.scale[:, strip])
        line = jax.lax.broadcasted_iota(jnp.int32, (CHUNK, lanes), 0)

        def read(chunk: int) -> Values:
            logits = self.products[chunk * CHUNK : (chunk + 1) * CHUNK, strip]
            if scale is not None:
                logits = logits * scale
            if (chunk + 1) * CHUNK > self.valid:
                logits = jnp.where(line < self.valid - chunk * CHUNK, logits, MASKED)
            return logits

        return read

    def highest(self, read: Callable[[int], Values], before: Values) -> Values:
        """The highest logit of every line of a chunk, and `before`."""
        for chunk in range(self.num_chunks):
            before = jnp.maximum(before, read(chunk))
        return before

    def target_chunk(self, strip: slice) -> Values:
        """Where each lane's target is: CHUNK times its chunk, on its own line of the chunk."""
        targets = over_chunk(self.targets[:, strip])
        line = jax.lax.broadcasted_iota(jnp.int32, targets.shape, 0)
        return targets - self.first - line


def over_chunk(row: Values) -> Values:
    """`[1 n]` on every line of a chunk."""
    return jnp.broadcast_to(row, (CHUNK, row.shape[1]))


class Running(NamedTuple):
    """Statistics so far, `[CHUNK rows]`: line c is about what line c of every chunk has met.

    With m the highest logit so far: sums of exp(z - m) and of exp(z - m) (z - m), and the logit of
    the target or 0. The shift keeps the second sum small, so that the mean is exact to a few units
    in the last place even where logits are large.
    """

    highest: Ref
    total: Ref
    weighted: Ref
    target: Ref

    def clear(self) -> None:
        """Makes them the statistics of nothing."""
        self.highest[...] = jnp.full(self.highest.shape, MASKED, jnp.float32)
        for ref in self[1:]:
            ref[...] = jnp.zeros(ref.shape, jnp.float32)

    def of(self, span: slice) -> Running:
        """Those of some of the rows."""
        return Running(*(ref.at[:, span] for ref in self))

    def rescaled(self, strip: slice, fall: Values) -> Sums:
        """The sums by a new highest logit, from `fall`, the old less the new."""
        scale, total = jnp.exp(fall), self.total[:, strip]
        weighted = (self.weighted[:, strip] + total * fall) * scale
        return total * scale, weighted, self.target[:, strip]

    def store(self, strip: slice, highest: Values, sums: Sums) -> None:
        """Keeps new values."""
        for ref, value in zip(self, (highest, *sums), strict=True):
            ref[:, strip] = value

    def statistics(self) -> tuple[Values, Values, Values]:
        """Target logits, log-normalisers and mean logits, `[1 rows]`."""
        highest = jnp.max(self.highest[...], axis=0, keepdims=True)
        fall = self.highest[...] - highest
        scale = jnp.exp(fall)
        total = jnp.sum(self.total[...] * scale, axis=0, keepdims=True)
        weighted = (self.weighted[...] + self.total[...] * fall) * scale
        mean = highest + jnp.sum(weighted, axis=0, keepdims=True) / total
        target = jnp.sum(self.target[...], axis=0, keepdims=True)
        return target, highest + jnp.log(total), mean


def added(sums: Sums, logits: Values, highest: Values, is_target: Values) -> tuple[Sums, Values]:
    """Sums with a chunk of logits, and the chunk's exp(z - m)."""
    total, weighted, target = sums
    below = logits - highest
    exp = jnp.exp(below)
    return (total + exp, weighted + exp * below, jnp.where(is_target, logits, target)), exp


def accumulate(state: Running, tile: Tile) -> None:
    """Statistics with those of one more tile."""
    for strip in strips(state.highest.shape[1]):
        read, target = tile.reader(strip), tile.target_chunk(strip)
        before = state.highest[:, strip]
        highest = tile.highest(read, before)
        sums = state.rescaled(strip, before - highest)
        for chunk in range(tile.num_chunks):
            sums, _ = added(sums, read(chunk), highest, target == chunk * CHUNK)
        state.store(strip, highest, sums)


def accumulate_shares(state: Running, tile: Tile, shares: Ref, scale: Ref) -> None:
    """The same, with one highest logit a lane, and the shares exp(z - m) of all but the targets.

    Args:
        state: as for `accumulate`; all lines of `highest` are equal, before and after.
        tile: the logits.
        shares: filled with the shares, `[size lanes]`, in the dtype of the operands.
        scale: `[1 lanes]`, what sums of earlier shares must be multiplied by.
    """
    for strip in strips(state.highest.shape[1]):
        read, target = tile.reader(strip), tile.target_chunk(strip)
        before = state.highest[:, strip]
        highest = tile.highest(read, before)
        highest = over_chunk(jnp.max(highest, axis=0, keepdims=True))
        scale[:, strip] = jnp.exp(before - highest)[:1]
        sums = state.rescaled(strip, before - highest)
        for chunk in range(tile.num_chunks):
            is_target = target == chunk * CHUNK
            sums, exp = added(sums, read(chunk), highest, is_target)
            lines = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
            shares[lines, strip] = jnp.where(is_target, 0.0, exp).astype(shares.dtype)
        state.store(strip, highest, sums)


class Bars(NamedTuple):
    """Gradient by the products, as coefficients of each row.

    It is ``p_v (of_all + of_logit z_v + of_teacher z'_v) + [v = y] of_target`` with the logits z'
    of a teacher.
    """

    # `[3 … 5 rows]`: log-normaliser, of_target, of_all and, where not 0, of_logit and of_teacher.
    # All but the first are multiplied by the inverse temperature. The log-normaliser of a padding
    # row is PADDING, which leaves no probability.
    lines: Ref
    begin: int = 0  # row of the block that lane 0 of a tile belongs to

    def of(self, span: slice) -> Bars:
        """Those of some of the rows."""
        return Bars(self.lines, self.begin + span.start)

    def put(self, tile: Tile, teacher: Tile | None, out: Ref, *, may_be_nan: bool) -> None:
        """Gradients of a tile, `[size lanes]`, in the dtype of the operands.

        With `may_be_nan` those of padding rows are 0 whatever their logits.
        """
        for strip in strips(out.shape[1]):
            read, target = tile.reader(strip), tile.target_chunk(strip)
            read_teacher = None if teacher is None else teacher.reader(strip)
            log_normaliser, of_target, of_all, *of_logits = self._coefficients(strip)
            for chunk in range(tile.num_chunks):
                logits, factor = read(chunk), of_all
                if of_logits:
                    factor = factor + of_logits[0] * logits
                if read_teacher is not None:
                    factor = factor + of_logits[1] * read_teacher(chunk)
                bar = jnp.exp(logits - log_normaliser) * factor
                bar = jnp.where(target == chunk * CHUNK, bar + of_target, bar)
                if may_be_nan:
                    bar = jnp.where(log_normaliser < PADDING, bar, 0.0)
                out[chunk * CHUNK : (chunk + 1) * CHUNK, strip] = bar.astype(out.dtype)

    def _coefficients(self, strip: slice) -> list[Values]:
        lanes = slice(self.begin + strip.start, self.begin + strip.stop)
        # One load for each: views of single lines cannot be cut further by the compiler.
        return [
            over_chunk(self.lines[line : line + 1, lanes]) for line in range(self.lines.shape[0])
        ]
