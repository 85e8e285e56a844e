"""Every wait ends: with its result, with the error of what was awaited, or with one that tells."""

import asyncio
import re
import subprocess
import sys
import time

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

    async def answer():
        return 4

    assert asyncio.run(waits.within(answer(), LONG)) == 4
    with waits.guarded(SHORT):
        pass
    time.sleep(0.2)  # it would have ended us by now
    assert not list(tmp_path.iterdir())


def test_the_error_of_what_was_awaited_is_its_own(tmp_path):
    async def fail_later():
        raise TimeoutError("mine")

    with pytest.raises(TimeoutError, match="mine"):
        asyncio.run(Waits(tmp_path).within(fail_later(), LONG))
    assert not list(tmp_path.iterdir())


def test_signs_of_life_prolong_a_wait(tmp_path):
    waits = Waits(tmp_path)

    async def slow():
        for number in range(6):
            await asyncio.sleep(0.05)
            waits.note("rollout", f"{number} runs are done")
        return "at last"

    assert asyncio.run(waits.within(slow(), SHORT)) == "at last"


def test_what_nothing_can_interrupt_ends_the_process_and_says_why(tmp_path):
    program = (
        "import pathlib, time\n"
        "from codjax.waits import Wait, Waits\n"
        f"waits = Waits(pathlib.Path({str(tmp_path)!r}))\n"
        "waits.note('learner', 'step 6: updated')\n"
        "wait = Wait(who='learner', what='step 7', deadline_s=0.2, key='rollout.deadline_s')\n"
        "with waits.guarded(wait):\n"
        "    time.sleep(60)\n"
    )
    begin = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert time.monotonic() - begin < 30
    assert ended.returncode == 1
    assert re.fullmatch(
        r"codjax: waited 0 s \(rollout\.deadline_s\) for step 7; last sign of life of learner: "
        r"0 s ago: step 6: updated; the stacks of all threads and tasks are in .*\n",
        ended.stderr,
    ), ended.stderr
    (path,) = tmp_path.glob("stall-*.txt")
    assert "line 7 in <module>" in path.read_text()


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

    with pytest.raises(StalledError) as caught:
        asyncio.run(run())
    assert re.match(
        r"waited 0 s \(rollout\.deadline_s\) for the rollout of step 7; last sign of life of "
        r"rollout: none; the stacks of all threads and tasks are in ",
        str(caught.value),
    )
    assert "\n" not in str(caught.value)
    assert cancelled == [True]
    stacks = stacks_of(caught.value, tmp_path)
    task = stacks[stacks.index("pack 5, run 2") :]
    # From the task's own coroutine down to what it waits for.
    assert task.index("in hang") < task.index("in inner") < task.index("in wait")


def test_a_folder_that_cannot_be_written_hides_nothing(tmp_path):
    waits = Waits(tmp_path / "gone")
    with pytest.raises(StalledError, match=r"step 7; .*could not be written \(.*gone"):
        asyncio.run(waits.within(asyncio.sleep(60), SHORT))
