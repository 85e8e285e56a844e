"""`codjax bench kernels`, the attention table: a packed row against a plain one.

The kernels walk a list of pairs of blocks that stands in scalar memory. The simulator executes
scalar instructions but reads zeros from that memory: every step would be the pair (0, 0), without
what begins and ends a run of pairs, without masks, and with no further block to load. So here the
list is compiled into the program, as a choice by the number of the step; the kernels are the same.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from codjax_kernels import cycles, pairs, topologies
from codjax_kernels.tpu import attention_alone, attention_blocks, attention_tiles, blocks
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from codjax.bench.material import Row

HEAD_DIM = 128
_SIMULATION_S = 3000.0
_COUNTED = (
    "cycles",
    "plain_cycles",
    "x_bound",
    "plain_x_bound",
    "x_pairs",
    "x_cycles",
    "share",
)

logger = logging.getLogger("codjax")


def packed_against_plain(
    topology: str, *, num_tokens: int, segment: int, num_heads: int, num_kv_heads: int
) -> list[Row]:
    """A row of packed segments against one of as many tokens that all see their past.

    Args:
        topology: what is compiled for.
        num_tokens: T of the row.
        segment: tokens in a segment; it divides T.
        num_heads: N, of size `HEAD_DIM`.
        num_kv_heads: M.

    Returns:
        A row a kernel: pairs of blocks that it visits in the packed row, those that the mask has
        something in, and those of the plain row; cycles of both; `x_bound`, the packed row's over
        what the matrix units need for the visited pairs; how many times more pairs and cycles the
        plain row has; and the share of the first that the second reaches. A kernel that the
        simulator has no model for has a note instead.
    """
    index = np.arange(num_tokens)
    packed = (index // segment * segment + segment).astype(np.int32)[None]
    plain = np.full((1, num_tokens), num_tokens, np.int32)
    chip = topologies.chip_of(topology)
    group = num_heads // num_kv_heads
    made = list[Row]()
    for kernel in attention_alone.KERNELS:
        shapes = getattr(attention_blocks.TABLE[chip.name], kernel)
        layouts = {
            name: _layout(kernel, end, shapes, group=group)
            for name, end in (("packed", packed), ("plain", plain))
        }
        visited = {name: int(layout.pairs.num_pairs) for name, layout in layouts.items()}
        row: Row = {
            "kernel": kernel,
            "pairs": visited["packed"],
            "minimal": pairs.minimal_pairs(
                packed, layouts["packed"].block_q, layouts["packed"].block_k
            ),
            "plain_pairs": visited["plain"],
        }
        made.append(row)
        try:
            counted = {
                name: kernel_cycles(kernel, end, shapes, topology, num_heads=num_heads, group=group)
                for name, end in (("packed", packed), ("plain", plain))
            }
        except cycles.SimulatorError as error:
            logger.warning("attention, %s: %s", kernel, error)
            row |= dict.fromkeys(_COUNTED) | {"note": "not simulated: the log says why"}
            continue
        block_q, block_k = layouts["packed"].block_q, layouts["packed"].block_k
        flops = 2 * attention_alone.PRODUCTS[kernel] * block_q * block_k * HEAD_DIM * num_heads
        x_pairs = visited["plain"] / visited["packed"]
        x_cycles = counted["plain"] / counted["packed"]
        row |= {
            "cycles": counted["packed"],
            "plain_cycles": counted["plain"],
            "x_bound": counted["packed"] / chip.matrix_cycles(flops * visited["packed"]),
            "plain_x_bound": counted["plain"] / chip.matrix_cycles(flops * visited["plain"]),
            "x_pairs": x_pairs,
            "x_cycles": x_cycles,
            "share": x_cycles / x_pairs,
            "note": "",
        }
    return made


def kernel_cycles(
    kernel: str,
    subtree_end: np.ndarray,
    shapes: attention_blocks.Blocks,
    topology: str,
    *,
    num_heads: int,
    group: int,
) -> int:
    """Simulated cycles of one kernel on a known forest, cut into blocks of `shapes`."""
    function, operands = attention_alone.problem(
        kernel,
        subtree_end,
        num_heads=num_heads,
        num_kv_heads=num_heads // group,
        head_dim=HEAD_DIM,
        blocks=shapes,
        vmem_bytes=blocks.CHIPS[topologies.chip_of(topology).name].vmem_bytes,
    )
    layout = _layout(kernel, subtree_end, shapes, group=group)
    scalars = (np.asarray(layout.pairs.words), np.asarray(layout.query_start))
    run = functools.partial(with_known_scalars, function=function, scalars=scalars)
    return cycles.simulate(run, *operands, topology=topology, timeout_s=_SIMULATION_S).cycles


def with_known_scalars(
    *operands: jax.Array, function: Callable[..., Any], scalars: tuple[np.ndarray, ...]
) -> Any:
    """A kernel of `attention_alone` whose scalar operands are part of the program."""
    call = functools.partial(_pallas_call, call=pl.pallas_call, known=[*map(_Known, scalars)])
    with mock.patch.object(pl, "pallas_call", call):
        return function(*operands)


class _Known:
    """Numbers that are part of the program, read like those of an array: ``numbers[index]``."""

    def __init__(self, numbers: np.ndarray) -> None:
        self._numbers = [int(number) for number in numbers]

    def __getitem__(self, index: jax.Array) -> jax.Array:
        chosen = jnp.int32(self._numbers[0])
        for position, number in enumerate(self._numbers[1:], start=1):
            chosen = jnp.where(index == position, number, chosen)
        return chosen


def _pallas_call(
    kernel: Callable[..., None],
    *,
    grid_spec: pltpu.PrefetchScalarGridSpec,
    call: Callable[..., Any],
    known: list[_Known],
    **options: Any,
) -> Callable[..., Any]:
    """`call` of a kernel with scalars in memory, as one of a kernel that knows them."""
    assert grid_spec.num_scalar_prefetch == len(known)

    def of_known(spec: pl.BlockSpec) -> pl.BlockSpec:
        index_map = spec.index_map
        if index_map is None:
            return spec
        return dataclasses.replace(spec, index_map=lambda *step: index_map(*step, *known))

    made = call(
        functools.partial(kernel, *known),
        grid=grid_spec.grid,
        in_specs=[of_known(spec) for spec in grid_spec.in_specs],
        out_specs=jax.tree.map(of_known, grid_spec.out_specs),
        scratch_shapes=grid_spec.scratch_shapes,
        **options,
    )
    return lambda *operands: made(*operands[len(known) :])


def _layout(
    kernel: str, subtree_end: np.ndarray, shapes: attention_blocks.Blocks, *, group: int
) -> attention_tiles.Layout:
    return attention_tiles.layout(
        subtree_end,
        0,
        num_queries=subtree_end.shape[1],
        group=group,
        blocks=shapes,
        key_major=kernel == "key_value_gradient",
    )
