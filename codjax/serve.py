"""SGLang servers on this machine, kept up for runs on others: `codjax serve`.

Needs neither JAX nor a checkpoint. A server that dies is started again from the same folder; the
run that uses it notices, and gives it the newest weights before it asks it again.
"""

from __future__ import annotations

import asyncio
import os
import pathlib
import signal

from ml_collections import ConfigDict

from codjax import checks
from codjax.rollout.sglang import pool, settings


def main(config: ConfigDict, model: str | None, workdir: str) -> None:
    """Runs the servers of `server.local` until SIGTERM or Ctrl-C; leaves none behind.

    Args:
        config: of the run that will use them.
        model: Hugging Face folder to start from; None: `model.source`.
        workdir: logs go to its `servers/`.

    Raises:
        ConfigError: there is no such folder, or no server to start.
        ServerProcessError: a server did not start, or none could be kept up.
        KeyboardInterrupt: Ctrl-C; the servers have been ended.
    """
    checks.at_least(config.server.local, "server.local.num", 1, "codjax serve starts so many")
    folder = pathlib.Path(model or config.model.source).expanduser()
    checks.require(
        (folder / "config.json").is_file(),
        "--model" if model else "model.source",
        "be a Hugging Face folder on this machine",
        "the servers are started from it (codjax convert makes one of a checkpoint)",
        str(folder),
    )
    made = settings.process_settings(
        config.server,
        model_folder=folder.resolve(),
        log_folder=pathlib.Path(workdir).resolve() / "servers",
    )

    async def run() -> bool:
        stop = asyncio.Event()
        is_interrupted = False

        def interrupt() -> None:
            nonlocal is_interrupted
            if is_interrupted:
                os._exit(130)  # the guards end the servers
            is_interrupted = True
            stop.set()

        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, stop.set)
        loop.add_signal_handler(signal.SIGINT, interrupt)
        await pool.serve(made, stop)
        return is_interrupted

    if asyncio.run(run()):
        raise KeyboardInterrupt
