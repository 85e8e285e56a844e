"""The least time that a program can take, by the chip's published peaks.

Floors, not predictions: nothing overlaps worse than perfectly, matrix units are never idle, and
collectives use all links of a chip at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from codjax_kernels import topologies

from codjax.plan import counts


def floor(
    program: Mapping[str, Any], hardware_flops: float, chip: topologies.Chip
) -> dict[str, Any] | None:
    """Seconds for which the matrix units, the main memory and the links are busy, on a device.

    Args:
        program: of `compiled.compile_program`.
        hardware_flops: operations of matrix products, on a device.
        chip: the device.

    Returns:
        The three, their maximum, and which it is; None of a program that was refused.
    """
    if program["memory"] is None:
        return None
    received = sum(row["received_bytes"] for row in program["collectives"])
    times = {
        "compute_s": hardware_flops / chip.flops_per_s,
        "memory_s": program["memory_bytes"] / chip.hbm_bytes_per_s,
        "links_s": received / chip.link_bytes_per_s,
    }
    bound = max(times, key=lambda name: times[name])
    return times | {"floor_s": times[bound], "bound": bound.removesuffix("_s")}


def throughput(
    programs: Mapping[str, Mapping[str, Any]],
    operations: Mapping[str, float],
    work: counts.Work,
    chip: topologies.Chip,
    num_devices: int,
) -> dict[str, float] | None:
    """Bounds that follow from the floors, with many micro-batches to an update.

    Returns:
        "microbatch_s" and "apply_s", of which an update of n micro-batches takes n and one; the
        largest share of the peak in operations of the model ("mfu"), and the most tokens and
        scored tokens a second; None if a program was refused.
    """
    floors = [program["floor"] for program in programs.values()]
    if None in floors:
        return None
    seconds = programs["accumulate"]["floor"]["floor_s"]
    return {
        "microbatch_s": seconds,
        "apply_s": programs["apply"]["floor"]["floor_s"],
        "mfu": operations["model"] / (seconds * chip.flops_per_s * num_devices),
        "tokens_per_s": work.rows * work.row_length / seconds,
        "scored_tokens_per_s": work.rows * work.scored_per_row / seconds,
    }
