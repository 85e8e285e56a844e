"""Rollout steps sampled ahead of the learner, on one event loop in one thread.

    with Pipeline(settings, sample=…, load=…, rules=…, stalls=waits) as pipeline:
        pipeline.offer(weights, version=0)
        while (drawn := pipeline.take(version + 1)) is not None:
            state = train_on(drawn.item.payload)                 # the learner's thread
            pipeline.offer(new_weights, version=version + 1)     # before `consumed`
            pipeline.consumed(drawn)

A rollout step begins when at most `max_staleness` others are under way: being sampled, waiting, or
being trained on. With 0 that is a synchronous loop, by the same code.

Without `in_flight_updates`, one step is sampled at a time; where a run can be repeated, what may be
begun is begun before the learner goes on. With a staleness of 0 or 1, step `j` (from 0) is then
sampled by the weights after `j - max_staleness` updates, whatever the timing. With it, steps
overlap, new weights are handed on at once, and a sampler changes them within its answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from types import TracebackType
from typing import Any, Self

from codjax import replay, waits

# step → payload, and the version of its newest sample; None if it has no samples
Sample = Callable[[int], Awaitable[tuple[Any, int | None]]]
Load = Callable[[Any, int], Awaitable[None]]  # weights, version
# Step → version of the items that wait here → those that wait in all processes of the run, or None
# if the run is to stop.
Agree = Callable[[Mapping[int, int]], Mapping[int, int] | None]

_AGREE_S = 0.25  # between two questions to the other processes, and whether to stop
_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How far and how rollouts run ahead.

    Attributes:
        num_steps: updates of the whole run; rollouts that no update would train on are not begun.
        max_staleness: most updates between the weights that sampled a token and those that it is
            trained into; at least `sync_every - 1`.
        in_flight_updates: whether new weights reach rollouts that are under way.
        max_concurrent: steps sampled at once, with `in_flight_updates`.
        sync_every: updates between two hand-overs of weights.
        is_repeatable: whether equal weights sample equal steps, so that a checkpoint must not
            leave a step to be begun again by other weights than it was begun with.
        deadline_s: longest wait for a rollout step, with its config key.
        deadline_key: of that.
        close_s: longest wait for the rollouts to end, and servers with them.
        close_failed_s: the same after an error.
    """

    num_steps: int
    max_staleness: int
    in_flight_updates: bool
    max_concurrent: int
    sync_every: int
    is_repeatable: bool
    deadline_s: float
    deadline_key: str
    close_s: float = 30.0
    close_failed_s: float = 30.0

    @property
    def most_under_way(self) -> int:
        """Steps that may be sampled, wait or be trained on when another begins."""
        return self.max_staleness - (self.sync_every - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Position:
    """Where the rollouts of a run are: what a checkpoint keeps of them.

    Attributes:
        num_trained: updates so far.
        next_step: the first rollout step that was never begun.
        unfinished: those before it that were begun, and must be again; rising.
        items: those that wait to be trained on.
    """

    num_trained: int = 0
    next_step: int = 0
    unfinished: tuple[int, ...] = ()
    items: tuple[replay.Item, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawn:
    """What an update trains on.

    Attributes:
        item: the rollout step.
        too_old: steps that were dropped for good before it.
        seconds: "rollout" (from the beginning of the step to its end; absent after a restart),
            "wait_learner" (nothing was being sampled since the last one was taken) and "load"
            (handing weights on, since then).
    """

    item: replay.Item
    too_old: tuple[replay.Item, ...]
    seconds: Mapping[str, float]


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
        agree: Agree = dict,
        around: contextlib.AbstractAsyncContextManager[Any] | None = None,
    ) -> None:
        """Nothing is sampled before the first weights are offered.

        Args:
            settings: see there.
            sample: all runs of a rollout step; called on the pipeline's loop.
            load: hands weights to the sampler; called on the loop, one call at a time.
            rules: of the items that wait.
            stalls: asked on a stall.
            position: of a checkpoint, if the run goes on.
            agree: called by `take` again and again while it waits, on all processes as often.
            around: entered on the loop before anything else, and left there at the end.
        """
        position = position or Position()
        self._settings, self._sample, self._load, self._waits = settings, sample, load, stalls
        self._rules, self._agree = rules, agree
        self._changed = threading.Condition()  # guards what follows
        self._replay = replay.Replay(rules, position.items)
        self._num_trained = position.num_trained
        self._next, self._again = position.next_step, list(position.unfinished)
        self._running: dict[int, asyncio.Task[tuple[Any, int | None]]] = {}
        self._training: replay.Item | None = None
        self._dropped: list[replay.Item] = []  # since the last one that was taken
        self._offered: tuple[Any, int] | None = None
        self._last_offered: int | None = None
        self._loading: asyncio.Task[None] | None = None
        self._loaded: int | None = None
        self._error: BaseException | None = None
        self._times = _Times()
        self._around = around or contextlib.nullcontext()
        self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self._loop, self._wake = self._runner.get_loop(), asyncio.Event()
        self._main = self._loop.create_task(self._run(), name="the rollouts")
        stalls.watch("the rollouts", self._loop)
        self._thread = threading.Thread(target=self._serve, name="rollouts", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(self._settings.close_s if error is None else self._settings.close_failed_s)

    def offer(self, weights: Any, *, version: int) -> None:
        """The newest weights; returns at once. They must stay as they are until others come."""
        with self._changed:
            self._offered, self._last_offered = (weights, version), version
        self._wake_up()

    def is_due(self, version: int) -> bool:
        """Whether weights of this version are to be offered.

        The same in all processes, whose samplers may be slower or quicker: what is offered must be
        made by all of them together.
        """
        return self._last_offered is None or (
            version - self._last_offered >= self._settings.sync_every
        )

    def take(self, update: int) -> Drawn | None:
        """What the update trains on, as soon as there is something.

        Args:
            update: from 1.

        Returns:
            None after the last update of the run, and as soon as `agree` returns None.

        Raises:
            StalledError: none came within the deadline.
            BaseException: what `sample` or `load` raised.
        """
        begin, wait = time.monotonic(), self._wait(f"a rollout step for update {update}")
        assert self._training is None  # `consumed` comes first
        if self._num_trained >= self._settings.num_steps:
            return None
        while self._training is None:
            common = self._common(wait, begin)
            if common is None:
                return None
            with self._changed:
                self._training, too_old = self._replay.draw(update, common)
            self._dropped += too_old
            self._wake_up()
        with self._changed:
            while self._settings.is_repeatable and self._may_begin():
                self._sleep(wait, since=begin)
            seconds = self._times.taken(self._training.step, is_idle=not self._running)
        dropped, self._dropped = self._dropped, []
        return Drawn(item=self._training, too_old=tuple(dropped), seconds=seconds)

    def consumed(self, drawn: Drawn) -> None:
        """What was taken is done with, and its weights were offered: other steps may start."""
        with self._changed:
            self._training = None
            self._num_trained += 1
            self._replay.put_back(drawn.item)
        self._wake_up()

    def position(self) -> Position:
        """For a checkpoint, between `consumed` and `take`.

        Where a run can be repeated, a step that is being sampled by weights that are not the newest
        is waited for: begun again, it would be sampled by others.

        Raises:
            StalledError, BaseException: as `take`.
        """
        begin, wait = time.monotonic(), self._wait("the rollout step that is being sampled")
        with self._changed:
            while self._running and self._settings.is_repeatable and self._has_newer():
                self._sleep(wait, since=begin)
            return Position(
                num_trained=self._num_trained,
                next_step=self._next,
                unfinished=tuple(sorted([*self._again, *self._running])),
                items=self._replay.items,
            )

    def close(self, limit_s: float | None = None) -> None:
        """Cancel what is being sampled and end the thread.

        Args:
            limit_s: code that does not end by then is left to the end of the process; unset:
                `close_s`.
        """
        if self._thread.is_alive():
            with contextlib.suppress(RuntimeError):  # the loop has just been closed
                self._loop.call_soon_threadsafe(self._main.cancel)
            self._thread.join(self._settings.close_s if limit_s is None else limit_s)
            if self._thread.is_alive():
                _logger.warning("The rollouts did not end in time; they end with the process.")

    def _common(self, wait: waits.Wait, begin: float) -> Mapping[int, int] | None:
        """Step → version of what waits in all processes, once there is something; None to stop."""
        has_asked = False
        while True:
            with self._changed:
                self._check()
                if has_asked or not self._replay.items:
                    self._sleep(wait, since=begin, longest_s=_AGREE_S)
                mine = {item.step: item.version for item in self._replay.items}
            common = self._agree(mine)
            if common is None or common:
                return common
            has_asked = True

    def _sleep(
        self, wait: waits.Wait, *, since: float, longest_s: float = threading.TIMEOUT_MAX
    ) -> None:
        """Until something has changed; with the lock held, which is let go meanwhile."""
        self._check()
        left_s = max(since + wait.deadline_s - time.monotonic(), 0)
        if not self._changed.wait(min(left_s, longest_s)) and left_s <= longest_s:
            raise self._waits.stalled(wait, since=since)
        self._check()

    def _has_newer(self) -> bool:
        """Whether weights wait to be handed on."""
        return self._offered is not None and self._offered[1] != self._loaded

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _wait(self, what: str) -> waits.Wait:
        settings = self._settings
        return waits.Wait(
            who="rollouts", what=what, deadline_s=settings.deadline_s, key=settings.deadline_key
        )

    def _serve(self) -> None:
        """The thread: the loop, until `_run` ends."""
        with self._runner, contextlib.suppress(BaseException):  # `_run` keeps it for the learner
            self._runner.run(_until(self._main))

    async def _run(self) -> None:
        """The rollouts, until they are cancelled; an error is kept for the learner's thread."""
        try:
            async with self._around:
                try:
                    await self._sample_all()
                except Exception as error:  # known before what is around has ended
                    self._keep(error)
                    raise
        except BaseException as error:
            self._keep(error)
            raise

    def _keep(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or _first(error)
            self._changed.notify_all()

    def _wake_up(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended; `take` says why
            self._loop.call_soon_threadsafe(self._wake.set)

    async def _sample_all(self) -> None:
        """Hands weights on, begins what may begin, takes in what is done."""
        async with asyncio.TaskGroup() as tasks:
            waking: asyncio.Task[Any] | None = None
            while True:
                if waking is None:
                    self._wake.clear()
                    waking = tasks.create_task(self._wake.wait())
                if self._loading is None and (due := self._due()) is not None:
                    self._loading = tasks.create_task(self._hand_on(*due), name="loading weights")
                while self._begin(tasks):
                    pass
                loading = {self._loading} if self._loading else set()
                watched = {waking, *loading, *self._running.values()}
                await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
                waking = None if waking.done() else waking
                if self._loading is not None and self._loading.done():
                    self._loading = None
                self._collect()

    def _due(self) -> tuple[Any, int] | None:
        """The newest weights and their version, if the sampler is to have them now."""
        with self._changed:
            if self._offered is None or (self._running and not self._settings.in_flight_updates):
                return None
            return self._offered if self._is_due(self._offered[1]) else None

    def _is_due(self, version: int) -> bool:
        return self._loaded is None or version - self._loaded >= self._settings.sync_every

    async def _hand_on(self, weights: Any, version: int) -> None:
        begin = time.monotonic()
        await self._load(weights, version)
        with self._changed:
            self._loaded = version
            if self._offered is not None and self._offered[1] == version:
                self._offered = (None, version)  # they may be large
            self._times.loaded(time.monotonic() - begin)
            self._waits.note("rollouts", f"the weights of version {version} were handed on")

    def _begin(self, tasks: asyncio.TaskGroup) -> bool:
        """Begin the next step, if it may begin and has its weights; whether it was."""
        with self._changed:
            if self._loaded is None or not self._may_begin():
                return False
            # Under one lock, so that a step is never begun beside weights that it should have.
            awaits_weights = self._loading is not None or self._due() is not None
            if awaits_weights and not self._settings.in_flight_updates:
                return False
            if self._again:
                step = self._again.pop(0)
            else:
                step, self._next = self._next, self._next + 1
            sampling = _coroutine(self._sample(step))
            self._running[step] = tasks.create_task(sampling, name=f"rollout step {step}")
            self._times.begun(step)
            self._waits.note("rollouts", f"step {step} was begun")
            self._changed.notify_all()
            return True

    def _may_begin(self) -> bool:
        settings = self._settings
        most = settings.max_concurrent if settings.in_flight_updates else 1
        is_training = self._training is not None
        under_way = len(self._running) + len(self._replay.items) + is_training
        return (
            self._is_needed() and len(self._running) < most and under_way <= settings.most_under_way
        )

    def _is_needed(self) -> bool:
        """Whether a further step will be trained on, as far as one can tell."""
        settings, uses = self._settings, self._rules.max_uses
        ready = [*self._replay.items, *([self._training] if self._training else [])]
        supply = uses * len(self._running) + sum(uses - item.uses for item in ready)
        # Sampled with weights that a run of more updates would have sampled them with: extended,
        # it is the run that it would have been.
        beyond = 0 if settings.in_flight_updates else settings.most_under_way
        return self._num_trained + supply < settings.num_steps + beyond

    def _collect(self) -> None:
        with self._changed:
            for step in [step for step, task in self._running.items() if task.done()]:
                payload, version = self._running.pop(step).result()
                self._times.ended(step, is_idle=not self._running)
                self._waits.note("rollouts", f"step {step} was sampled")
                if version is None:
                    version = self._loaded or 0
                self._replay.put(replay.Item(step=step, version=version, payload=payload))
            self._changed.notify_all()


class _Times:
    """Seconds of what the rollouts do, between two items that are taken."""

    def __init__(self) -> None:
        self._begun: dict[int, float] = {}
        self._took: dict[int, float] = {}
        self._idle_since: float | None = time.monotonic()
        self._idle_s = self._load_s = 0.0

    def begun(self, step: int) -> None:
        self._begun[step] = time.monotonic()
        self._stop_idling()

    def ended(self, step: int, *, is_idle: bool) -> None:
        self._took[step] = time.monotonic() - self._begun.pop(step)
        if is_idle:
            self._idle_since = time.monotonic()

    def loaded(self, seconds: float) -> None:
        self._load_s += seconds

    def taken(self, step: int, *, is_idle: bool) -> dict[str, float]:
        """The seconds of `Drawn`; counts from 0 again."""
        self._stop_idling()
        if is_idle:
            self._idle_since = time.monotonic()
        found = {"wait_learner": self._idle_s, "load": self._load_s}
        self._idle_s = self._load_s = 0.0
        if step in self._took:
            found["rollout"] = self._took.pop(step)
        return found

    def _stop_idling(self) -> None:
        if self._idle_since is not None:
            self._idle_s += time.monotonic() - self._idle_since
            self._idle_since = None


async def _until(task: asyncio.Task[None]) -> None:
    await task


async def _coroutine(awaitable: Awaitable[tuple[Any, int | None]]) -> tuple[Any, int | None]:
    return await awaitable


def _first(error: BaseException) -> BaseException:
    """The first error of a group, which is what went wrong."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
