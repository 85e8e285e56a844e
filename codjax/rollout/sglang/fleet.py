"""The SGLang servers of a run, from one hand: connected or started, given weights, brought back.

    fleet = Fleet(servers, pushes, expected, run_id=…, local=…)
    async with fleet.opened():                          # connected; local ones are not started yet
        await fleet.load(staged)                        # local ones are started with the first
        generation = await fleet.sampler.generate(…)

A server that fails is set aside, told to drop what it was doing, started again where it is ours,
given the newest weights, verified, and only then asked again (docs/server_faults.md).
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import logging
import shutil
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from typing import Any

from codjax.rollout.sampler import SamplerError
from codjax.rollout.sglang import pool, processes, push, wire
from codjax.rollout.sglang.replicas import ExpectedModel, Replica
from codjax.rollout.sglang.sampler import SGLangSampler
from codjax.rollout.sglang.server import ServerSettings
from codjax.rollout.sglang.weights import Staged

_logger = logging.getLogger(__name__)


class Fleet:
    """Owns connections, and the processes of local servers, while it is `opened`. One event loop.

    Attributes:
        pushed: what came of the last push to each server, by address.
    """

    def __init__(
        self,
        servers: ServerSettings,
        pushes: push.PushSettings,
        expected: ExpectedModel,
        *,
        run_id: str,
        local: Sequence[processes.ProcessSettings] = (),
    ) -> None:
        """Nothing is connected or started yet.

        Args:
            servers: how all of them are reached, the local ones too.
            pushes: how weights get there.
            expected: what they must run.
            run_id: names the weights of this run.
            local: servers to start here, each named by its address; their `model_folder` is
                replaced by that of the first weights.
        """
        self.pushed: dict[str, push.Outcome] = {}
        self._settings, self._expected, self._run_id = servers, expected, run_id
        self._local = tuple(local)
        self._pusher = push.Pusher(pushes, on_failure=self._distrust)
        self._sampler: SGLangSampler | None = None
        self._pool: pool.ServerPool | None = None
        self._group: asyncio.TaskGroup | None = None
        self._background: set[asyncio.Task[None]] = set()
        self._newest: Staged | None = None
        self._pushed_to: collections.Counter[str] = collections.Counter()  # paused, they look ill
        self._drops: dict[str, asyncio.Task[None]] = {}
        self._is_ending = False  # from an error, or the end of the body, on

    @property
    def sampler(self) -> SGLangSampler:
        """Of all servers; while the fleet is opened."""
        assert self._sampler is not None
        return self._sampler

    @contextlib.asynccontextmanager
    async def opened(self) -> AsyncIterator[Fleet]:
        """Connections and watches, within; afterwards there are none, and no local server.

        Raises:
            SamplerError: a server that is not ours is not there, or runs another model.
            ServerProcessError: no local server can be kept up.
        """
        made = SGLangSampler(self._settings, self._expected, run_id=self._run_id)
        try:
            async with made as self._sampler, asyncio.TaskGroup() as self._group:
                try:
                    if not self._local:
                        await self._connect()
                    yield self
                finally:
                    self._is_ending = True
                    for task in self._background:
                        task.cancel()
        except BaseExceptionGroup as group:
            raise _first(group) from None
        finally:
            self._sampler = self._group = None
            self._background.clear()
            try:
                if self._pool is not None:
                    await self._pool.stop()
            finally:
                self._remove_folders()

    async def load(self, staged: Staged) -> None:
        """Give weights to all servers; those that have them, verified, serve from then on.

        A server that does not take them is aside until it does; there may be none left for a while.

        Raises:
            SamplerError: no server took the first weights: something is set up wrong.
            ServerProcessError: a local server did not start.
        """
        is_first, self._newest = self._newest is None, staged
        if is_first and self._local:
            await self._start(staged)
        replicas = self.sampler.replicas
        # One that is aside is given them when it is back, and delays nobody until then.
        clients = [r.client for r in replicas.all if is_first or r.aside is None]
        with self._pushing(*(client.url for client in clients)):
            outcomes = await self._pusher.push(staged, clients)
        for outcome in outcomes:
            await self._admit(outcome)
        if is_first:
            if all(replica.aside is not None for replica in replicas.all):
                raise SamplerError(f"no server took the first weights: {replicas.why_aside()}")
            for replica in replicas.all:
                self._spawn(self._bring_back(replica))
            self._spawn(self._watch_for_none())

    def metrics(self) -> dict[str, float]:
        """Those of the sampler, and how well the servers agree with the learner; any thread."""
        gaps = [outcome.gap for outcome in list(self.pushed.values()) if outcome.gap is not None]
        gap = {"sampler/probe_gap": max(gaps)} if gaps else {}
        return (self._sampler.metrics() if self._sampler is not None else {}) | gap

    # Local servers.

    async def _start(self, staged: Staged) -> None:
        """Start them all with the first weights, and watch them from then on."""
        assert staged.folder is not None  # `validate` insists on the disk route
        settings = [dataclasses.replace(one, model_folder=staged.folder) for one in self._local]
        self._pool = pool.ServerPool(
            settings,
            last_good=self._pusher.last_good,
            is_idle=self._is_idle,
            on_down=self.sampler.set_aside,
        )
        logs = ", ".join(str(one.log_file) for one in settings)
        _logger.info("Starting %d SGLang servers; their logs: %s.", len(settings), logs)
        await self._pool.start()
        self._spawn(self._pool.watch(asyncio.Event()))
        await self._connect()

    def _is_idle(self, name: str) -> bool:
        return not self._pushed_to[name] and self.sampler.replicas.of(name).in_flight == 0

    # Weights.

    async def _connect(self) -> None:
        await self.sampler.connect()
        _logger.info("%d SGLang servers are ready.", len(self.sampler.replicas.all))

    async def _admit(self, outcome: push.Outcome) -> None:
        """Let a server serve that has the newest weights; the others are aside already."""
        self.pushed[outcome.server] = outcome  # which `metrics` reads from another thread
        if not outcome.ok or self._newest is None or outcome.version != self._newest.version:
            return
        version = wire.policy_version(outcome.version, self._run_id)
        # Where it does not, it says why, and is aside until it is back.
        with contextlib.suppress(SamplerError):
            await self.sampler.readmit(outcome.server, policy_version=version)

    async def _bring_back(self, replica: Replica) -> None:
        """Give a server the newest weights whenever it was set aside and is ready again."""
        replicas, url = self.sampler.replicas, replica.url
        while True:
            await asyncio.sleep(self._settings.probe_interval_s)
            if self._pool is not None and url in self._pool.given_up:
                self._pusher.forget(url)
                return
            # One that is set aside amid a push must not be told to go on by asking after it.
            if replica.aside is None or self._pushed_to[url]:
                continue
            if not await replicas.is_back(replica):
                continue
            if (dropping := self._drops.pop(url, None)) is not None:
                await dropping  # it must not end what comes next
            try:
                with self._pushing(url):
                    await replicas.inspect(replica)
                    outcome = await self._pusher.sync(replica.client)
            except SamplerError as error:
                self.sampler.set_aside(url, str(error))
            else:
                if outcome is not None:
                    await self._admit(outcome)

    async def _watch_for_none(self) -> None:
        """End the run when no server served for too long: it would go on with nothing.

        Raises:
            SamplerError: after `server.replica_wait_s`.
        """
        limit_s, interval_s = self._settings.replica_wait_s, self._settings.probe_interval_s
        while True:
            await asyncio.sleep(min(interval_s, limit_s))
            stuck = self.sampler.why_stuck()
            if stuck is not None and time.monotonic() - stuck[0] > limit_s:
                raise SamplerError(
                    f"no server served for {limit_s:g} s (server.replica_wait_s): {stuck[1]}"
                )

    def _distrust(self, server: str, error: str) -> None:
        """What a server is answering is not believed, and it is told to drop it."""
        self.sampler.set_aside(server, error, distrust=True)
        if self._is_ending:  # the connections close, which ends its requests
            return
        if server not in self._drops or self._drops[server].done():
            self._drops[server] = self._spawn(self._drop(server))

    async def _drop(self, server: str) -> None:
        with contextlib.suppress(SamplerError):  # it is aside, whatever it does
            await self.sampler.drain([server])

    @contextlib.contextmanager
    def _pushing(self, *urls: str) -> Iterator[None]:
        self._pushed_to.update(urls)
        try:
            yield
        finally:
            self._pushed_to.subtract(urls)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        assert self._group is not None
        task = self._group.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._is_ending = True  # the group takes no tasks any more, and cancels the body

    def _remove_folders(self) -> None:
        """Staged weights are of use to this run only, and may lie in memory."""
        if self._newest is not None and self._newest.folder is not None:
            for folder in self._newest.folder.parent.glob(f"weights-{self._run_id}-*"):
                shutil.rmtree(folder, ignore_errors=True)


def _first(error: BaseException) -> BaseException:
    """The first error of a group, which is what went wrong."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
