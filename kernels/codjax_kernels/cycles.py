"""Simulated cycles: how long a program would take on a TPU, as its compiler counts.

The TPU compiler can estimate each operation of what it compiled, Pallas kernels included, from
the scheduled instructions, a model of the memory transfers and the lengths of loops and grids.
No measurement on a device stands behind it: cycles compare programs compiled side by side, and
are no milliseconds. `simulate` runs the compiler in a process of its own, because the simulator
aborts the process on operations that it has no model of (gathers among them).

    simulate(functools.partial(norm, epsilon=1e-6), shape, topology="v5e").cycles

What to keep in mind:

* Time and memory of the simulator grow with the steps of a grid (about 14 MB and 0.25 s a step):
  give it small problems, which have the same blocks and fewer of them.
* A grid or a loop whose length is known only at run time cannot be counted.
* Transfers in the two directions do not slow each other in the model, so that a program bound by
  memory looks up to twice as fast as it is: hold it against `Chip.hbm_bytes_per_s`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import pickle
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from codjax_kernels import hlo, topologies

_REQUEST, _ANSWER, _PROFILES = "request.pickle", "answer.json", "profiles"
# Of the memory that is available: a simulation that outgrows it ends itself, not its neighbours.
_MAX_SHARE = 0.75


@dataclasses.dataclass(frozen=True, kw_only=True)
class Simulation:
    """What the compiler estimates of one program.

    Attributes:
        cycles: of all operations, one after the other.
        by_operation: cycles by the name that an operation has in the compiled program, over all
            its repetitions in loops; those that take none are left out.
        memory: what the program takes.
        seconds: how long tracing, compiling and simulating took.
    """

    cycles: int
    by_operation: Mapping[str, int]
    memory: topologies.Memory
    seconds: float


class SimulatorError(RuntimeError):
    """The compiler could not compile or simulate the program."""


def simulate(
    function: Callable[..., Any], *shapes: Any, topology: str = "v5e", timeout_s: float = 600.0
) -> Simulation:
    """Cycles that the function would take on one device of a topology.

    Args:
        function: a function of a module, or a `functools.partial` of one: another process imports
            it by its name.
        *shapes: its arguments, trees of `jax.ShapeDtypeStruct`.
        topology: as for `topologies.compile`.
        timeout_s: seconds after which the process is ended.

    Raises:
        ValueError: there is no such topology.
        ModuleNotFoundError: libtpu is not installed.
        SimulatorError: the program cannot be compiled or has no model, or time ran out.
    """
    topologies.devices(topology)
    with tempfile.TemporaryDirectory(prefix="codjax-cycles-") as name:
        folder = pathlib.Path(name)
        (folder / _PROFILES).mkdir()
        (folder / _REQUEST).write_bytes(pickle.dumps((function, shapes, topology)))
        command = [sys.executable, "-m", "codjax_kernels.cycles", str(folder)]
        try:
            done = subprocess.run(
                command,
                env=_environment(folder / _PROFILES),
                capture_output=True,
                text=True,
                check=False,
                timeout=timeout_s,
            )
        except subprocess.TimeoutExpired as error:
            raise SimulatorError(
                f"the simulation for {topology!r} took longer than timeout_s = {timeout_s:g}: "
                "try a smaller problem, whose grids have fewer steps."
            ) from error
        if done.returncode:
            raise SimulatorError(_what_failed(done, topology))
        answer = json.loads((folder / _ANSWER).read_text())
    return Simulation(**answer | {"memory": topologies.Memory(**answer["memory"])})


def cycles_by_operation(text: str) -> dict[str, int]:
    """Estimates in the text of a compiled program, by operation, loops multiplied out.

    Args:
        text: `compiled.as_text()` of a compiler that was told to simulate. Loops must count from 0
            in steps of 1 up to a constant, as those of `lax.scan` and `lax.map` do. Of a
            conditional, the costliest branch counts.

    Raises:
        ValueError: the length of a loop is not in the text.
    """
    program = hlo.parse(text)
    return dict(_walk(program, program.entry, times=1))


def _walk(program: hlo.Program, name: str, *, times: int) -> Iterator[tuple[str, int]]:
    for line in program.computations[name]:
        operation = re.match(r"\s+(?:ROOT )?%([\w.\-]+) = ", line)
        estimate = re.search(r'"bundle_analysis_data":\{"estimated_cycles":"(\d+)"', line)
        if operation and estimate and estimate[1] != "0":
            yield operation[1], times * int(estimate[1])
        elif loop := re.search(r" while\(.*condition=%[\w.\-]+, body=%([\w.\-]+)", line):
            yield from _walk(program, loop[1], times=times * _trips(program, line))
        elif " conditional(" in line:
            named = re.findall(r"(?:true|false)_computation=%([\w.\-]+)", line)
            listed = re.search(r"branch_computations=\{([^}]*)\}", line)
            named += re.findall(r"%([\w.\-]+)", listed[1]) if listed else []
            branches = [list(_walk(program, branch, times=times)) for branch in named]
            yield from max(branches, key=lambda branch: sum(cost for _, cost in branch))
        elif called := re.search(r" (?:call|async-start)\(.*(?:to_apply|calls)=%([\w.\-]+)", line):
            yield from _walk(program, called[1], times=times)


def _trips(program: hlo.Program, loop: str) -> int:
    turns = hlo.trips(program, loop)
    if turns is None:
        raise ValueError(
            f"the loop {loop.strip():.60} has no constant length, so its cycles cannot be counted: "
            "give it a static number of steps."
        )
    return turns


def _environment(profiles: pathlib.Path) -> dict[str, str]:
    """Of the process that simulates: libtpu reads its options once, when it is loaded."""
    options = os.environ.get("LIBTPU_INIT_ARGS", "")
    return os.environ | {
        "LIBTPU_INIT_ARGS": f"{options} --xla_jf_dump_static_llo_profile_to={profiles}".strip(),
        "PYTHONPATH": os.pathsep.join(os.path.abspath(folder) for folder in sys.path),
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "0",  # what is found there was not simulated
    }


def _what_failed(done: subprocess.CompletedProcess[str], topology: str) -> str:
    # "RAW": the crash handler talking about itself.
    said = [line for line in done.stderr.splitlines() if line.strip() and " RAW: " not in line][-8:]
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        reason = (
            f"{name} ended the TPU compiler for {topology!r}, as when its simulator has no model "
            "of an operation (a gather, for one: select by comparison instead) or needs more "
            "memory than there is (a grid of hundreds of steps: try a smaller problem)"
        )
    else:
        reason = f"the program cannot be compiled or simulated for {topology!r}"
    return "\n".join([f"{reason}. It said:", *said])


def _answer_request(folder: pathlib.Path) -> None:
    """What the process of `simulate` does."""
    limit = int(_MAX_SHARE * _available_bytes())
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    function, shapes, topology = pickle.loads((folder / _REQUEST).read_bytes())
    start = time.perf_counter()
    compiled = topologies.compile(function, *shapes, topology=topology)
    by_operation = cycles_by_operation(compiled.as_text() or "")
    answer = {
        "cycles": sum(by_operation.values()),
        "by_operation": by_operation,
        "memory": topologies.memory(compiled)._asdict(),
        "seconds": time.perf_counter() - start,
    }
    (folder / _ANSWER).write_text(json.dumps(answer))


def _available_bytes() -> int:
    """Memory that Linux could give without swapping; libtpu runs nowhere else."""
    lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    return next(1024 * int(x.split()[1]) for x in lines if x.startswith("MemAvailable"))


if __name__ == "__main__":
    _answer_request(pathlib.Path(sys.argv[1]))
