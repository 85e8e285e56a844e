"""The H100 that the GPU kernels are written for, and compiling for it on a machine without one.

`require_jax` is called by every kernel before it is traced. `compile_for_h100` needs the CUDA
plugin of jax, but neither a GPU nor its driver: XLA compiles for a described device, and ptxas
reports what each kernel takes. Nothing here says how fast a kernel runs.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies

MINIMUM_JAX = (0, 12)

# Fields of XLA's GpuTargetConfigProto; the numbers are NVIDIA's for the 80 GB SXM5 board.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  name: "NVIDIA H100 80GB HBM3"
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

# Mosaic compiles a kernel once in a process, and ptxas reports only then. Lowered text → report.
_reported: dict[str, KernelResources] = {}
_NUMBER = re.compile(r"_\d+$")


class KernelResources(NamedTuple):
    """What ptxas and Mosaic say of one kernel."""

    name: str
    registers: int  # per thread, before warpgroups trade them
    spilled_bytes: int  # stores and loads of registers that did not fit
    shared_bytes: int  # shared memory of one thread block, of 232,448


class Compiled(NamedTuple):
    """A program compiled for the H100."""

    kernels: tuple[KernelResources, ...]  # Mosaic kernels only, those of XLA are not listed
    temp_bytes: int


def require_jax() -> None:
    """Raise where jax is too old for the GPU kernels.

    Raises:
        ValueError: jax is older than MINIMUM_JAX.
    """
    version = tuple(int(part) for part in jax.__version__.split(".")[:2])
    if version < MINIMUM_JAX:
        raise ValueError(
            f"implementation 'pallas_gpu' needs jax >= 0.12 (Python >= 3.12); this is jax "
            f"{jax.__version__}: use implementation 'xla'."
        )


def compile_for_h100(function: Callable[..., Any], *shapes: Any) -> Compiled:
    """The program of `function` on one H100, and what its kernels take; no GPU is needed.

    A kernel that occurs several times in the program is listed once.

    Args:
        function: what would be jitted.
        shapes: its arguments as `jax.ShapeDtypeStruct`, or trees of them.

    Raises:
        ValueError: jax is too old.
        RuntimeError: jax's CUDA plugin is not installed, or a kernel has run in this process.
    """
    require_jax()
    mesh = _h100_mesh()
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    placed = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated), shapes
    )
    with tempfile.TemporaryDirectory() as folder, _dumping(folder):
        # Kernels ask for the device that they are traced for; a function of our own, because what
        # jax has lowered before leaves no dumps.
        own = functools.partial(function)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            traced = jax.jit(own).trace(*placed)
            executable = traced.lower(lowering_platforms=("cuda",)).compile()
        kernels = _resources(pathlib.Path(folder))
    memory = executable.memory_analysis()
    return Compiled(
        kernels=kernels,
        temp_bytes=memory.temp_size_in_bytes,
    )


def _h100_mesh() -> jax.sharding.Mesh:
    """One described H100 as a mesh.

    Raises:
        RuntimeError: jax's CUDA plugin is not installed.
    """
    if not any(importlib.util.find_spec(f"jax_cuda{toolkit}_plugin") for toolkit in (12, 13)):
        raise RuntimeError(
            "compiling for an H100 needs jax's CUDA plugin, which is not installed: "
            "pip install 'jax[cuda13]>=0.12' (4.4 GB; no GPU or driver is needed)."
        )
    # Read once, when the plugin is loaded: without a driver its version check would fail.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    described = topologies.get_topology_desc("", "cuda", target_config=H100, topology="1x1x1")
    return jax.sharding.Mesh(
        np.array(described.devices[:1]), ("x",), axis_types=(jax.sharding.AxisType.Explicit,)
    )


@contextlib.contextmanager
def _dumping(folder: str) -> Iterator[None]:
    """Mosaic writes its dumps to `folder`, and nothing comes out of a compilation cache."""
    name, cache = "MOSAIC_GPU_DUMP_TO", "jax_enable_compilation_cache"
    before, cached = os.environ.get(name), jax.config.values[cache]
    os.environ[name] = folder
    jax.config.update(cache, False)
    try:
        yield
    finally:
        jax.config.update(cache, cached)
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _resources(folder: pathlib.Path) -> tuple[KernelResources, ...]:
    """What the dumps of one compilation say of each kernel.

    Lowering and ptxas number their dumps separately, but in the same order for each name.

    Raises:
        RuntimeError: a kernel was compiled earlier, outside of this module.
    """
    found: dict[str, list[str]] = {}  # name → lowered text of its different kernels
    shared = {}
    for path in _numbered(folder, ".after_layout_inference.txt"):
        stem = path.name.removesuffix(".after_layout_inference.txt")
        text = path.read_text().replace(stem, "")
        shared[text] = (folder / f"{stem}.resources.txt").read_text()
        texts = found.setdefault(_NUMBER.sub("", stem), [])
        if text not in texts:
            texts.append(text)
    reports: dict[str, list[str]] = {}
    for path in _numbered(folder, ".ptxas"):
        reports.setdefault(_NUMBER.sub("", path.stem), []).append(path.read_text())
    for name, texts in found.items():
        new = [text for text in texts if text not in _reported]
        if len(new) != len(reports.get(name, [])):
            raise RuntimeError(
                f"no report of kernel {name!r}: this process compiled it before; call "
                "compile_for_h100 before the kernel runs, or in a process of its own."
            )
        for text, report in zip(new, reports.get(name, []), strict=True):
            _reported[text] = _parse(name, report, shared[text])
    return tuple(_reported[text] for texts in found.values() for text in texts)


def _numbered(folder: pathlib.Path, suffix: str) -> list[pathlib.Path]:
    """Files ``name_number`` with this suffix, by number."""
    paths = [path for path in folder.iterdir() if path.name.endswith(suffix)]
    return sorted(paths, key=lambda path: int(path.name.removesuffix(suffix).rsplit("_", 1)[1]))


def _parse(name: str, ptxas: str, resources: str) -> KernelResources:
    """Numbers out of the report of ptxas and Mosaic's list of resources."""
    spilled = re.findall(r"stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", ptxas)
    return KernelResources(
        name=name,
        registers=int(re.findall(r"Used (\d+) registers", ptxas)[0]),
        spilled_bytes=sum(int(count) for count in spilled[0]),
        shared_bytes=int(re.findall(r"smem_scratch_bytes=(\d+)", resources)[0]),
    )
