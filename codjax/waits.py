"""Waiting with an owner, a deadline, and a last sign of life: nothing hangs in silence.

    waits = Waits(folder)
    waits.note("rollout", "3 of 64 runs are done")                       # from any thread
    answer = await waits.within(coroutine, Wait(who="rollout", what="the rollout of step 7", …))
    with waits.guarded(Wait(…)):                                         # what cannot be cancelled
        gather()

When a deadline passes, the stacks of all threads, and of all tasks of the loops that `watch` was
told of, go to a file; `StalledError` says in one line what was awaited, since when, what was last
heard, and where the file is.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import faulthandler
import os
import pathlib
import threading
import time
import traceback
from collections.abc import Coroutine, Iterator
from typing import Any, TextIO, TypeVar

from codjax.checks import StalledError

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wait:
    """Something that is awaited.

    Attributes:
        who: its owner, whose signs of life count.
        what: in words, after "for".
        deadline_s: seconds until it is given up; of silence, for `Waits.within`.
        key: the config key of the deadline.
    """

    who: str
    what: str
    deadline_s: float
    key: str


class Waits:
    """The waits of a run. Owns the files of stacks in its folder, and nothing else."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder
        self._signs: dict[str, tuple[float, str]] = {}
        self._loops: dict[str, asyncio.AbstractEventLoop] = {}
        self._lock = threading.Lock()

    def note(self, who: str, sign: str) -> None:
        """A sign of life of an owner; any thread."""
        with self._lock:
            self._signs[who] = (time.monotonic(), sign)

    def watch(self, name: str, loop: asyncio.AbstractEventLoop) -> None:
        """Tasks of this loop are part of what is written when something stalls."""
        with self._lock:
            self._loops[name] = loop

    @contextlib.contextmanager
    def guarded(self, wait: Wait) -> Iterator[None]:
        """Within: code that nothing can interrupt, such as a collective or a write to a disk.

        When it hangs, nobody can be told but by ending the process: with the line of `StalledError`
        on stderr, and status 1.
        """
        timer = threading.Timer(wait.deadline_s, self._end, (wait, time.monotonic()))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    async def within(self, awaitable: Coroutine[Any, Any, Result], wait: Wait) -> Result:
        """The result of something awaited by a task, while its owner shows signs of life.

        Raises:
            StalledError: for as long as the deadline there was none, and it was cancelled.
        """
        begin = time.monotonic()
        task = asyncio.create_task(awaitable)
        try:
            while not task.done():
                with self._lock:
                    heard = self._signs.get(wait.who, (begin, ""))[0]
                left_s = max(begin, heard) + wait.deadline_s - time.monotonic()
                if left_s <= 0:
                    raise self.stalled(wait, since=begin)
                await asyncio.wait({task}, timeout=left_s)
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task})

    def stalled(self, wait: Wait, *, since: float) -> StalledError:
        """Writes the stacks, and returns what is to be raised.

        Args:
            wait: what was awaited.
            since: `time.monotonic()` when it began.
        """
        waited, now = time.monotonic() - since, time.monotonic()
        with self._lock:
            sign = self._signs.get(wait.who)
        heard = f"{now - sign[0]:.0f} s ago: {sign[1]}" if sign else "none"
        try:
            place = f"the stacks of all threads and tasks are in {self._write_stacks()}"
        except OSError as error:  # the disk may be why
            place = f"the stacks of all threads and tasks could not be written ({error})"
        return StalledError(
            f"waited {waited:.0f} s ({wait.key}) for {wait.what}; last sign of life of "
            f"{wait.who}: {heard}; {place}."
        )

    def _end(self, wait: Wait, since: float) -> None:
        error = self.stalled(wait, since=since)
        os.write(2, f"codjax: {error}\n".encode())
        os._exit(1)

    def _write_stacks(self) -> pathlib.Path:
        path = self._folder / f"stall-{time.strftime('%Y%m%d-%H%M%S')}-{time.monotonic_ns()}.txt"
        with self._lock:
            signs, loops = dict(self._signs), dict(self._loops)
        with path.open("w", encoding="utf-8") as file:
            for who, (when, sign) in signs.items():
                file.write(f"{who}, {time.monotonic() - when:.1f} s ago: {sign}\n")
            for name, loop in loops.items():
                tasks = _tasks_of(loop)
                file.write(f"\n== {len(tasks)} tasks of {name}\n")
                for task in tasks:
                    _write_task(task, file)
            file.write("\n== threads\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        return path


def _tasks_of(loop: asyncio.AbstractEventLoop) -> list[asyncio.Task[Any]]:
    """Its unfinished tasks; the loop may run in another thread, which adds and ends tasks."""
    for _ in range(10):
        try:
            return sorted(asyncio.all_tasks(loop), key=lambda task: task.get_name())
        except RuntimeError:  # the set changed while it was read
            continue
    return []


def _write_task(task: asyncio.Task[Any], file: TextIO) -> None:
    """The coroutines that wait for each other, the innermost last; `print_stack` shows one."""
    file.write(f"\n{task.get_name()}: {task.get_coro()!r:.200}\n")
    waiting: Any = task.get_coro()
    while waiting is not None:
        frame = getattr(waiting, "cr_frame", None) or getattr(waiting, "gi_frame", None)
        if frame is not None:
            file.writelines(
                traceback.format_list(traceback.StackSummary.extract([(frame, frame.f_lineno)]))
            )
        waiting = getattr(waiting, "cr_await", None) or getattr(waiting, "gi_yieldfrom", None)
