"""Several processes that train as one: join, agree, gather, leave together.

    initialize(autodetect=True)               # before any device is touched; once per process
    groups = merge(gather(sample(share(packs))))           # each its share, then all know all
    sampler.load_weights(local_weights(state.params), …)   # sharded over hosts → on this one
    with StopRequest() as stop:
        …
        if stop.is_asked():                   # SIGTERM anywhere: the same answer everywhere

With one process every function here is the identity, or nearly so, and no collective runs.
Collectives are called by the main thread alone, in the same order on every process; a thread
that samples ahead talks to its own devices only.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pathlib
import pickle
import secrets
import signal
import sys
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from codjax import checks, sharding

Item = TypeVar("Item")

VARIABLES = ("CODJAX_COORDINATOR", "CODJAX_NUM_PROCESSES", "CODJAX_PROCESS_ID")
JOIN_S = 300  # how long to wait for all processes at the start
HEARTBEAT_S = 60  # a process that was silent for so long is dead, and all others are ended
_LEAVE_S = 5  # how long a process that failed waits for the others to fail too
_GATHER_BYTES = 64 << 20  # of a device that one round of `gather` may take


def initialize(*, autodetect: bool) -> None:
    """Joins the other processes of the run, if there are any.

    Where `VARIABLES` are set, they say who the others are. Otherwise, with `autodetect`, JAX asks
    the surroundings: the metadata of a TPU pod, the variables of GKE, multi-slice, SLURM or Open
    MPI. Must be called before anything that touches a device.

    Args:
        autodetect: whether to ask the surroundings.

    Raises:
        ConfigError: the variables are incomplete or wrong, there is nothing to detect, or there are
            others that nobody asked to join.
    """
    given = _explicit(os.environ)
    if given is None and not autodetect:
        _check_alone(os.environ)
        return
    # One mechanism for SIGTERM, `StopRequest`; JAX's own would swallow the signal from here on.
    jax.config.update("jax_enable_preemption_service", False)
    if "JAX_CPU_COLLECTIVES_IMPLEMENTATION" not in os.environ:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    limits: dict[str, Any] = {
        "initialization_timeout": JOIN_S,
        "heartbeat_timeout_seconds": HEARTBEAT_S,
    }
    if given is not None:
        # Only what was given: the variables of a batch system around us mean something else.
        jax.distributed.initialize(**given, **limits, cluster_detection_method="deactivate")
        return
    try:
        jax.distributed.initialize(**limits)
    except ValueError as error:  # "coordinator_address should be defined."
        raise checks.ConfigError(
            "--distributed=true found no cluster around it (TPU pod, GKE, SLURM, Open MPI): start "
            f"it there, or set {', '.join(VARIABLES)}."
        ) from error


def _explicit(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Arguments of `jax.distributed.initialize` from our variables; None if none is set."""
    missing = [name for name in VARIABLES if not environment.get(name)]
    if len(missing) == len(VARIABLES):
        return None
    if missing:
        raise checks.ConfigError(
            f"{' and '.join(missing)} must be set too: {', '.join(VARIABLES)} go together "
            "(host:port of process 0, how many processes, which one this is)."
        )
    coordinator, *numbers = (environment[name] for name in VARIABLES)
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise checks.ConfigError(
            f"CODJAX_COORDINATOR must be host:port of process 0; got {coordinator!r}."
        )
    if not all(number.isdecimal() for number in numbers) or int(numbers[1]) >= int(numbers[0]):
        raise checks.ConfigError(
            "CODJAX_PROCESS_ID must be a number from 0 to CODJAX_NUM_PROCESSES - 1; got "
            f"{numbers[1]!r} of {numbers[0]!r}."
        )
    return {
        "coordinator_address": coordinator,
        "num_processes": int(numbers[0]),
        "process_id": int(numbers[1]),
    }


def _check_alone(environment: Mapping[str, str]) -> None:
    """Raises ConfigError if srun, mpirun or a TPU pod started this process as one of several."""
    # Of the step that we are in: SLURM_NTASKS is also set where one process has a job to itself.
    counts = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    signs = [name for name in counts if environment.get(name, "1") != "1"]
    signs += [name for name in ("TPU_WORKER_HOSTNAMES",) if "," in environment.get(name, "")]
    if signs:
        raise checks.ConfigError(
            f"--distributed=true must be given: {signs[0]}={environment[signs[0]]} says that this "
            "is one of several processes, which would all train alone in one workdir; where that "
            f"is meant, each in its own, start them with env -u {signs[0]}."
        )


def num_processes() -> int:
    """How many processes train together; touches no device where this one is alone."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def process_index() -> int:
    """Which of them this one is, from 0."""
    return jax.process_index() if jax.distributed.is_initialized() else 0


def is_main() -> bool:
    """Whether this process writes the files of the run."""
    return process_index() == 0


def check_joined() -> None:
    """Raises ConfigError if there are other processes that nobody asked to join."""
    if not jax.distributed.is_initialized():
        _check_alone(os.environ)
    if num_processes() != jax.process_count():
        raise checks.ConfigError(
            f"--distributed=true must be given here: the devices belong to {jax.process_count()} "
            "processes, each of which must run the same command."
        )


def share(items: Sequence[Item]) -> list[Item]:
    """What this process does of what all do: every P-th item, from its own index on."""
    return list(items[process_index() :: num_processes()])


def merge(parts: Sequence[Sequence[Item]]) -> list[Item]:
    """The shares of all processes, in the order of the items that they were made from.

    >>> merge([["a", "c", "e"], ["b", "d"]])
    ['a', 'b', 'c', 'd', 'e']
    """
    total = sum(map(len, parts))
    return [parts[index % len(parts)][index // len(parts)] for index in range(total)]


def gather(value: Item) -> list[Item]:
    """The values of all processes, in their order, on every one of them.

    The values travel as compressed pickles over the devices' own network, in rounds that take at
    most `_GATHER_BYTES` of a device.
    """
    if num_processes() == 1:
        return [value]
    payload = np.frombuffer(zlib.compress(pickle.dumps(value), level=1), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(payload)))
    parts = [bytearray() for _ in sizes]
    # Powers of two, so that few programs are compiled.
    longest = 1 << (int(sizes.max()) - 1).bit_length()
    length = min(max(longest, 1024), _GATHER_BYTES // len(sizes))
    for begin in range(0, int(sizes.max()), length):
        piece = np.zeros(length, np.uint8)
        mine = payload[begin : begin + length]
        piece[: len(mine)] = mine
        for part, found in zip(parts, multihost_utils.process_allgather(piece), strict=True):
            part.extend(found.tobytes())
    return [
        pickle.loads(zlib.decompress(bytes(part[:size])))
        for part, size in zip(parts, sizes, strict=True)
    ]


def on_main(function: Callable[[], Item]) -> Item:
    """What the function returns on the first process, or its ConfigError, on all processes."""
    result: Any = None
    problem: checks.ConfigError | None = None
    if is_main():
        try:
            result = function()
        except checks.ConfigError as error:
            problem = error
    result, message = gather((result, problem and str(problem)))[0]
    if message is not None:
        raise problem or checks.ConfigError(message)
    return result


def on_all(function: Callable[[], Item]) -> Item:
    """What the function returns here, unless it raises ConfigError anywhere: then on all of them.

    Args:
        function: called on every process; it must not talk to the others.
    """
    result: Any = None
    problem: checks.ConfigError | None = None
    try:
        result = function()
    except checks.ConfigError as error:
        problem = error
    for index, message in enumerate(gather(problem and str(problem))):
        if message is not None:
            raise problem or checks.ConfigError(f"on process {index}, {message}")
    return result


def tell(problem: Exception, *, autodetect: bool) -> None:
    """Joins the others, which wait for this process, and has them raise its problem in `on_all`.

    Args:
        problem: the ConfigError for which this process cannot take part; nothing happens if it has
            joined already.
        autodetect: as for `initialize`.
    """

    def fail() -> None:
        raise problem

    if jax.distributed.is_initialized():
        return
    try:
        initialize(autodetect=autodetect)
        on_all(fail)
    except (checks.ConfigError, RuntimeError):  # told, or nobody there
        pass


def check_equal(value: str, what: str) -> None:
    """Raises ConfigError unless all processes were given the same.

    Args:
        value: to compare.
        what: its name, for the message.
    """
    found = gather(hashlib.sha256(value.encode()).hexdigest())
    different = [index for index, digest in enumerate(found) if digest != found[0]]
    if different:
        raise checks.ConfigError(
            f"{what} must be the same on all processes; on process "
            f"{', '.join(map(str, different))} it is not that of process 0: start all of them "
            "with the same files and flags."
        )


def check_shared(folder: pathlib.Path) -> None:
    """Raises ConfigError unless all processes see the same folder, which must exist on the first.

    Process 0 writes the run's files, and all write their parts of a checkpoint there.
    """
    if num_processes() == 1:
        return
    probe = folder / on_main(lambda: f".codjax-probe-{secrets.token_hex(8)}")
    if is_main():
        probe.touch()
    gather(None)  # it has been written
    found = gather(probe.exists())
    if is_main():
        probe.unlink()
    blind = [str(index) for index, is_there in enumerate(found) if not is_there]
    if blind:
        raise checks.ConfigError(
            f"--workdir={folder} must be one folder that all processes see, such as one on NFS, "
            f"Filestore or Lustre; process {', '.join(blind)} sees another one."
        )


def sampling_mesh(mesh: Mesh) -> Mesh:
    """Where the in-process sampler runs: the whole mesh, or the first device of this process."""
    return mesh if num_processes() == 1 else sharding.one_device(jax.local_devices()[0])


def local_weights(params: Any) -> Any:
    """A copy of the parameters for the sampler, which the learner's next update leaves alone.

    With one process it lies as the parameters do. With more, every device gets all of them for a
    moment and the sampler keeps those of its own: a model must fit on one device to be sampled
    here. What does not fit is for a server.

    Args:
        params: on the mesh of all processes.
    """
    if num_processes() == 1:
        return jax.tree.map(jnp.copy, params)
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    device = jax.local_devices()[0]
    return jax.tree.map(
        lambda x: next(s.data for s in x.addressable_shards if s.device == device),
        _everywhere(mesh)(params),
    )


@functools.cache  # a mesh has one such program for the whole run
def _everywhere(mesh: Mesh) -> Callable[[Any], Any]:
    """A function that copies a tree to every device of the mesh, whole."""
    # A copy: where the parameters lie whole already, jit would hand their own buffers on.
    return jax.jit(
        lambda tree: jax.tree.map(jnp.copy, tree),
        out_shardings=NamedSharding(mesh, PartitionSpec()),
    )


class StopRequest:
    """Owns the answer to SIGTERM while a run can stop at a step: a context manager.

    The first SIGTERM is noted, the second ends the process as it would have without. Outside
    the main thread, where Python takes no signals, it notes nothing.

    Attributes:
        is_noted: whether this process was asked; the others may not know yet.
    """

    def __init__(self) -> None:
        self.is_noted = self._is_installed = False
        self._before: Any = None

    def is_asked(self) -> bool:
        """Whether any process was asked to stop; all must call it, and get the same answer."""
        return any(gather(self.is_noted))

    def _note(self, number: int, _: FrameType | None) -> None:
        self.is_noted = True
        signal.signal(number, self._before or signal.SIG_DFL)

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
            self._is_installed = True
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_installed:
            signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)


def finish() -> None:
    """Takes leave of the other processes, once all have done their work."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def leave(status: int) -> None:
    """Ends this process at once, if it is one of several, after a failure.

    The others may be inside a collective that waits for us: to leave as usual would wait for them
    and they for us. All that failed of the same cause are given a moment to leave together; the
    others see the closed connection, or miss our heartbeat after `HEARTBEAT_S` and are ended.

    Args:
        status: exit status.
    """
    from jax._src import distributed  # its client is nowhere public

    # Not `num_processes`, which would look for devices where joining itself has failed.
    state: Any = distributed.global_state
    if state.client is None or state.num_processes == 1:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        state.client.wait_at_barrier("codjax-leave", timeout_in_ms=1000 * _LEAVE_S)
        # Who loses its coordinator is ended with another status than its own.
        time.sleep(0.5 if state.process_id == 0 else 0)
    except Exception:  # whatever it says, we are leaving
        pass
    os._exit(status)
