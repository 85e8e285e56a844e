"""Runs that are killed, for real, go on as if they had not been."""

import pathlib
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
@pytest.mark.parametrize("max_staleness", [0, 1])
def test_kill_9_at_any_moment(tmp_path, max_staleness):
    """Whenever the process dies, the same command ends with what an uninterrupted run writes."""
    num_steps = 60
    command = [
        *(sys.executable, "-m", "codjax", "train", f"--config={TINY}"),
        *(f"--config.num_steps={num_steps}", f"--config.rollout.max_staleness={max_staleness}"),
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


def rows(workdir):
    return metrics.read_metrics(workdir / metrics.METRICS_FILE)


def lines_without_times(workdir):
    """The lines of metrics.jsonl as they stand in the file, but for `time/…`."""
    text = (workdir / metrics.METRICS_FILE).read_text()
    assert text.endswith("\n")
    return [re.sub(r'"time/[a-z_]+": [-+.e0-9]+(, )?', "", line) for line in text.splitlines()]
