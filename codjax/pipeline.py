"""Rollout steps sampled ahead of the learner, on one event loop in one thread.

    with Pipeline(settings, sample=…, load=…, rules=…, stalls=waits) as pipeline:
        pipeline.offer(weights, version=0)
        while (drawn := pipeline.take(update=version + 1)) is not None:
            state = train_on(drawn.item.payload)                 # the learner's thread
            pipeline.offer(new_weights, version=version + 1)     # before `consumed`
            pipeline.consumed(drawn)

A rollout step begins when at most `max_staleness` others are under way: being sampled, waiting, or
being trained on. With 0 that is a synchronous loop, by the same code.

Without `in_flight_updates`, one step is sampled at a time, and what may be begun is begun before
the learner goes on. With a staleness of 0 or 1, step `j` (from 0) is then sampled by the weights
after `j - max_staleness` updates, whatever the timing, so that a run can be repeated. With it,
steps overlap, new weights are handed on at once, and a sampler changes them within its answers.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import threading
import time
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Self

from codjax import replay, waits

Sample = Callable[[int], Awaitable[tuple[Any, int]]]  # step → payload, oldest version in it
Load = Callable[[Any, int], Awaitable[None]]  # weights, version


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How far and how rollouts run ahead.

    Attributes:
        num_steps: rollout steps of the whole run.
        max_staleness: most updates between the weights that sampled a token and those that it is
            trained into; at least `sync_every - 1`, and what is above that is how many steps
            may be under way when another begins.
        in_flight_updates: whether new weights reach rollouts that are under way.
        max_concurrent: steps sampled at once, with `in_flight_updates`.
        sync_every: updates between two hand-overs of weights.
        deadline_s: longest wait for a rollout step, with its config key.
        deadline_key: of that.
    """

    num_steps: int
    max_staleness: int
    in_flight_updates: bool
    max_concurrent: int
    sync_every: int
    deadline_s: float
    deadline_key: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Position:
    """Where the rollouts of a run are: what a checkpoint keeps of them.

    Attributes:
        next_step: the first step that was never begun.
        unfinished: those before it that were begun, and must be again; rising.
        items: those that wait to be trained on.
    """

    next_step: int = 0
    unfinished: tuple[int, ...] = ()
    items: tuple[replay.Item, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawn:
    """What an update trains on.

    Attributes:
        item: the rollout step; None if all that waited was too old.
        too_old: steps that were dropped for good.
        waited_s: seconds that the learner waited for it.
    """

    item: replay.Item | None
    too_old: tuple[replay.Item, ...]
    waited_s: float


class Pipeline:
    """Owns a thread with an event loop, and the rollouts on it. Close it, or use `with`.

    `take`, `offer`, `consumed` and `position` belong to the learner's thread.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        sample: Sample,
        load: Load,
        rules: replay.Rules,
        stalls: waits.Waits,
        position: Position | None = None,
    ) -> None:
        """Nothing is sampled before the first weights are offered.

        Args:
            settings: see there.
            sample: all runs of a rollout step; called on the pipeline's loop.
            load: hands weights to the sampler; called on the loop, one call at a time.
            rules: of the items that wait.
            stalls: asked on a stall.
            position: of a checkpoint, if the run goes on.
        """
        position = position or Position()
        self._settings, self._sample, self._load, self._waits = settings, sample, load, stalls
        self._changed = threading.Condition()  # guards what follows
        self._replay = replay.Replay(rules, position.items)
        self._next, self._again = position.next_step, list(position.unfinished)
        self._running: dict[int, asyncio.Task[tuple[Any, int]]] = {}
        self._is_training = False
        self._offered: tuple[Any, int] | None = None
        self._loaded: int | None = None
        self._error: BaseException | None = None
        self._loop = asyncio.new_event_loop()
        self._wake = asyncio.Event()
        stalls.watch("the rollouts", self._loop)
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollouts", daemon=True)
        self._thread.start()
        self._main = asyncio.run_coroutine_threadsafe(self._run(), self._loop)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def offer(self, weights: Any, *, version: int) -> None:
        """The newest weights; returns at once. They must stay as they are until others come."""
        with self._changed:
            self._offered = (weights, version)
        self._loop.call_soon_threadsafe(self._wake.set)

    def take(self, update: int) -> Drawn | None:
        """What the update trains on, as soon as there is something.

        Args:
            update: from 1.

        Returns:
            None when no step of the run is left.

        Raises:
            StalledError: none came within the deadline.
            BaseException: what `sample` or `load` raised.
        """
        begin, wait = time.monotonic(), self._wait(f"a rollout step for update {update}")
        with self._changed:
            assert not self._is_training  # `consumed` comes first
            while True:
                item, too_old = self._replay.draw(update)
                if item is not None or too_old:
                    self._is_training = True
                    break
                if not self._running and not self._steps_left():
                    return None
                self._sleep(wait, since=begin)
            waited = time.monotonic() - begin
            self._loop.call_soon_threadsafe(self._wake.set)
            while not self._settings.in_flight_updates and self._may_begin():
                self._sleep(wait, since=begin)
            return Drawn(item=item, too_old=tuple(too_old), waited_s=waited)

    def consumed(self, drawn: Drawn) -> None:
        """What was taken is done with, and its weights were offered: other steps may start."""
        with self._changed:
            self._is_training = False
            if drawn.item is not None:
                self._replay.put_back(drawn.item)
        self._loop.call_soon_threadsafe(self._wake.set)

    def position(self) -> Position:
        """For a checkpoint, between `consumed` and `take`.

        Without `in_flight_updates`, the step that is being sampled is waited for: begun again it
        would be sampled by other weights.

        Raises:
            StalledError, BaseException: as `take`.
        """
        begin, wait = time.monotonic(), self._wait("the rollout step that is being sampled")
        with self._changed:
            while self._running and not self._settings.in_flight_updates:
                self._sleep(wait, since=begin)
            unfinished = tuple(sorted([*self._again, *self._running]))
            return Position(next_step=self._next, unfinished=unfinished, items=self._replay.items)

    def close(self) -> None:
        """Cancel what is being sampled and end the thread."""
        self._main.cancel()
        concurrent.futures.wait([self._main], timeout=self._settings.deadline_s)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _sleep(self, wait: waits.Wait, *, since: float) -> None:
        """Until something has changed; with the lock held, which is let go meanwhile."""
        if self._error is None:
            is_in_time = self._changed.wait(max(since + wait.deadline_s - time.monotonic(), 0))
            if not is_in_time:
                raise self._waits.stalled(wait, since=since)
        if self._error is not None:
            raise self._error

    def _wait(self, what: str) -> waits.Wait:
        settings = self._settings
        return waits.Wait(
            who="rollouts", what=what, deadline_s=settings.deadline_s, key=settings.deadline_key
        )

    async def _run(self) -> None:
        """Hands weights on, begins what may begin, takes in what is done; until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                waking = tasks.create_task(self._wake.wait())
                while True:
                    if (due := self._due()) is not None:
                        await self._load(*due)
                        self._loaded = due[1]
                    while self._begin(tasks):
                        pass
                    watched = {waking, *self._running.values()}
                    await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
                    if waking.done():
                        self._wake.clear()
                        waking = tasks.create_task(self._wake.wait())
                    self._collect()
        except BaseException as error:
            with self._changed:
                self._error = _first(error)
                self._changed.notify_all()
            raise

    def _due(self) -> tuple[Any, int] | None:
        """The newest weights and their version, if the sampler is to have them now."""
        with self._changed:
            if self._offered is None or (self._running and not self._settings.in_flight_updates):
                return None
            is_first, version = self._loaded is None, self._offered[1]
            age = 0 if self._loaded is None else version - self._loaded
            return self._offered if is_first or age >= self._settings.sync_every else None

    def _begin(self, tasks: asyncio.TaskGroup) -> bool:
        """Begin the next step, if it may begin and has its weights; whether it was."""
        # Under one lock, so that a step is never begun beside weights that are due.
        with self._changed:
            if self._loaded is None or self._due() is not None or not self._may_begin():
                return False
            if self._again:
                step = self._again.pop(0)
            else:
                step, self._next = self._next, self._next + 1
            sampling = _coroutine(self._sample(step))
            self._running[step] = tasks.create_task(sampling, name=f"rollout step {step}")
            self._waits.note("rollouts", f"step {step} was begun")
            self._changed.notify_all()
            return True

    def _may_begin(self) -> bool:
        settings = self._settings
        most = settings.max_concurrent if settings.in_flight_updates else 1
        under_way = len(self._running) + len(self._replay.items) + self._is_training
        return (
            self._steps_left()
            and len(self._running) < most
            and under_way <= settings.max_staleness - (settings.sync_every - 1)
        )

    def _steps_left(self) -> bool:
        return bool(self._again) or self._next < self._settings.num_steps

    def _collect(self) -> None:
        with self._changed:
            for step in [step for step, task in self._running.items() if task.done()]:
                payload, version = self._running.pop(step).result()
                self._waits.note("rollouts", f"step {step} was sampled")
                self._replay.put(replay.Item(step=step, version=version, payload=payload))
            self._changed.notify_all()


async def _coroutine(awaitable: Awaitable[tuple[Any, int]]) -> tuple[Any, int]:
    return await awaitable


def _first(error: BaseException) -> BaseException:
    """The first error of a group, which is what went wrong."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
