"""Runs that are killed, for real, go on as if they had not been."""

import json
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import pytest

from codjax import metrics

TINY = pathlib.Path(__file__).parent / "tiny.py"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kill_9_at_any_moment(tmp_path):
    """Whenever the process dies, the same command ends with what an uninterrupted run writes.

    One step ahead, where a checkpoint holds most: rollouts that wait, by weights that are gone.
    """
    num_steps = 60
    command = [
        *(sys.executable, "-m", "codjax", "train", f"--config={TINY}"),
        *(f"--config.num_steps={num_steps}", "--config.rollout.max_staleness=1"),
        *("--config.checkpoint.every_steps=4", "--config.checkpoint.keep=2"),
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    log = tmp_path / "log.txt"

    def start(workdir):
        with log.open("a") as output:
            return subprocess.Popen(
                [*command, f"--workdir={workdir}"], stdout=output, stderr=output
            )

    def num_lines():
        path = killed / metrics.METRICS_FILE
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def is_writing():
        return any(killed.glob("checkpoints/*.orbax-checkpoint-tmp"))

    moments = [
        ("in the warm-up", (killed / "warmup.jsonl").exists, 0.3),
        ("while step 0 is written", is_writing, 0.0),
        ("at the first step", lambda: num_lines() >= 1, 0.0),
        ("while a later step is written", lambda: num_lines() >= 10 and is_writing(), 0.0),
        ("a little later", lambda: num_lines() >= 20 and is_writing(), 0.05),
        ("between two checkpoints", lambda: num_lines() % 4 == 2 and num_lines() > 28, 0.0),
        ("at last", lambda: num_lines() >= 45, 0.02),
    ]
    assert start(whole).wait(timeout=200) == 0, log.read_text()
    num_killed = 0
    for _, has_come, delay_s in moments:
        process = start(killed)
        while process.poll() is None and not has_come():
            time.sleep(0.001)
        time.sleep(delay_s)
        process.send_signal(signal.SIGKILL)
        num_killed += process.wait(timeout=60) == -signal.SIGKILL
    assert num_killed == len(moments)  # else the run was over before the last moment
    assert start(killed).wait(timeout=200) == 0, log.read_text()

    assert [row["step"] for row in rows(killed)] == list(range(1, num_steps + 1))
    assert lines_without_times(killed) == lines_without_times(whole)
    assert sorted(path.name for path in (killed / "checkpoints").iterdir()) == ["0", "56", "60"]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_an_asynchronous_run_that_is_killed_20_times(tmp_path):
    """At moments that nobody chose; no rollout step is lost or trained on twice."""
    rng, num_steps, log, workdir = random.Random(0), 1500, tmp_path / "log.txt", tmp_path / "run"
    command = [
        *(sys.executable, "-m", "codjax", "train", f"--config={TINY}", f"--workdir={workdir}"),
        *(f"--config.num_steps={num_steps}", "--config.checkpoint.every_steps=5"),
        *("--config.checkpoint.keep=2", "--config.warmup.num_steps=50"),
        *("--config.rollout.max_staleness=3", "--config.rollout.in_flight_updates=True"),
    ]

    def start():
        with log.open("a") as output:
            return subprocess.Popen(command, stdout=output, stderr=output)

    path, num_killed = workdir / metrics.METRICS_FILE, 0
    for number in range(20):
        process, size = start(), path.stat().st_size if path.exists() else 0
        if number % 4:  # in the middle of steps; else perhaps while it starts
            while process.poll() is None and not (path.exists() and path.stat().st_size != size):
                time.sleep(0.001)
        time.sleep(rng.uniform(0, 2 if number % 4 else 15))
        process.send_signal(signal.SIGKILL)
        num_killed += process.wait(timeout=60) == -signal.SIGKILL
    assert num_killed == 20  # else the run was over before
    assert start().wait(timeout=600) == 0, log.read_text()

    found = rows(workdir)
    assert [row["step"] for row in found] == list(range(1, num_steps + 1))
    trained = [row["rollout/step"] for row in found]
    assert len(set(trained)) == num_steps
    # Every step that was begun was trained on, or given up as too old and counted, or is there.
    num_dropped = sum(row["staleness/dropped_steps"] for row in found)
    last = workdir / "checkpoints" / str(num_steps) / "loop" / "metadata"
    loop = json.loads(last.read_text())
    under_way = {*loop["unfinished"], *(item["step"] for item in loop["items"])}
    missing = set(range(loop["next_step"])) - set(trained)
    assert under_way <= missing
    assert len(missing - under_way) == num_dropped
    assert "Traceback" not in log.read_text()
    print(f"{log.read_text().count('Resuming')} resumed; {num_dropped} of {max(trained)} dropped")


def rows(workdir):
    return metrics.read_metrics(workdir / metrics.METRICS_FILE)


def lines_without_times(workdir):
    """The lines of metrics.jsonl as they stand in the file, but for `time/…`."""
    text = (workdir / metrics.METRICS_FILE).read_text()
    assert text.endswith("\n")
    return [re.sub(r'"time/[a-z_]+": [-+.e0-9]+(, )?', "", line) for line in text.splitlines()]
