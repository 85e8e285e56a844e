"""The programs of an update, compiled for devices that are not there, and what is read off them."""

from __future__ import annotations

import contextlib
import pathlib
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from codjax_kernels import hlo, topologies
from jax.experimental.compilation_cache import compilation_cache

_GIB = 2**30


def compile_program(
    traced: jax.stages.Traced, mesh: jax.sharding.Mesh, *, unknown_trips: int
) -> dict[str, Any]:
    """Memory, operations, bytes and collectives of a program, for one device.

    Args:
        traced: of `Learner.trace`.
        mesh: that it was traced for.
        unknown_trips: as for `hlo.collectives`.

    Returns:
        As docs/file_formats.md says of a program; without memory where the compiler refused, and
        then with what it said.
    """
    begin = time.perf_counter()
    lowered = traced.lower(lowering_platforms=(mesh.devices.flat[0].platform,))
    try:
        made, text = _compile_with_text(lowered)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {
            "compile_s": time.perf_counter() - begin,
            "memory": None,
            "refused": _first_line(str(error)),
            "xla": None,
            "memory_bytes": None,
            "collectives": [],
        }
    seconds = time.perf_counter() - begin
    program = hlo.parse(text)
    analysis = made.cost_analysis() or {}
    return {
        "compile_s": seconds,
        "memory": topologies.memory(made)._asdict(),
        "refused": None,
        "xla": {
            "flops": analysis.get("flops"),
            "bytes_accessed": analysis.get("bytes accessed"),
        },
        "num_kernels": text.count('custom_call_target="tpu_custom_call"'),
        "memory_bytes": hlo.memory_bytes(program, unknown_trips=unknown_trips),
        "collectives": by_kind_and_axes(
            hlo.collectives(program, unknown_trips=unknown_trips), dict(mesh.shape)
        ),
    }


def _compile_with_text(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, str]:
    """The program and its text, as the compiler writes it to a file.

    `Compiled.as_text` rebuilds the text from the executable, and cannot for v5p: it refuses
    transfers that go on beside other work in several pieces.
    """
    with tempfile.TemporaryDirectory(prefix="codjax-plan-") as folder:
        options: dict[str, str | bool] = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        with _without_cache():
            made = lowered.compile(compiler_options=options)
        (path,) = pathlib.Path(folder).glob("*.after_optimizations.txt")
        return made, path.read_text(encoding="utf-8")


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    """No persistent compilation cache: what it holds has no text and needs devices to be read."""
    was_on = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", was_on)
        compilation_cache.reset_cache()


def by_kind_and_axes(
    found: list[hlo.Collective], mesh_shape: dict[str, int]
) -> list[dict[str, Any]]:
    """Collectives summed by kind and by the mesh axes that they run along, most bytes first."""
    groups: dict[tuple[str, tuple[str, ...]], list[hlo.Collective]] = defaultdict(list)
    for one in found:
        groups[one.kind, axes_of(one.groups, mesh_shape)].append(one)
    rows = [
        {
            "kind": kind,
            "axes": list(axes),
            "count": sum(one.times for one in members),
            "received_bytes": sum(one.times * one.received_bytes for one in members),
            "largest": max(members, key=lambda one: one.times * one.received_bytes).name,
        }
        for (kind, axes), members in groups.items()
    ]
    return sorted(rows, key=lambda row: -float(row["received_bytes"]))


def axes_of(groups: np.ndarray, mesh_shape: dict[str, int]) -> tuple[str, ...]:
    """Mesh axes along which the devices of a group differ; of size 1 none, unreadable "?".

    >>> axes_of(np.array([[0, 2], [1, 3]]), {"data": 2, "tensor": 2})
    ('data',)
    """
    if not groups.size:
        return ("?",)
    places = np.stack(np.unravel_index(groups, tuple(mesh_shape.values())))
    differs = (places != places[:, :, :1]).any(axis=(1, 2))
    return tuple(axis for axis, cut in zip(mesh_shape, differs, strict=True) if cut)


def _first_line(message: str) -> str:
    """What the compiler says of the memory, without its advice."""
    found = re.search(r"[^:\n]*Ran out of memory[^\n]*", message)
    return (found[0] if found else message.splitlines()[0]).strip()
