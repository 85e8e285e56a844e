"""Real SGLang servers on this machine's CPU: how they are started, reached and looked into.

CODJAX_SGLANG_PYTHON names the Python that has SGLang; CODJAX_SGLANG_PATH is its PYTHONPATH, with
the stand-in for native kernels. `scripts/test_sglang.sh` sets both.
"""

import asyncio
import contextlib
import dataclasses
import os
import pathlib

import pytest

from codjax.rollout.sglang import pool as pools
from codjax.rollout.sglang import processes
from codjax.rollout.sglang.server import ServerSettings
from tests.rollout.sglang import test_processes

PYTHON = os.environ.get("CODJAX_SGLANG_PYTHON")
MARKS = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(PYTHON is None, reason="CODJAX_SGLANG_PYTHON names no SGLang"),
]
PROGRAM = ("nice", "-n", "10", PYTHON or "python", "-m", "sglang.launch_server")
ARGUMENTS = (
    *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
    *("--disable-cuda-graph", "--skip-tokenizer-init", "--max-total-tokens", "16384"),
    *("--mem-fraction-static", "0.3", "--sleep-on-idle"),
)
COMMAND = (
    *(*PROGRAM, "--model-path", "{model_folder}", "--host", "{host}", "--port", "{port}"),
    *("--dtype", "float32", *ARGUMENTS),
)
ENVIRONMENT = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.environ.get("CODJAX_SGLANG_PATH", ""),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Running:
    """Servers that are ready, started from one folder.

    Attributes:
        processes: by address, as a `ServerPool` has them; the address is the name as well.
        folder: a Hugging Face folder, which nobody else writes to.
    """

    processes: dict[str, processes.ServerProcess]
    folder: pathlib.Path

    @property
    def urls(self):
        """As `ServerSettings` and `config` take them."""
        return tuple(self.processes)

    def reach(self, **changes):
        """Settings of a client, with pauses that a test can wait for."""
        made = {
            "urls": self.urls,
            "ready_timeout_s": 60.0,
            "request_timeout_s": 120.0,
            "replica_wait_s": 120.0,
            "probe_interval_s": 0.1,
            "backoff_s": 0.1,
        }
        return ServerSettings(**(made | changes))


def settings(folder, logs):
    """Of one server, on a port of its own; also where it logs and how long it may take."""
    port = test_processes.free_port()
    return processes.ProcessSettings(
        name=f"http://127.0.0.1:{port}",
        command=COMMAND,
        environment=ENVIRONMENT,
        model_folder=folder,
        port=port,
        log_file=logs / f"server-{port}.log",
        ready_timeout_s=300.0,
    )


@contextlib.contextmanager
def started(folder, logs, *, num_servers=1):
    """`Running` servers of a Hugging Face folder; they and all that they start end with this."""
    pool = pools.ServerPool([settings(folder, logs) for _ in range(num_servers)])
    asyncio.run(pool.start())
    try:
        yield Running(processes=pool.processes, folder=folder)
    finally:
        asyncio.run(pool.stop())


def pids(process):
    """The server's, then those of all processes that it started."""
    server, *others = _below(process._process.pid)  # the guard's
    return server, others


def _below(pid):
    listed = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    children = [int(child) for child in listed]
    return children + [deeper for child in children for deeper in _below(child)]
