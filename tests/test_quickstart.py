"""The demonstration itself, shortened: reward rises with position because of what was written."""

import json

import pytest

from codjax import config_files, evaluate, train


def gap(entry):
    rewards = [position["reward"] for position in entry["positions"]]
    return rewards[-1] - rewards[0]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_reward_rises_with_position(tmp_path, monkeypatch):
    config = config_files.load("configs/quickstart.py")
    config.num_steps = 100
    config.evaluation.matrix.lake.num_packs = 512
    config.evaluation.matrix.hint_blanked.num_packs = 512
    config.evaluation.matrix.hint_swapped.num_packs = 512

    train.main(config, str(tmp_path))
    report = evaluate.main(config, "latest", str(tmp_path))

    # Standard error of a gap over 512 packs: about 0.027.
    assert gap(report["base"]["tasksets"]["lake"]) < 0.15
    assert gap(report["tasksets"]["lake"]) > 0.3
    assert abs(gap(report["tasksets"]["hint_blanked"])) < 0.1
    assert abs(gap(report["tasksets"]["hint_swapped"])) < 0.12
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["loss/log_ratio_abs_max"] < 1e-4
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 101))
