"""Numbers of a step by hand; files that a crash cannot spoil."""

import json
import pathlib

import numpy as np
import pytest

from codjax import metrics, scoring
from codjax.types import (
    Episode,
    EpisodeKind,
    Pack,
    PackMode,
    StopReason,
    Task,
    Trajectory,
    Turn,
    VersionSpan,
)


def turn(num_tokens=2, *, version=5, spans=None, stop=StopReason.STOP_TOKEN):
    return Turn(
        prompt_tokens=np.array([7, 8, 9], np.int32),
        response_tokens=np.arange(num_tokens, dtype=np.int32),
        sampler_logprobs=np.full(num_tokens, -0.1, np.float32),
        policy_version=version,
        version_spans=spans or (VersionSpan(version, 0, num_tokens),),
        stop_reason=stop,
    )


def episode(kind, position, *, reward=0.0, turns=None, **changes):
    values = {
        "kind": kind,
        "position": position,
        "turns": tuple(turns or [turn()]),
        "raw_reward": float(reward > 0),
        "reward": reward,
        "is_success": reward > 0,
        "has_format_error": False,
        "stop_reason": StopReason.ENVIRONMENT,
        "feedback": "done",
        "hint_in": "none",
        "hint_out": "c goes down",
        "observations": ("a lake",),
        "actions": ("go",),
    }
    return Episode(**(values | changes))


def solve(position, **values):
    return episode(EpisodeKind.SOLVE_TASK, position, **values)


def update(position, *, has_format_error=False, **values):
    changes = {"has_format_error": has_format_error, "is_success": not has_format_error}
    return episode(EpisodeKind.UPDATE_CONTEXT, position, **(changes | values))


def trajectory(run, *episodes, taskset="lake", failure=None):
    tasks = tuple(
        Task(taskset=taskset, taskset_id=0, index=k, record={"size": 4}) for k in range(2)
    )
    pack = Pack(tasks=tasks, seed=11, mode=PackMode.COD, env_task_indices=(0, 1))
    return Trajectory(pack=pack, run=run, episodes=episodes, failure=failure)


def test_an_update_that_was_never_made_is_no_parsed_hint():
    cut = update(0, is_success=False, stop_reason=StopReason.PROMPT_TOO_LONG, turns=[turn(1)])
    found = metrics.rollout_metrics([[trajectory(0, solve(0), cut)]], policy_version=1)
    assert found["hint/parse_frac"] == 0.0
    assert "hint/length_chars_position_0" not in found


def test_metrics_of_a_step_by_hand():
    first = trajectory(
        0,
        solve(0, reward=0.0, turns=[turn(3), turn(5, version=3, stop=StopReason.LENGTH)]),
        update(0, hint_out="12345678"),
        solve(1, reward=0.9),
    )
    second = trajectory(
        1,
        solve(0, reward=0.95, has_format_error=True),
        update(0, has_format_error=True, turns=[turn(4)]),
        solve(1, reward=0.0, stop_reason=StopReason.PROMPT_TOO_LONG, turns=[turn(1)]),
    )
    dropped = trajectory(2, solve(0, reward=1.0), failure=StopReason.SAMPLER_FAILED)
    assert metrics.rollout_metrics([[first, second, dropped]], policy_version=6) == {
        "rollout/num_runs": 3.0,
        "rollout/dropped_runs": 1.0,
        "rollout/response_tokens": 3 + 5 + 2 + 2 + 2 + 4 + 1.0,
        "rollout/truncated_frac": pytest.approx(1 / 7),
        "rollout/prompt_too_long_frac": pytest.approx(1 / 6),
        "staleness/mean": pytest.approx((14 * 1 + 5 * 3) / 19),
        "staleness/max": 3.0,
        "reward/mean": pytest.approx(1.85 / 4),
        "reward/position_0": pytest.approx(0.475),
        "reward/position_1": pytest.approx(0.45),
        "reward/gap": pytest.approx(-0.025),
        "raw_reward/position_0": 0.5,
        "raw_reward/position_1": 0.5,
        "success/position_0": 0.5,
        "success/position_1": 0.5,
        "turns/position_0": 1.5,
        "turns/position_1": 1.0,
        "response_tokens/position_0": 5.0,
        "response_tokens/position_1": 1.5,
        "format_error/position_0": 0.5,
        "format_error/position_1": 0.0,
        "hint/parse_frac": 0.5,
        "hint/parse_frac_position_0": 0.5,
        "hint/length_chars_position_0": 8.0,
        "hint/response_tokens_position_0": 3.0,
    }


def test_the_age_of_a_turn_that_saw_new_weights_is_that_of_each_token():
    spans = (VersionSpan(3, 0, 1), VersionSpan(4, 1, 4))
    run = trajectory(0, solve(0, turns=[turn(4, version=3, spans=spans)]))
    found = metrics.rollout_metrics([[run]], policy_version=5)
    assert found["staleness/mean"] == (1 * 2 + 3 * 1) / 4
    assert found["staleness/max"] == 2.0


def test_what_nobody_reached_has_no_key():
    dropped = trajectory(0, failure=StopReason.ENVIRONMENT_FAILED)
    assert metrics.rollout_metrics([[dropped]], policy_version=0) == {
        "rollout/num_runs": 1.0,
        "rollout/dropped_runs": 1.0,
        "rollout/response_tokens": 0.0,
    }


def test_two_task_sets_are_told_apart():
    lake = trajectory(0, solve(0, reward=0.0), solve(1, reward=1.0), taskset="lake")
    shop = trajectory(0, solve(0, reward=0.5), solve(1, reward=0.5), taskset="shop")
    found = metrics.rollout_metrics([[lake], [shop]], policy_version=5)
    assert found["reward/position_1"] == 0.75
    assert found["reward/lake/position_1"] == 1.0
    assert found["reward/lake/gap"] == 1.0
    assert found["reward/shop/mean"] == 0.5
    assert found["success/lake/position_0"] == 0.0
    assert "reward/lake/mean" not in metrics.rollout_metrics([[lake]], policy_version=5)


def test_every_metric_is_documented():
    text = (pathlib.Path(__file__).parents[1] / "docs" / "metrics.md").read_text()
    run = trajectory(0, solve(0), update(0), solve(1))
    for key in metrics.rollout_metrics([[run]], policy_version=5):
        assert key.replace("_1", "_K").replace("_0", "_K") in text, key


def test_equal_numbers_give_equal_bytes(tmp_path):
    values = {"b/x": 0.1 + 0.2, "a/n": 3, "c/f": np.float32(0.1), "c/i": np.int32(4)}
    for name in ("one", "two"):
        with metrics.MetricsWriter(tmp_path / name, start_step=1, tensorboard=False) as writer:
            writer.write(1, dict(reversed(values.items())) if name == "two" else values)
    expected = (
        '{"a/n": 3, "b/x": 0.30000000000000004, "c/f": 0.10000000149011612, "c/i": 4, "step": 1}\n'
    )
    assert (tmp_path / "one" / "metrics.jsonl").read_text() == expected
    assert (tmp_path / "two" / "metrics.jsonl").read_text() == expected


@pytest.mark.parametrize("tail", ["", '{"reward/me', '{"step": 3, "a/b": 3.0}\n{"st'])
def test_a_resumed_run_rewrites_its_steps(tmp_path, tail):
    lines = [f'{{"a/b": {step}.0, "step": {step}}}\n' for step in (0, 1, 2)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(lines) + tail)
    with metrics.MetricsWriter(tmp_path, start_step=2, tensorboard=False) as writer:
        assert path.read_text() == "".join(lines[:2])
        writer.write(2, {"a/b": 2.5})
    assert path.read_text() == "".join(lines[:2]) + '{"a/b": 2.5, "step": 2}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_line_whose_newline_was_lost_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"a/b": 0.0, "step": 0}')
    with metrics.MetricsWriter(tmp_path, start_step=1, tensorboard=False) as writer:
        writer.write(1, {"a/b": 1.0})
    assert [row["step"] for row in metrics.read_metrics(tmp_path / "metrics.jsonl")] == [0, 1]


def test_a_broken_line_inside_the_file_is_an_error(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 2 is not JSON"):
        metrics.MetricsWriter(tmp_path, start_step=3, tensorboard=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("nan")])
def test_a_nan_stops_the_run_and_names_the_step(tmp_path, value):
    with metrics.MetricsWriter(tmp_path, start_step=0, tensorboard=False) as writer:
        writer.write(0, {"loss/total": 1.0})
        with pytest.raises(
            metrics.NonFiniteMetricError, match=r"^loss/total is (nan|inf) at step 1"
        ):
            writer.write(1, {"loss/total": value, "a/b": 1.0})
        with pytest.raises(ValueError, match=r"^metrics of step 0 come after those of step 0"):
            writer.write(0, {})
    assert len(metrics.read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_tensorboard_events_are_written(tmp_path):
    with metrics.MetricsWriter(tmp_path, start_step=0, tensorboard=True) as writer:
        writer.write(0, {"reward/mean": 0.5})
    events = list((tmp_path / "tensorboard").iterdir())
    assert len(events) == 1
    assert b"reward/mean" in events[0].read_bytes()


def test_groups_are_picked_random_then_best_then_worst():
    groups = [[trajectory(0, solve(0, reward=reward))] for reward in (0.2, 0.9, 0.1, 0.5)]
    groups.append([trajectory(0, failure=StopReason.SAMPLER_FAILED)])
    picked = metrics.pick_groups(groups, 3, seed=0)
    assert metrics.pick_groups(groups, 3, seed=0) == picked
    assert len(dict(picked)) == 3
    assert picked[0][1] == "random"
    first = picked[0][0]
    if first != 1:
        assert (1, "best") in picked
    if first != 2:
        assert (2, "worst") in picked
    assert sorted(dict(metrics.pick_groups(groups, 9, seed=0))) == [0, 1, 2, 3, 4]
    assert {metrics.pick_groups(groups, 1, seed=seed)[0][0] for seed in range(40)} == set(range(5))
    failed = [[trajectory(0, failure=StopReason.SAMPLER_FAILED)]]
    assert metrics.pick_groups(failed, 3, seed=0) == [(0, "random")]


def test_trajectories_are_written_whole(tmp_path):
    kept = trajectory(0, solve(0, reward=0.5), update(0), solve(1, reward=1.0))
    failed = trajectory(1, solve(0), failure=StopReason.SAMPLER_FAILED)
    scored = scoring.ScoredTrajectory(
        trajectory=kept, scores=(0.1, 0.2, 0.3), returns=(0.75, 0.5, 1.0)
    )
    writer = metrics.TrajectoryWriter(
        tmp_path, seed=0, packs_per_step=1, decode=lambda tokens: " ".join(map(str, tokens))
    )
    for _ in range(2):  # a step that is done again replaces its file
        path = writer.write(10, [[kept, failed]], [[scored]])
    assert path == tmp_path / "trajectories" / "step_000010.jsonl"
    first, second = map(json.loads, path.read_text().splitlines())
    assert (first["step"], first["group"], first["picked"]) == (10, 0, "random")
    assert (first["run"], first["failure"]) == (0, None)
    assert (second["run"], second["failure"]) == (1, "sampler_failed")
    assert first["pack"] == {
        "mode": "cod",
        "seed": 11,
        "taskset": "lake",
        "tasks": [{"index": 0, "record": {"size": 4}}, {"index": 1, "record": {"size": 4}}],
    }
    assert [e["score"] for e in first["episodes"]] == [0.1, 0.2, 0.3]
    assert "score" not in second["episodes"][0]
    assert first["episodes"][0] == {
        "kind": "solve_task",
        "position": 0,
        "raw_reward": 1.0,
        "reward": 0.5,
        "is_success": True,
        "has_format_error": False,
        "stop_reason": "environment",
        "hint_in": "none",
        "hint_out": "c goes down",
        "feedback": "done",
        "observations": ["a lake"],
        "actions": ["go"],
        "turns": [
            {
                "prompt": "7 8 9",
                "response": "0 1",
                "prompt_tokens": [7, 8, 9],
                "response_tokens": [0, 1],
                "sampler_logprobs": [-0.1, -0.1],
                "policy_version": 5,
                "version_spans": [[5, 0, 2]],
                "stop_reason": "stop_token",
            }
        ],
        "score": 0.1,
        "return": 0.75,
    }


def test_trajectories_without_credit(tmp_path):
    writer = metrics.TrajectoryWriter(tmp_path, seed=0, packs_per_step=2, decode=str)
    path = writer.write(0, [[trajectory(0, solve(0))]])
    assert "score" not in json.loads(path.read_text())["episodes"][0]
