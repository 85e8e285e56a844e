"""TPU topologies without a TPU: what their chips can do, and programs compiled for them.

libtpu holds the TPU compiler and needs no device for compiling, so that any machine can ask
whether a program fits a topology, how much memory it takes and what it was compiled to:

    compiled = topologies.compile(step, *shapes, topology="v5e:1x1")
    topologies.memory(compiled).temporaries

A program over several devices gets its mesh from `mesh`; shapes carry shardings over that mesh.
`cycles.py` asks the same compiler for simulated cycles. Needs `pip install libtpu`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.experimental import topologies as jax_topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

_GIB = 2**30
_MIB = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """What one JAX device of a TPU generation can do.

    A device is a chip on v5e, v5p and v6e, and one of a chip's two cores on v4 and TPU7x.

    Attributes:
        name: of the generation, as topology names begin.
        smallest: layout of the smallest topology.
        flops_per_s: peak of the matrix units, bfloat16 with float32 accumulation.
        macs_per_cycle: multiply-adds of all matrix units in a cycle.
        hbm_bytes: capacity of the main memory.
        usable_bytes: of it, what the compiler gives to a program.
        hbm_bytes_per_s: its bandwidth.
        vmem_bytes: vector memory of a core, from which kernels compute.
        link_bytes_per_s: what it can receive from its neighbours, all links together.
    """

    name: str
    smallest: str
    flops_per_s: float
    macs_per_cycle: int
    hbm_bytes: int
    usable_bytes: int
    hbm_bytes_per_s: float
    vmem_bytes: int
    link_bytes_per_s: float

    @property
    def clock_hz(self) -> float:
        """Cycles in a second, as the published peak implies."""
        return self.flops_per_s / (2 * self.macs_per_cycle)

    def matrix_cycles(self, flops: int) -> float:
        """Least cycles in which the matrix units do so many floating-point operations."""
        return flops / (2 * self.macs_per_cycle)


# Peaks, capacities and bandwidths: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, for a
# chip; halved where a chip is two devices. Matrix units: the same pages (four of 128 x 128 a core
# up to v5p, two of 256 x 256 since v6e). Vector memory: jax's `pltpu.get_tpu_info` of each. Links:
# half of the "bidirectional inter-chip interconnect bandwidth per chip" of the same pages (v5p and
# TPU7x 1200 GB/s, v6e 800; v5e's 1600 Gbit/s and v4's 2400 are of one direction). What is usable:
# what libtpu 0.0.52 calls available when it refuses a program (95.73 GiB on v5p, above its 95).
CHIPS: Mapping[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4",
            smallest="1x1x1",
            flops_per_s=275e12 / 2,
            macs_per_cycle=4 * 128 * 128,
            hbm_bytes=32 * _GIB // 2,
            usable_bytes=int(15.25 * _GIB),
            hbm_bytes_per_s=1228e9 / 2,
            vmem_bytes=16 * _MIB,
            link_bytes_per_s=300e9 / 2,
        ),
        Chip(
            name="v5e",
            smallest="1x1",
            flops_per_s=197e12,
            macs_per_cycle=4 * 128 * 128,
            hbm_bytes=16 * _GIB,
            usable_bytes=int(15.75 * _GIB),
            hbm_bytes_per_s=819e9,
            vmem_bytes=128 * _MIB,
            link_bytes_per_s=200e9,
        ),
        Chip(
            name="v5p",
            smallest="1x1x1",
            flops_per_s=459e12,
            macs_per_cycle=2 * 4 * 128 * 128,
            hbm_bytes=95 * _GIB,
            usable_bytes=int(95 * _GIB),
            hbm_bytes_per_s=2765e9,
            vmem_bytes=64 * _MIB,
            link_bytes_per_s=600e9,
        ),
        Chip(
            name="v6e",
            smallest="1x1",
            flops_per_s=918e12,
            macs_per_cycle=2 * 2 * 256 * 256,
            hbm_bytes=32 * _GIB,
            usable_bytes=int(31.24 * _GIB),
            hbm_bytes_per_s=1638e9,
            vmem_bytes=128 * _MIB,
            link_bytes_per_s=400e9,
        ),
        Chip(
            name="tpu7x",
            smallest="1x1x1",
            flops_per_s=2307e12 / 2,
            macs_per_cycle=2 * 2 * 256 * 256,
            hbm_bytes=192 * _GIB // 2,
            usable_bytes=int(94.74 * _GIB),
            hbm_bytes_per_s=7380e9 / 2,
            vmem_bytes=64 * _MIB,
            link_bytes_per_s=600e9 / 2,
        ),
    )
}

# libtpu asks the metadata server of Google's cloud which machine this is, and allows one process
# at a time on its devices. Neither has a meaning for a compiler. The last two quiet its remarks.
_WITHOUT_DEVICES = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


class Memory(NamedTuple):
    """Bytes of main memory (HBM) that a compiled program takes on each device."""

    arguments: int
    outputs: int
    temporaries: int  # without what the compiler keeps in vector memory
    peak: int  # most in use at once, arguments and outputs included


def chip_of(topology: str) -> Chip:
    """The chip that a topology name begins with.

    >>> chip_of("v5e:4x4").name, chip_of("TPU7x").name
    ('v5e', 'tpu7x')

    Raises:
        ValueError: the name has another form, or names another chip.
    """
    name, _ = _parse(topology)
    return CHIPS[name]


def devices(topology: str) -> list[jax.Device]:
    """The devices of a topology, which programs can be compiled for but not run on.

    Args:
        topology: a chip and a layout of chips, as "v5e:4x4" or "v5p:4x4x8"; the chip alone, as
            "v5e", stands for its smallest layout.

    Raises:
        ValueError: there is no such topology.
        ModuleNotFoundError: libtpu is not installed.
    """
    name, layout = _parse(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError(
            f"compiling for TPU topology {topology!r} needs the TPU compiler, which is in libtpu: "
            "pip install libtpu."
        )
    try:
        with _environment(_WITHOUT_DEVICES):
            description = jax_topologies.get_topology_desc(
                platform="tpu", topology_name=f"{name}:{layout}"
            )
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"there is no TPU topology {topology!r}: {error}. {_FORMS}") from error
    return list(description.devices)


def mesh(topology: str, axes: Mapping[str, int]) -> Mesh:
    """A mesh over all devices of a topology, laid out along its links.

    Args:
        topology: as for `devices`.
        axes: size of each axis by name, in order; their product is the number of devices.

    Raises:
        ValueError: there is no such topology, or the axes do not fit it.
    """
    available = devices(topology)
    sizes = tuple(axes.values())
    if math.prod(sizes) != len(available):
        product = " x ".join(f"{name} {size}" for name, size in axes.items())
        raise ValueError(
            f"the mesh's axes must multiply to the number of devices: {topology!r} has "
            f"{len(available)}; got {product} = {math.prod(sizes)}."
        )
    laid_out = mesh_utils.create_device_mesh(sizes, available, allow_split_physical_axes=True)
    return Mesh(laid_out, tuple(axes), axis_types=(AxisType.Auto,) * len(sizes))


def compile(
    function: Callable[..., Any],
    *shapes: Any,
    topology: str | Mesh = "v5e",
    **jit_options: Any,
) -> jax.stages.Compiled:
    """The function compiled for TPUs that need not be there; it cannot be run here.

    Pallas kernels that ask for the chip get the answer of the topology's.

    Args:
        function: what to compile; traced anew.
        *shapes: its arguments, trees of `jax.ShapeDtypeStruct`. One without a sharding is
            replicated over the mesh.
        topology: a name, for the first device of it, or a mesh of `mesh`.
        **jit_options: of `jax.jit`, such as `donate_argnums`.

    Raises:
        jax.errors.JaxRuntimeError: the compiler refuses, as for a program that does not fit the
            memory; it says which allocations are largest.
    """
    over = topology if isinstance(topology, Mesh) else _first_device(topology)
    placed = jax.tree.map(lambda shape: _placed(shape, over), shapes)
    with jax.sharding.use_abstract_mesh(over.abstract_mesh):
        traced = jax.jit(function, **jit_options).trace(*placed)
        lowered = traced.lower(lowering_platforms=("tpu",))
    return lowered.compile()


def memory(compiled: jax.stages.Compiled) -> Memory:
    """What the compiler allots; a buffer that fits the vector memory counts as nothing."""
    stats = compiled.memory_analysis()
    assert stats is not None  # the TPU compiler always tells
    return Memory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        peak=stats.peak_memory_in_bytes,
    )


_FORMS = (
    f"Names are CHIP or CHIP:LAYOUT, where CHIP is one of {', '.join(CHIPS)} and LAYOUT counts "
    "chips along two links (v5e, v6e: 1x1, 2x2, 2x4, 4x4 ... 16x16) or three (v4, v5p, tpu7x: "
    "1x1x1, 2x2x1, 2x2x2, 4x4x4 ...)."
)


def _parse(topology: str) -> tuple[str, str]:
    """Chip and layout that a name stands for."""
    found = re.fullmatch(r"(\w+)(?::(\d+(?:x\d+)+))?", topology)
    chip = CHIPS.get(found[1].lower()) if found else None
    if found is None or chip is None:
        raise ValueError(f"there is no TPU topology {topology!r}. {_FORMS}")
    return chip.name, found[2] or chip.smallest


def _first_device(topology: str) -> Mesh:
    first = np.array(devices(topology)[:1])
    return Mesh(first, ("device",), axis_types=(AxisType.Auto,))


def _placed(shape: Any, over: Mesh) -> Any:
    if getattr(shape, "sharding", None) is not None:
        return shape
    replicated = NamedSharding(over, PartitionSpec())
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=replicated)


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables set where they are not, for as long as libtpu is loaded.

    A real TPU of this machine can still be opened afterwards as if nothing had been.
    """
    ours = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]
