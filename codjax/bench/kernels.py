"""`codjax bench kernels`: what the TPU compiler says of the kernels, without a TPU.

Tables from the compiler itself (`codjax_kernels.topologies`, `codjax_kernels.cycles`):

* *cycles* of the vocabulary head, forward and as a training step, by its simulator; once where all
  of it fits the vector memory, and once where the table and its gradient do not, as in earnest;
* *memory* that the head takes beside arguments and results, at a size where logits do not fit;
* *attention*: cycles of a packed row against those of a plain one, and the blocks visited;
* *compiling*: every kernel at the shapes of Qwen3-8B, and the learner's step on a slice.

Simulated cycles compare programs compiled by one compiler; nothing of it was measured on a chip.
With `tune`, block shapes are searched instead (`kernel_tuning`).
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
from codjax_kernels import cycles, topologies

from codjax import sharding
from codjax.bench import kernel_programs as programs
from codjax.bench import train_step
from codjax.bench.material import Row
from codjax.checks import ConfigError

_MIB = 2**20
_OURS = "pallas_tpu"
# tokamax's backward kernel takes the simulator 6 minutes on a quiet machine.
_SIMULATION_S = 3000.0
_BLOCK_ROWS = 1024  # of K at once; with 512, XLA's chunks are slower
# Slice, devices along `sharding.MESH_AXES`, and row length of the sharded step.
_STEPS = {
    "v5e": ("v5e:4x8", (1, 8, 2, 2, 1), 16384),
    "v5p": ("v5p:2x2x4", (1, 4, 2, 2, 1), 32768),
    "v6e": ("v6e:4x4", (1, 4, 2, 2, 1), 16384),
    "tpu7x": ("tpu7x:2x2x2", (1, 4, 2, 2, 1), 32768),
}
# More than the simulator has memory or models for.
_TOO_LARGE = (
    "training, ours in XLA, gradient in forward",
    "training, tokamax",
    "training, whole logits",
)
# What kernels may take of the vector memory does not change what they do. But a compiler that is to
# simulate adds the bound, what they really take, and what other operations keep there, and may
# refuse the sum; then it is asked again with the next of these.
_VMEM_MIB = (80, 48)

logger = logging.getLogger("codjax")


class Program(NamedTuple):
    """A program with what it is compiled for.

    Attributes:
        run: a function of a module, or a partial of one.
        shapes: its arguments.
        products: matrix products of K D V multiply-adds that it makes.
        needs: a package that may not be installed.
    """

    run: Callable[..., Any]
    shapes: tuple[Any, ...]
    products: int
    needs: str = ""


def bench(
    *,
    topology: str = "v5e",
    tune: bool = False,
    cycle_sizes: tuple[int, int, int] = (2048, 1024, 8192),
    large_sizes: tuple[int, int, int] = (1024, 1024, 38016),
    memory_sizes: tuple[int, int, int] = (8192, 1024, 152064),
    model_sizes: tuple[int, int, int] = (16384, 4096, 151936),
    model_tokens: int = 32768,
) -> dict[str, list[Row]]:
    """Cycles, memory and compile times, for every program.

    Args:
        topology: whose first device all is for.
        tune: search block shapes for that chip instead.
        cycle_sizes: K, D and V that are simulated.
        large_sizes: K, D and V that are simulated too, without `_TOO_LARGE`.
        memory_sizes: K, D and V of the memory.
        model_sizes: K, D and V at which the kernels are compiled.
        model_tokens: T of the row for which attention is compiled, 32 and 8 heads of 128.

    Returns:
        Tables by title. Cycles are also given in multiples: `x_bound`, of what the matrix units
        need for the program's own products; `x_tokamax` and `x_remat`, of tokamax's forward or
        training, and of XLA's chunks, rematerialised for training.

    Raises:
        ConfigError: libtpu is not installed, or there is no such topology.
    """
    try:
        topologies.devices(topology)
    except (ModuleNotFoundError, ValueError) as error:
        raise ConfigError(f"--topology={topology}: {error}") from error
    chip = topologies.chip_of(topology).name
    if chip not in _STEPS:
        raise ConfigError(
            f"--topology={topology}: the kernels have no blocks for {chip}; they run on "
            f"{', '.join(_STEPS)}."
        )
    # Here, because they need what Pallas has for TPUs.
    from codjax.bench import kernel_attention, kernel_tuning

    if tune:
        return kernel_tuning.tune(topology)
    return {
        f"cycles on {chip}, {_sizes_text(cycle_sizes)}": head_cycles(topology, cycle_sizes),
        f"cycles on {chip}, {_sizes_text(large_sizes)}": head_cycles(
            topology, large_sizes, without=_TOO_LARGE
        ),
        f"memory on {chip}, {_sizes_text(memory_sizes)}": head_memory(topology, memory_sizes),
        f"attention on {chip}: 4 segments of 512 against a plain row of 2,048": (
            kernel_attention.packed_against_plain(
                topology, num_tokens=2048, segment=512, num_heads=8, num_kv_heads=2
            )
        ),
        f"compiling for {chip}, {_sizes_text(model_sizes)}; attention T {model_tokens:,}": list(
            compiled_models(topology, model_sizes, model_tokens)
        ),
        "the learner's step, Qwen3-8B": [compiled_step(chip)],
    }


def head_programs(sizes: tuple[int, int, int], *, block_rows: int) -> dict[str, Program]:
    """The programs of the vocabulary head, by name; `block_rows` is the size of XLA's chunks."""
    given = programs.training_shapes(*sizes)
    table_DV = programs.shape(*given.table.shape[::-1], dtype=given.table.dtype)
    by, trained = functools.partial, programs.differentiated
    chunks = by(programs.rematerialised_chunks, chunk_size=block_rows)
    in_forward = programs.made_in_forward
    forward = (given.hidden, given.table, given.targets)
    training = (given,)
    return {
        "forward, ours": Program(
            by(programs.by_statistics, implementation=_OURS), forward, products=1
        ),
        "forward, tokamax": Program(
            programs.tokamax_scores,
            (given.hidden, table_DV, given.targets),
            products=1,
            needs="tokamax",
        ),
        "forward, whole logits": Program(programs.whole_logits, forward, products=1),
        "forward, chunks": Program(chunks, forward, products=1),
        "training, ours, gradient in forward": Program(
            by(in_forward, implementation=_OURS), training, products=3
        ),
        "training, ours, recomputing": Program(
            by(programs.recomputed_with_mean, implementation=_OURS), training, products=4
        ),
        "training, ours, with entropy's gradient": Program(
            by(programs.recomputed, implementation=_OURS, entropy_coefficient=0.01),
            training,
            products=5,
        ),
        "training, ours in XLA, gradient in forward": Program(
            by(in_forward, implementation="xla"), training, products=3
        ),
        "training, tokamax": Program(
            programs.tokamax_training,
            (given._replace(table=table_DV),),
            products=4,
            needs="tokamax",
        ),
        "training, whole logits": Program(
            by(trained, scores=programs.whole_logits), training, products=3
        ),
        "training, chunks": Program(by(trained, scores=chunks), training, products=4),
    }


def head_cycles(
    topology: str, sizes: tuple[int, int, int], *, without: Collection[str] = ()
) -> list[Row]:
    """Simulated cycles of the vocabulary head, of all programs but some."""
    num_entries, width, vocab = sizes
    chip = topologies.chip_of(topology)
    compared = head_programs(sizes, block_rows=min(_BLOCK_ROWS, num_entries // 2))
    for name in without:
        del compared[name]
    found = {name: simulated(name, one, topology) for name, one in compared.items()}
    product = chip.matrix_cycles(2 * num_entries * width * vocab)
    rows: list[Row] = []
    for name, one in compared.items():
        result, kind = found[name], name.partition(",")[0]
        num = result.cycles if isinstance(result, cycles.Simulation) else None
        rows.append(
            {
                "program": name,
                "products": one.products,
                "cycles": num,
                "x_bound": _ratio(num, one.products * product),
                "x_tokamax": _ratio(num, found.get(f"{kind}, tokamax", "")),
                "x_remat": _ratio(num, found[f"{kind}, chunks"]),
                "note": "" if num is not None else str(result),
            }
        )
    return rows


def head_memory(topology: str, sizes: tuple[int, int, int]) -> list[Row]:
    """Memory of the vocabulary head through the public functions, against XLA's ways."""
    given = programs.training_shapes(*sizes)
    forward = (given.hidden, given.table, given.targets)
    by, trained = functools.partial, programs.differentiated
    scores = by(programs.public_scores, implementation=_OURS)
    chunks = by(programs.rematerialised_chunks, chunk_size=_BLOCK_ROWS)
    compared: dict[str, tuple[Callable[..., Any] | None, Callable[..., Any]]] = {
        "ours, recomputing": (scores, by(trained, scores=scores)),
        "ours, gradient in forward": (
            None,
            by(programs.public_token_loss, implementation=_OURS),
        ),
        "whole logits": (programs.whole_logits, by(trained, scores=programs.whole_logits)),
        f"chunks of {_BLOCK_ROWS:,}, remat": (chunks, by(trained, scores=chunks)),
    }

    def temporaries(run: Callable[..., Any] | None, *shapes: Any) -> float | None:
        if run is None:
            return None
        compiled = topologies.compile(run, *shapes, topology=topology)
        return topologies.memory(compiled).temporaries / _MIB

    return [
        {
            "program": name,
            "forward_mib": temporaries(score, *forward),
            "training_mib": temporaries(train, given),
        }
        for name, (score, train) in compared.items()
    ]


def compiled_models(topology: str, sizes: tuple[int, int, int], num_tokens: int) -> Iterator[Row]:
    """Every kernel through the public functions, compiled."""
    given = programs.training_shapes(*sizes)
    by = functools.partial
    scores = by(programs.public_scores, implementation=_OURS)
    heads = programs.attention_shapes(num_tokens, 32, 8, 128)
    ends = programs.shape(1, num_tokens, dtype=jnp.int32)
    compared: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "head, forward": (scores, (given.hidden, given.table, given.targets)),
        "head, training, recomputing": (by(programs.differentiated, scores=scores), (given,)),
        "head, training, gradient in forward": (
            by(programs.public_token_loss, implementation=_OURS),
            (given,),
        ),
        "head, divergence from a teacher": (
            programs.public_divergence,
            (given, (given.hidden, given.table)),
        ),
        "attention, forward": (programs.attention, (heads.q, heads.k, heads.v, ends)),
        "attention, training": (programs.attention_training, (heads, ends)),
    }
    for name, (run, shapes) in compared.items():
        start = time.perf_counter()
        memory = topologies.memory(topologies.compile(run, *shapes, topology=topology))
        seconds = time.perf_counter() - start
        logger.info("%s: compiled in %.1f s.", name, seconds)
        yield {
            "program": name,
            "seconds": seconds,
            "arguments_mib": memory.arguments / _MIB,
            "temporaries_mib": memory.temporaries / _MIB,
            "peak_mib": memory.peak / _MIB,
        }


def compiled_step(chip: str) -> Row:
    """The learner's micro-batch with these kernels, sharded over a slice of such chips."""
    slice_, axes, row_length = _STEPS[chip]
    row = train_step.compile_step(
        slice_,
        axes=dict(zip(sharding.MESH_AXES, axes, strict=True)),
        sizes=train_step.QWEN3_8B,
        row_length=row_length,
        scored_per_row=row_length // 2,
    )
    logger.info("%s: compiled in %.1f s.", row["step"], row["compile_s"])
    return row


def simulated(name: str, one: Program, topology: str) -> cycles.Simulation | str:
    """Cycles of a program, or why there are none."""
    if one.needs and not importlib.util.find_spec(one.needs):
        return f"{one.needs} is not installed"
    simulate = functools.partial(cycles.simulate, topology=topology, timeout_s=_SIMULATION_S)
    bounded = functools.partial(programs.bounded, run=one.run)
    runs: list[Callable[..., Any]] = [one.run]
    runs += [functools.partial(bounded, vmem_mib=bound) for bound in _VMEM_MIB]
    for run in runs:
        try:
            found = simulate(run, *one.shapes)
        except cycles.SimulatorError as error:
            logger.warning("%s: %s", name, error)
            if "out of memory in memory space vmem" not in str(error):
                break
        else:
            logger.info("%s: %s cycles in %.0f s.", name, f"{found.cycles:,}", found.seconds)
            return found
    return "not simulated: the log says why"


def _ratio(number: int | None, to: cycles.Simulation | str | float) -> float | None:
    if number is None or isinstance(to, str):
        return None
    return number / (to.cycles if isinstance(to, cycles.Simulation) else to)


def _sizes_text(sizes: tuple[int, int, int]) -> str:
    return "K {:,}, D {:,}, V {:,}".format(*sizes)
