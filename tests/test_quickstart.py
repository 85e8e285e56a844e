"""The demonstration itself, shortened: reward rises with position because of what was written."""

import json
import os
import subprocess
import sys

import pytest


def gap(entry):
    rewards = [position["reward"] for position in entry["positions"]]
    return rewards[-1] - rewards[0]


def codjax(command, workdir):
    """The command line as a stranger has it: one device, not the eight of the tests."""
    overrides = [f"--config.evaluation.matrix.{name}.num_packs=512" for name in ENTRIES]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    arguments = ["--config=configs/quickstart.py", f"--workdir={workdir}", *overrides]
    subprocess.run(
        [sys.executable, "-m", "codjax", command, *arguments, "--config.num_steps=100"],
        env=environment,
        check=True,
    )


ENTRIES = ("lake", "hint_blanked", "hint_swapped")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_reward_rises_with_position(tmp_path):
    codjax("train", tmp_path)
    codjax("eval", tmp_path)

    # Standard error of a gap over 512 packs: about 0.027.
    report = json.loads((tmp_path / "eval.json").read_text())
    assert gap(report["base"]["tasksets"]["lake"]) < 0.15
    assert gap(report["tasksets"]["lake"]) > 0.3
    assert abs(gap(report["tasksets"]["hint_blanked"])) < 0.1
    assert abs(gap(report["tasksets"]["hint_swapped"])) < 0.12
    assert (tmp_path / "reward_by_position.png").stat().st_size > 10_000
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["loss/log_ratio_abs_max"] < 1e-4
    assert [line["step"] for line in lines] == list(range(1, 101))
