"""Every wait ends: with its result, with the error of what was awaited, or with one that tells."""

import asyncio
import concurrent.futures
import re
import threading

import pytest

from codjax.checks import StalledError
from codjax.waits import Wait, Waits

SHORT = Wait(who="rollout", what="the rollout of step 7", deadline_s=0.1, key="rollout.deadline_s")
LONG = Wait(who="rollout", what="the rollout of step 7", deadline_s=60, key="rollout.deadline_s")


def stacks_of(error, folder):
    (path,) = folder.glob("stall-*.txt")
    assert f"are in {path}." in str(error)
    return path.read_text()


def test_what_comes_in_time_is_returned(tmp_path):
    waits = Waits(tmp_path)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert waits.result(pool.submit(lambda: 3), LONG) == 3

    async def answer():
        return 4

    assert asyncio.run(waits.within(answer(), LONG)) == 4
    assert not list(tmp_path.iterdir())


def test_the_error_of_what_was_awaited_is_its_own(tmp_path):
    waits = Waits(tmp_path)

    def fail():
        raise TimeoutError("mine")

    async def fail_later():
        fail()

    with (
        concurrent.futures.ThreadPoolExecutor(1) as pool,
        pytest.raises(TimeoutError, match="mine"),
    ):
        waits.result(pool.submit(fail), LONG)
    with pytest.raises(TimeoutError, match="mine"):
        asyncio.run(waits.within(fail_later(), LONG))
    assert not list(tmp_path.iterdir())


def test_a_thread_that_waits_too_long_is_told_what_was_last_heard(tmp_path):
    waits, release = Waits(tmp_path), threading.Event()
    waits.note("rollout", "3 of 64 runs are done")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with pytest.raises(StalledError) as caught:
            waits.result(pool.submit(release.wait), SHORT)
        release.set()
    assert re.match(
        r"waited 0 s \(rollout\.deadline_s\) for the rollout of step 7; last sign of life of "
        r"rollout: 0 s ago: 3 of 64 runs are done; the stacks of all threads and tasks are in ",
        str(caught.value),
    )
    assert "\n" not in str(caught.value)
    stacks = stacks_of(caught.value, tmp_path)
    assert "3 of 64 runs are done" in stacks
    assert "release.wait" in stacks or "in wait" in stacks


async def hang(forever):
    await inner(forever)


async def inner(forever):
    await forever.wait()


def test_a_task_that_waits_too_long_is_cancelled_and_all_tasks_are_shown(tmp_path):
    waits = Waits(tmp_path)
    cancelled = []

    async def awaited():
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    async def run():
        waits.watch("the rollout's loop", asyncio.get_running_loop())
        other = asyncio.create_task(hang(asyncio.Event()), name="pack 5, run 2")
        try:
            await waits.within(awaited(), SHORT)
        finally:
            other.cancel()

    with pytest.raises(StalledError, match=r"rollout: none; the stacks") as caught:
        asyncio.run(run())
    assert cancelled == [True]
    stacks = stacks_of(caught.value, tmp_path)
    task = stacks[stacks.index("pack 5, run 2") :]
    # From the task's own coroutine down to what it waits for.
    assert task.index("in hang") < task.index("in inner") < task.index("in wait")


def test_a_folder_that_cannot_be_written_hides_nothing(tmp_path):
    waits = Waits(tmp_path / "gone")
    with pytest.raises(StalledError, match=r"step 7; .*could not be written \(.*gone"):
        asyncio.run(waits.within(asyncio.sleep(60), SHORT))
