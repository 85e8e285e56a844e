"""One SGLang server on this machine: started, waited for, looked after, and ended with us.

    process = ServerProcess(ProcessSettings(name="gpu0", command=(…), port=30000, …))
    await process.start()
    await process.wait_ready()                 # or an error with the end of its log
    await process.stop()
    process.model_folder = …                   # the last good weights
    await process.start()

The command runs under `guard.py`, which ends it, with everything that it started, when this process
ends in whichever way.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import pathlib
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping

import aiohttp

from codjax import checks
from codjax.rollout.sglang import guard

_POLL_S = 0.2  # between two looks at a process
_ANSWER_S = 5.0  # for a server that is starting to answer
_TAIL_LINES, _TAIL_BYTES = 8, 8192  # of a log, in an error
_GUARD_S = 15.0  # that the guard may take to end, beyond the grace of its command

_logger = logging.getLogger(__name__)


class ServerProcessError(checks.ServerError):
    """A server did not start, or was given up; the message ends in what it logged last."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessSettings:
    """One server.

    Attributes:
        name: for messages.
        command: program and arguments; {model_folder}, {host} and {port} in them are filled in.
        model_folder: that it starts with, until it has better ones.
        port: of its own.
        log_file: that all its output is appended to.
        host: that it listens on.
        gpus: for CUDA_VISIBLE_DEVICES, as "0" or "2,3"; None leaves the variable as it is.
        environment: variables beside those of this process.
        api_key: sent with every probe; "" for none.
        secrets: that are not to be quoted from the log.
        ready_timeout_s: from the start to /ready; a large model takes minutes to load.
        probe_every_s: between two probes of /health; only asked when the owner says that it idles.
        probe_timeout_s: for an answer; SGLang itself takes 20 s to say that it is not well.
        stop_timeout_s: between SIGTERM and SIGKILL.
        max_restarts: in a row; one more failure gives the server up.
        stable_s: that a server must have been up for the row to begin anew.
        backoff_s: before the first restart in a row; doubles with each.
        max_backoff_s: where the doubling ends.
    """

    name: str
    command: tuple[str, ...] = dataclasses.field(repr=False)  # may hold keys
    model_folder: pathlib.Path
    port: int
    log_file: pathlib.Path
    host: str = "127.0.0.1"
    gpus: str | None = None
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    api_key: str = dataclasses.field(default="", repr=False)
    secrets: tuple[str, ...] = dataclasses.field(default=(), repr=False)
    ready_timeout_s: float = 900.0
    probe_every_s: float = 30.0
    probe_timeout_s: float = 60.0
    stop_timeout_s: float = 20.0
    max_restarts: int = 5
    stable_s: float = 300.0
    backoff_s: float = 1.0
    max_backoff_s: float = 60.0

    @property
    def url(self) -> str:
        """Without a slash at the end."""
        return f"http://{self.host}:{self.port}"


class ServerProcess:
    """One server: a process under a guard. Whoever starts it stops it.

    Attributes:
        settings: as given.
        model_folder: that the next start loads.
        num_starts: so far.
    """

    def __init__(self, settings: ProcessSettings) -> None:
        """A server that does not run yet."""
        self.settings = settings
        self.model_folder = settings.model_folder
        self.num_starts = 0
        # Not of asyncio: its transports kill the guard when their loop closes, before it can end
        # what it guards, and on Python 3.11 they wait in a thread for each process.
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0

    @property
    def is_running(self) -> bool:
        """Whether there is a process, well or not."""
        if self._process is None or self._process.poll() is None:
            return self._process is not None
        assert self._process.stdin is not None  # a pipe
        self._process.stdin.close()
        return False

    async def start(self) -> None:
        """Start the command; returns before it is ready.

        Raises:
            ServerProcessError: something listens on its port already, or there is no log.
        """
        settings = self.settings
        if await _is_taken(settings.host, settings.port):
            raise ServerProcessError(
                f"{settings.name} cannot have port {settings.port}: another program listens there; "
                "end it, or choose another port."
            )
        words = {
            "{model_folder}": str(self.model_folder),
            "{host}": settings.host,
            "{port}": str(settings.port),
        }
        grace = str(settings.stop_timeout_s)
        environment = {**os.environ, **settings.environment}
        if settings.gpus is not None:
            environment["CUDA_VISIBLE_DEVICES"] = settings.gpus
        command = (sys.executable, "-I", "-S", guard.__file__, grace)
        try:
            settings.log_file.parent.mkdir(parents=True, exist_ok=True)
            # For us alone: SGLang logs its keys.
            with open(settings.log_file, "ab", opener=_private) as log:
                self._log_start = log.tell()
                self._process = subprocess.Popen(
                    [*command, *(_filled(word, words) for word in settings.command)],
                    stdin=subprocess.PIPE,  # nothing is written: it closes when we end
                    stdout=log,
                    stderr=log,
                    env=environment,
                    start_new_session=True,  # Ctrl-C of our terminal is ours
                )
        except OSError as error:
            raise ServerProcessError(f"{settings.name} cannot be started: {error}.") from error
        self.num_starts += 1

    async def wait_ready(self) -> None:
        """Wait until it answers /ready.

        Raises:
            ServerProcessError: it ended instead, or took too long.
        """
        settings = self.settings
        try:
            async with (
                asyncio.timeout(settings.ready_timeout_s),
                _session(settings, timeout_s=_ANSWER_S) as session,
            ):
                while not await _is_ready(session, settings.url):
                    if not self.is_running:
                        raise ServerProcessError(self.ending())
                    await asyncio.sleep(_POLL_S)
        except TimeoutError as error:
            raise ServerProcessError(
                f"{settings.name} did not answer {settings.url}/ready within "
                f"{settings.ready_timeout_s:g} s of its start; {self._last_words()}"
            ) from error

    async def wait_ended(self) -> None:
        """Wait until there is no process, which is noticed within a fraction of a second."""
        while self.is_running:
            await asyncio.sleep(_POLL_S)

    async def is_healthy(self) -> bool:
        """Whether it generates a token in time; only asked while it idles and is not paused."""
        settings = self.settings
        async with _session(settings, timeout_s=settings.probe_timeout_s) as session:
            return await _status(session, f"{settings.url}/health") == 200

    async def stop(self) -> None:
        """End it with all that it started; returns when they are gone."""
        process = self._process
        if process is None:
            return
        process.terminate()
        try:
            async with asyncio.timeout(self.settings.stop_timeout_s + _GUARD_S):
                await self.wait_ended()
        except TimeoutError:
            _logger.error("%s does not end; its guard is killed.", self.settings.name)
            process.kill()  # and the command with it: the kernel sees to that
            await self.wait_ended()

    def ending(self) -> str:
        """How it ended, in a line."""
        status = self._process.returncode if self._process is not None else None
        how = f"signal {status - 128}" if status is not None and status > 128 else f"{status}"
        return f"{self.settings.name} ended with status {how}; {self._last_words()}"

    def _last_words(self) -> str:
        """What it logged last, since this start."""
        path = self.settings.log_file
        with path.open("rb") as log:
            log.seek(max(self._log_start, path.stat().st_size - _TAIL_BYTES))
            text = log.read().decode(errors="replace")
        for secret in self.settings.secrets:
            text = text.replace(secret, "***")
        lines = text.splitlines()
        last = [line.strip() for line in lines if line.strip()][-_TAIL_LINES:]
        return f"see {path}, which ends in: {' | '.join(last) or 'nothing'}"


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _filled(word: str, words: Mapping[str, str]) -> str:
    for name, value in words.items():
        word = word.replace(name, value)
    return word


# HTTP, as much as it takes to know whether somebody is there.


@contextlib.asynccontextmanager
async def _session(
    settings: ProcessSettings, *, timeout_s: float
) -> AsyncIterator[aiohttp.ClientSession]:
    headers = {"Authorization": f"Bearer {settings.api_key}"} if settings.api_key else {}
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session:
        yield session


async def _is_ready(session: aiohttp.ClientSession, url: str) -> bool:
    status = await _status(session, f"{url}/ready")
    if status == 404:  # an older SGLang
        status = await _status(session, f"{url}/health")
    return status == 200


async def _status(session: aiohttp.ClientSession, url: str) -> int | None:
    """Of the answer; None where there is none."""
    try:
        async with session.get(url) as response:
            return response.status
    except (aiohttp.ClientError, OSError, TimeoutError):  # refused while it loads, cut, too late
        return None


async def _is_taken(host: str, port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection(host, port)
    except OSError:
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True
