"""The project's benchmarks: `codjax bench [NAME] [--output=FILE.json]`.

    learner    seconds and memory of an update, against the trainers that one would write first
    loss_head  loss and gradient over the vocabulary, against whole logits and chunks of them
    tunix      a whole GRPO step, against Tunix
    engine     the in-process sampler with and without prefix reuse
    rollout    what the rollout layer itself costs per model call
    forests    operations of an update with and without prefix forests, counted
    kernels    cycles and memory of the kernels as the TPU compiler says, without a TPU

A benchmark is a function from its sizes, keyword arguments with defaults, to rows of a table. It
runs its variants in turn, round after round, so that a busy machine hurts all of them alike, gives
medians, and refuses to give any if the variants do not compute the same. docs/benchmarks.md holds
measured tables and how to read them.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import inspect
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import rich.console
import rich.table

from codjax.bench import forests, kernels, loss_head, rollouts, sampling, tunix_step, updates
from codjax.bench.material import Row
from codjax.checks import ConfigError

Tables = dict[str, list[Row]]  # by title, for a benchmark of more than one

BENCHES: dict[str, Callable[..., list[Row] | Tables]] = {
    "learner": updates.bench,
    "loss_head": loss_head.bench,
    "tunix": tunix_step.bench,
    "engine": sampling.bench,
    "rollout": rollouts.bench,
    "forests": forests.bench,
    "kernels": kernels.bench,
}

_PACKAGES = ("codjax", "jax", "jaxlib", "flax", "numpy", "optax")


def main(name: str | None, output: str | None, **arguments: Any) -> dict[str, Any]:
    """Runs one benchmark or all, prints their tables, and writes the numbers if asked to.

    Args:
        name: a key of `BENCHES`; None for all of them, one after the other.
        output: JSON file to write; None for none.
        **arguments: of the one benchmark, in place of its defaults.

    Returns:
        What the file holds: where and of what the numbers are, then sizes and rows by benchmark.
    """
    report: dict[str, Any] = circumstances() | {"benches": {}}
    console = rich.console.Console()
    for chosen in BENCHES if name is None else [name]:
        try:
            rows = BENCHES[chosen](**arguments)
        except ConfigError as error:  # it needs what is not installed here
            if name is not None:
                raise
            console.print(f"{chosen} is left out: {error}")
            continue
        report["benches"][chosen] = {
            "sizes": _sizes(BENCHES[chosen]) | arguments,
            "rows": rows,
        }
        if output is not None:  # before anything else: some take an hour
            path = pathlib.Path(output)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        for title, part in (rows if isinstance(rows, dict) else {chosen: rows}).items():
            console.print(table(title, part))
    return report


def table(title: str, rows: Sequence[Row]) -> rich.table.Table:
    """Rows as a table for people: a column a row, unless they are more than their numbers."""
    label, *keys = rows[0]
    if len(rows) > len(keys):
        long = rich.table.Table(label, title=title)
        for key in keys:
            long.add_column(key, justify="left" if isinstance(rows[0][key], str) else "right")
        for row in rows:
            long.add_row(*(_text(value) for value in row.values()))
        return long
    made = rich.table.Table(label, *(str(row[label]) for row in rows), title=title)
    for column in made.columns[1:]:
        column.justify = "right"
    for key in keys:
        made.add_row(key, *(_text(row[key]) for row in rows))
    return made


def circumstances() -> dict[str, Any]:
    """What a number must be read with: command, date, commit, versions, machine and its load."""
    device = jax.devices()[0]
    return {
        "command": shlex.join(["codjax", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _PACKAGES},
        },
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)),
            "device": f"{device.platform}: {device.device_kind}",
            "load_average_at_start": os.getloadavg()[0],
        },
    }


def _text(value: str | float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else value


def _sizes(function: Callable[..., Any]) -> dict[str, Any]:
    """The default of every argument, which is what `main` runs with."""
    parameters = inspect.signature(function).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters}


def _commit() -> str | None:
    """Of the checkout that this file is in, marked if it has changes; None outside of one."""

    def git(*arguments: str) -> str:
        folder = pathlib.Path(__file__).parent
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return commit + (" with uncommitted changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):  # no git, or installed from a wheel
        return None


def _processor() -> str:
    """The processor's own name for itself, where Linux tells it."""
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
