"""`codjax bench kernels --tune --topology=v5e`: block shapes of the kernels, by simulated cycles.

Every kernel is simulated alone, on a problem small enough for the simulator. The search starts from
the entry that is there, varies one size at a time, keeps what takes fewer cycles, and ends when
nothing does. The simulator lets transfers run at their best, so that a shape's cycles are at least
the time in which the main memory moves what the kernel asks of it.

The result goes into `codjax_kernels/tpu/blocks.py` and `codjax_kernels/tpu/attention_blocks.py`.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from codjax_kernels import cycles, topologies
from codjax_kernels.records import LogitGradient, Rows
from codjax_kernels.tpu import (
    attention_alone,
    attention_blocks,
    blocks,
    logprobs_backward,
    logprobs_forward,
    logprobs_stored,
)

from codjax.bench import kernel_attention
from codjax.bench.kernel_programs import shape, training_shapes
from codjax.bench.material import Row

# The passes by the fields of `blocks.Tuned`.
HEAD_KERNELS: Mapping[str, Callable[..., Any]] = {
    "statistics": logprobs_forward.statistics,
    "mean": logprobs_forward.statistics_and_mean,
    "hidden": logprobs_backward.hidden_gradient,
    "table": logprobs_backward.table_gradient,
    "stored_statistics": logprobs_forward.stored_statistics,
    "stored_gradients": logprobs_stored.stored_gradients,
}
PRODUCTS = {"statistics": 1, "stored_statistics": 1}  # of the others: 2
BLOCKS, PIECES = (256, 512, 1024, 2048), (128, 256, 512)

logger = logging.getLogger("codjax")


def tune(topology: str) -> dict[str, list[Row]]:
    """The best block shapes found for a chip, by table; `entry` is what to write down."""
    chip = topologies.chip_of(topology)
    tables: dict[str, list[Row]] = {}
    for entry in blocks.CHIPS[chip.name].tuned:
        sizes = _sizes(entry.max_width)
        title = "head on {}, K {:,}, D {:,}, V {:,}".format(chip.name, *sizes)
        tables[title] = [head_row(kernel, entry, sizes, topology) for kernel in HEAD_KERNELS]
    tables[f"attention on {chip.name}, 4 segments of 1,024"] = list(attention_rows(topology))
    return tables


def head_row(kernel: str, entry: blocks.Tuned, sizes: tuple[int, int, int], topology: str) -> Row:
    """The best blocks of one kernel of the head, against those of the entry."""
    num_entries, width, vocab = sizes
    chip = topologies.chip_of(topology)
    operands = _operands(kernel, sizes)

    def cost(point: tuple[int, ...]) -> float:
        shapes = blocks.Blocks(*point)
        run = functools.partial(run_kernel, kernel=kernel, shapes=shapes)

        def count() -> int:
            return cycles.simulate(run, *operands, topology=topology, timeout_s=3000.0).cycles

        moved = head_bytes(kernel, shapes, sizes) / chip.hbm_bytes_per_s * chip.clock_hz
        return max(_cycles(count, f"{kernel} {point}"), moved)

    tried = explore(tuple(getattr(entry, kernel)), (BLOCKS, BLOCKS, PIECES), cost)
    bound = chip.matrix_cycles(2 * PRODUCTS.get(kernel, 2) * num_entries * width * vocab)
    return _row(kernel, tried, bound=bound)


def run_kernel(*operands: Any, kernel: str, shapes: blocks.Blocks) -> Any:
    """One pass with the blocks given; operands as `_operands` lists them."""
    hidden, table, targets, normaliser, of_target, *rest = operands
    rows = Rows(hidden, targets, None, None)
    gradient = LogitGradient(normaliser, of_target, -of_target, None)
    of_kernel: dict[str, tuple[Any, ...]] = {
        "hidden": (gradient,),
        "table": (gradient,),
        "stored_gradients": (*rest[:1], gradient, *rest[1:]),
    }
    return HEAD_KERNELS[kernel](rows, table, *of_kernel.get(kernel, ()), blocks=shapes)


def head_bytes(kernel: str, shapes: blocks.Blocks, sizes: tuple[int, int, int]) -> int:
    """What a kernel of the head moves from and to main memory, in bytes."""
    num_entries, width, vocab = sizes
    hidden, table, logits = 2 * num_entries * width, 2 * vocab * width, 4 * num_entries * vocab
    row_blocks = math.ceil(num_entries / shapes.rows)
    vocab_blocks = math.ceil(vocab / shapes.vocab)
    return {
        "statistics": hidden + row_blocks * table,
        "mean": 2 * hidden + row_blocks * table,
        "hidden": 2 * hidden + row_blocks * table,
        "table": 2 * table + vocab_blocks * hidden,
        "stored_statistics": hidden + row_blocks * table + logits,
        "stored_gradients": logits + 5 * table + (1 + vocab_blocks) * hidden,
    }[kernel]


def attention_rows(topology: str) -> Iterator[Row]:
    """The best blocks of the attention kernels on a row of 4 segments of 1,024 tokens."""
    chip = topologies.chip_of(topology)
    index = np.arange(4096)
    ends = (index // 1024 * 1024 + 1024).astype(np.int32)[None]
    for kernel in attention_alone.KERNELS:

        def cost(point: tuple[int, ...], kernel: str = kernel) -> float:
            shapes = attention_blocks.Blocks(*point)
            count = functools.partial(
                kernel_attention.kernel_cycles,
                kernel,
                ends,
                shapes,
                topology,
                num_heads=4,
                group=4,
            )
            return _cycles(count, f"{kernel} {point}")

        present = getattr(attention_blocks.TABLE[chip.name], kernel)
        tried = explore(tuple(present), (BLOCKS[:3], BLOCKS[:3]), cost)
        token_pairs = 4 * 1024 * 1025 // 2  # that the mask leaves
        products = attention_alone.PRODUCTS[kernel] * kernel_attention.HEAD_DIM * 4
        yield _row(kernel, tried, bound=chip.matrix_cycles(2 * products * token_pairs))


def explore(
    start: tuple[int, ...],
    choices: tuple[tuple[int, ...], ...],
    cost: Callable[[tuple[int, ...]], float],
) -> dict[tuple[int, ...], float]:
    """Costs of all points tried, the start first, until no change of one coordinate costs less.

    >>> tried = explore((1, 1), ((1, 2, 4), (1, 2, 4)), lambda point: abs(sum(point) - 6))
    >>> min(tried, key=tried.get)
    (4, 2)
    """
    best, tried = start, {start: cost(start)}
    improves = True
    while improves:
        improves = False
        for axis, values in enumerate(choices):
            for value in values:
                point = (*best[:axis], value, *best[axis + 1 :])
                if point not in tried:
                    tried[point] = cost(point)
                if tried[point] < tried[best]:
                    best, improves = point, True
    return tried


def _row(kernel: str, tried: dict[tuple[int, ...], float], *, bound: float) -> Row:
    best, present = min(tried, key=tried.__getitem__), next(iter(tried))
    return {
        "kernel": kernel,
        "entry": f"Blocks{best}",
        "cycles": tried[best],
        "x_bound": tried[best] / bound,
        "present": f"Blocks{present}",
        "present_x_bound": tried[present] / bound,
        "tried": len(tried),
    }


def _cycles(count: Callable[[], int], what: str) -> float:
    """Cycles of a candidate; infinite where the compiler refuses it, as for want of memory."""
    try:
        found = count()
    except cycles.SimulatorError as error:
        logger.info("%s: %s", what, str(error).partition("\n")[0])
        return math.inf
    logger.info("%s: %s cycles.", what, f"{found:,}")
    return found


def _sizes(max_width: int) -> tuple[int, int, int]:
    """K, D and V of the problem for an entry: about as many steps of the grid for all widths."""
    return (2048, 1024, 8192) if max_width < 4096 else (1024, 4096, 4096)


def _operands(kernel: str, sizes: tuple[int, int, int]) -> tuple[Any, ...]:
    given = training_shapes(*sizes)
    plain = (given.hidden, given.table, given.targets, given.advantages, given.advantages)
    if kernel != "stored_gradients":
        return plain
    rows = Rows(given.hidden, given.targets, None, None)
    _, stored = jax.eval_shape(_interpreted_statistics, rows, given.table)
    return (*plain, stored, shape(*given.table.shape))


def _interpreted_statistics(rows: Rows, table: jax.Array) -> Any:
    """For the shape of what it stores, which needs no chip."""
    return logprobs_forward.stored_statistics(rows, table, interpret=True)
