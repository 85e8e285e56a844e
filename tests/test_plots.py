import json
import struct

import numpy as np

from codjax import plots


def png_size(path):
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", header[16:24])


def test_reward_by_position_is_drawn_at_readme_width(tmp_path):
    path = tmp_path / "positions.png"
    positions = [{"reward": r, "reward_ci95": 0.03, "success": r} for r in (0.2, 0.6, 0.8)]
    results = {f"checkpoint {k}": positions for k in range(9)}  # more than there are colours
    plots.plot_reward_by_position(results, {"perfect memory": [0.25, 0.7, 0.9, 0.95]}, path)
    assert png_size(path) == (1200, 690)
    plots.plot_reward_by_position(results, {}, path)


def test_training_is_drawn_from_metrics(tmp_path):
    lines = [
        {"step": step, "reward/position_0": 0.2, "reward/position_1": step / 30, "loss/total": 1.0}
        for step in range(30)
    ]
    del lines[3]["reward/position_1"]  # a step on which nobody got there
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3')
    plots.plot_training(metrics, tmp_path / "training.png")
    assert png_size(tmp_path / "training.png") == (1200, 690)


def test_training_of_an_empty_run_is_an_empty_plot(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    plots.plot_training(tmp_path / "metrics.jsonl", tmp_path / "training.png")
    assert png_size(tmp_path / "training.png") == (1200, 690)


def test_smoothing_is_a_centred_mean_that_shortens_at_the_ends():
    out = plots._smooth(np.array([0.0, 3.0, 6.0, 9.0]), width=1)
    np.testing.assert_allclose(out, [1.5, 3.0, 6.0, 7.5])
