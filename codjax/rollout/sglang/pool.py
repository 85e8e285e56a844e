"""SGLang servers on this machine, kept up.

pool = ServerPool([ProcessSettings(…), …], last_good=pusher.last_good, on_ready=…)
await pool.start()                         # all of them are ready
await pool.watch(stop)                     # a task of the owner, until `stop` is set
await pool.stop()
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import pathlib
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

from codjax.rollout.sglang import processes

_logger = logging.getLogger(__name__)


class ServerPool:
    """Local servers that are kept up. The owner runs `watch` as a task and calls `stop` at the end.

    Attributes:
        processes: by name.
        given_up: name → why it is not started any more.
    """

    def __init__(
        self,
        settings: Iterable[processes.ProcessSettings],
        *,
        last_good: Mapping[str, pathlib.Path] | None = None,
        is_idle: Callable[[str], bool] = lambda name: False,
        on_down: Callable[[str, str], None] = lambda name, error: None,
        on_ready: Callable[[str], Awaitable[None]] | None = None,
    ) -> None:
        """Nothing is started yet.

        Args:
            settings: of each server.
            last_good: server → folder to start it again from, looked up at each restart; without
                one it is the folder of its settings.
            is_idle: whether a server has no request and no push of ours in flight. Only then its
                health is probed: a busy one says so by answering, a paused one says it is not well.
            on_down: told at once that a server is down, and why; it will be started again.
            on_ready: awaited when a server was started again and is ready: the place for
                `Pusher.sync`, as it has the weights of its folder.
        """
        self.processes = {one.name: processes.ServerProcess(one) for one in settings}
        self.given_up: dict[str, str] = {}
        self._last_good = {} if last_good is None else last_good
        self._is_idle, self._on_down, self._on_ready = is_idle, on_down, on_ready

    async def start(self) -> None:
        """Start all servers, and wait until they are ready; of those that fail, none is left.

        Raises:
            processes.ServerProcessError: one of them did not start.
        """
        try:
            async with asyncio.TaskGroup() as group:
                for process in self.processes.values():
                    group.create_task(_start_ready(process))
        except BaseException as error:
            await self.stop()
            if isinstance(error, BaseExceptionGroup):
                raise error.exceptions[0] from None
            raise

    async def watch(self, stop: asyncio.Event) -> None:
        """Keep all servers up until `stop` is set.

        Raises:
            processes.ServerProcessError: every one of them was given up.
        """
        watching = asyncio.create_task(self._watch_all())
        stopped = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait([watching, stopped], return_when=asyncio.FIRST_COMPLETED)
            if watching.done():
                watching.result()  # an error of ours, or of `on_ready`
                raise processes.ServerProcessError(" ".join(self.given_up.values()))
        finally:
            await _cancelled(watching, stopped)

    async def stop(self) -> None:
        """End all servers; returns when they are gone."""
        await asyncio.gather(*(process.stop() for process in self.processes.values()))

    async def _watch_all(self) -> None:
        async with asyncio.TaskGroup() as group:
            for process in self.processes.values():
                group.create_task(self._watch(process))

    async def _watch(self, process: processes.ServerProcess) -> None:
        """Start a server again whenever it ends, until it is given up."""
        settings = process.settings
        num_restarts = 0
        while True:
            up_since = time.monotonic()
            error: str | None = await self._until_down(process)
            if time.monotonic() - up_since >= settings.stable_s:
                num_restarts = 0
            while error is not None:
                self._on_down(settings.name, error)
                if num_restarts == settings.max_restarts:
                    self.given_up[settings.name] = (
                        f"{settings.name} is given up after {num_restarts} restarts in a row: "
                        f"{error}"
                    )
                    _logger.error("%s", self.given_up[settings.name])
                    return
                pause = min(settings.backoff_s * 2**num_restarts, settings.max_backoff_s)
                num_restarts += 1
                _logger.warning("%s; it is started again in %g s.", error, pause)
                await asyncio.sleep(pause)
                process.model_folder = self._last_good.get(settings.name, settings.model_folder)
                error = await _restarted(process)
            if self._on_ready is not None:
                await self._on_ready(settings.name)

    async def _until_down(self, process: processes.ServerProcess) -> str:
        """Wait until a server has ended, or does not answer and was ended; how, in a line."""
        settings = process.settings
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(settings.probe_every_s):
                    await process.wait_ended()
                    return process.ending()
            if not self._is_idle(settings.name) or await process.is_healthy():
                continue
            if process.is_running and self._is_idle(settings.name):
                await process.stop()
                return (
                    f"{settings.name} idled and did not answer {settings.url}/health within "
                    f"{settings.probe_timeout_s:g} s, so it was ended; {process.ending()}"
                )


async def serve(settings: Iterable[processes.ProcessSettings], stop: asyncio.Event) -> None:
    """Run servers until `stop` is set; none is left when this returns or raises.

    Raises:
        processes.ServerProcessError: one did not start, or all were given up.
    """
    pool = ServerPool(settings)
    starting = asyncio.create_task(pool.start())
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([starting, stopped], return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            _logger.info(
                "%d servers are ready: %s.", len(pool.processes), ", ".join(pool.processes)
            )
            await pool.watch(stop)
    finally:
        await _cancelled(starting, stopped)
        await pool.stop()


async def _start_ready(process: processes.ServerProcess) -> None:
    await process.start()
    await process.wait_ready()


async def _restarted(process: processes.ServerProcess) -> str | None:
    """Start a server again; the error, if it did not get ready."""
    try:
        await _start_ready(process)
    except processes.ServerProcessError as error:
        await process.stop()
        return str(error)
    return None


async def _cancelled(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks, and wait until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
