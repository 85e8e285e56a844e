"""From the records of a pass to the call of a kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from codjax_kernels.records import LogitGradient, Rows
from codjax_kernels.tpu import blocks as tuned
from codjax_kernels.tpu import tiles

Interpret = bool | pltpu.InterpretParams


class Problem(NamedTuple):
    """One pass over one table, ready to be launched.

    Attributes:
        shape: what the kernel is built for.
        chip: that it is compiled for.
        interpret: as `pallas_call` takes it.
        num_row_blocks: blocks with rows that count, at least 1; a number or, dynamic, an array.
        num_valid: rows that count, `[1]`.
        targets: `[1 K']` with K' a multiple of the block.
        scale: inverse temperatures, `[1 K']`.
    """

    shape: tiles.Shape
    chip: tuned.Chip
    interpret: Interpret
    num_row_blocks: int | Array
    num_valid: Array
    targets: Array
    scale: Array


def tuned_blocks(*tables: Float[Array, "V _"], interpret: Interpret) -> tuned.Tuned:
    """The blocks of every kernel for the chip at hand and the widest of the tables.

    They are tuned on bfloat16, so that a float32 table counts as twice as wide.
    """
    chip = tuned.chip(is_interpreted=bool(interpret))
    widths = [
        table.shape[1] * table.dtype.itemsize // jnp.bfloat16.dtype.itemsize for table in tables
    ]
    return tuned.tuned_for(max(widths), chip.tuned)


def problem(
    rows: Rows, table: Float[Array, "V D"], blocks: tuned.Blocks, *, interpret: Interpret
) -> Problem:
    """The problem of one pass, cut into `blocks` or what of them it fills."""
    (num_rows, width), vocab_size = rows.hidden.shape, table.shape[0]
    blocks = tuned.fitted(blocks, num_rows, vocab_size)
    shape = tiles.Shape(
        num_rows=num_rows,
        width=width,
        vocab_size=vocab_size,
        blocks=blocks,
        has_temperature=rows.inverse_temperature is not None,
        is_padded=rows.num_valid is not None or num_rows % blocks.rows != 0,
    )
    num_valid = jnp.asarray(num_rows if rows.num_valid is None else rows.num_valid, jnp.int32)
    num_valid = jnp.clip(num_valid, 0, num_rows)
    num_row_blocks: int | Array = shape.num_row_blocks
    if rows.num_valid is not None:
        num_row_blocks = jnp.maximum((num_valid + blocks.rows - 1) // blocks.rows, 1)
    num_padding = shape.num_row_blocks * blocks.rows - num_rows
    targets = jnp.where(rows.targets < 0, tiles.NOWHERE, rows.targets.astype(jnp.int32))
    inverse = rows.inverse_temperature
    scale = jnp.ones(num_rows, jnp.float32) if inverse is None else inverse
    return Problem(
        shape=shape,
        chip=tuned.chip(is_interpreted=bool(interpret)),
        interpret=interpret,
        num_row_blocks=num_row_blocks,
        num_valid=num_valid[None],
        targets=jnp.pad(targets, (0, num_padding), constant_values=tiles.NOWHERE)[None],
        scale=jnp.pad(scale, (0, num_padding))[None],
    )


def bars(
    given: Problem, gradient: LogitGradient, of_teacher: Float[Array, " K"] | None = None
) -> Float[Array, "n lanes"]:
    """Lines of `tiles.Bars` for every row; for 3 to 5 coefficients."""
    coefficients = [gradient.of_target, gradient.of_all]
    if gradient.of_logit is not None:
        coefficients.append(gradient.of_logit)
    if of_teacher is not None:
        coefficients.append(of_teacher)
    scale = given.scale[0, : given.shape.num_rows]
    normaliser = _lines(given, [gradient.log_normaliser], fill=tiles.PADDING)
    return jnp.concatenate([normaliser, _lines(given, [line * scale for line in coefficients])])


def _lines(given: Problem, of_row: Sequence[Array], fill: float = 0.0) -> Float[Array, "n lanes"]:
    """What belongs to the rows, one line each; `fill` where a row does not count."""
    lines = jnp.stack(of_row)
    if not given.shape.is_padded:
        return lines
    lines = jnp.pad(lines, ((0, 0), (0, given.targets.shape[1] - lines.shape[1])))
    counts = jax.lax.broadcasted_iota(jnp.int32, lines.shape, 1) < given.num_valid[0]
    return jnp.where(counts, lines, fill)


def operands(
    given: Problem,
    streams: Sequence[tuple[Array, Array]],
    bars: Array | None,
    order: Callable[..., tuple[Any, Any]],
) -> list[tuple[Array, pl.BlockSpec]]:
    """What a kernel reads, and how it is cut; `operands_of` takes the references apart.

    Args:
        given: the problem.
        streams: pairs of hidden states and table.
        bars: coefficients of a gradient, for a backward pass.
        order: from the indices of the grid to those of the blocks of rows and of the table.
    """
    block = given.shape.blocks

    def of_rows(num_lines: int) -> pl.BlockSpec:
        return pl.BlockSpec((num_lines, block.rows), lambda *at: (0, order(*at)[0]))

    def of_hidden(hidden: Array) -> pl.BlockSpec:
        return pl.BlockSpec((block.rows, hidden.shape[1]), lambda *at: (order(*at)[0], 0))

    def of_table(table: Array) -> pl.BlockSpec:
        return pl.BlockSpec((block.vocab, table.shape[1]), lambda *at: (order(*at)[1], 0))

    return [
        (given.num_valid, pl.BlockSpec(memory_space=pltpu.SMEM)),
        (given.targets, of_rows(1)),
        (given.scale, of_rows(1)),
        *([] if bars is None else [(bars, of_rows(bars.shape[0]))]),
        *[(hidden, of_hidden(hidden)) for hidden, _ in streams],
        *[(table, of_table(table)) for _, table in streams],
    ]


class Operands(NamedTuple):
    """References to what a kernel reads."""

    num_valid: tiles.Ref
    targets: tiles.Ref
    scale: tiles.Ref | None
    bars: tiles.Bars | None
    hiddens: list[tiles.Ref]
    tables: list[tiles.Ref]

    def tile(
        self,
        products: tiles.Ref,
        piece: tiles.Piece,
        *,
        first: tiles.Values | int,
        lanes: slice = slice(None),
    ) -> tiles.Tile:
        """The tile of a piece of the table that begins at its row `first`, and of some rows."""
        scale = None if self.scale is None else self.scale.at[:, lanes]
        return tiles.Tile(
            products, scale, self.targets.at[:, lanes], first, piece.size, piece.valid
        )


def operands_of(
    refs: Sequence[tiles.Ref], shape: tiles.Shape, num_streams: int = 1, *, has_bars: bool = True
) -> tuple[Operands, list[tiles.Ref]]:
    """The references of `operands`, and those of results and scratch memory behind them."""
    num_valid, targets, scale, *rest = refs
    bars = None
    if has_bars:
        lines, *rest = rest
        bars = tiles.Bars(lines)
    hiddens, tables = rest[:num_streams], rest[num_streams : 2 * num_streams]
    scale = scale if shape.has_temperature else None
    made = Operands(num_valid, targets, scale, bars, hiddens, tables)
    return made, rest[2 * num_streams :]


def launch(
    given: Problem,
    kernel: Callable[..., None],
    *,
    name: str,
    grid: Sequence[int | Array],
    operands: Sequence[tuple[Array, pl.BlockSpec]],
    results: Sequence[tuple[jax.ShapeDtypeStruct, pl.BlockSpec]],
    memory: Sequence[Any],
    products: int,
    aliases: dict[int, int] | None = None,
) -> list[Array]:
    """The results of a kernel.

    Args:
        given: the problem.
        kernel: takes references to the operands, the results and the scratch memory.
        name: for profiles.
        grid: number of steps of every dimension; those of the first are independent.
        operands: arrays and how they are cut.
        results: shapes and how they are cut.
        memory: scratch memory that lasts over the steps.
        products: matrix products of K D V multiply-adds, for the scheduler around the kernel.
        aliases: results that lie where operands lie, by their positions.
    """
    shape = given.shape
    logits = shape.num_rows * shape.vocab_size
    arrays = [operand for operand, _ in operands] + [result for result, _ in results]
    cost = pl.CostEstimate(
        flops=2 * products * logits * shape.width,
        transcendentals=logits,
        bytes_accessed=sum(array.size * array.dtype.itemsize for array in arrays),
    )
    # The interpreter that knows copies and semaphores wants to count parallel steps beforehand.
    is_counted = isinstance(grid[0], int) or not isinstance(given.interpret, pltpu.InterpretParams)
    semantics: Any = (
        "parallel" if is_counted else "arbitrary",
        *["arbitrary"] * (len(grid) - 1),
    )
    call = pl.pallas_call(
        kernel,
        name=name,
        grid=tuple(grid),
        in_specs=[spec for _, spec in operands],
        out_specs=[spec for _, spec in results],
        out_shape=[result for result, _ in results],
        scratch_shapes=list(memory),
        input_output_aliases=aliases or {},
        interpret=given.interpret,
        cost_estimate=cost,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=semantics, vmem_limit_bytes=given.chip.vmem_bytes
        ),
    )
    return list(call(*[operand for operand, _ in operands]))


def scratch(*shape: int, dtype: Any = jnp.float32) -> Any:
    """Vector memory that lasts over the steps of a grid."""
    return pltpu.VMEM(shape, dtype)
