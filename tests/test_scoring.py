"""Whole rollout steps: who is scored, with whom, and what is said of it."""

import dataclasses

import numpy as np
import pytest

from codjax import config as config_lib
from codjax import scoring
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

# spec/algorithm.md §13 A: two runs over three tasks.
TASK_REWARDS = [[0, 1, 1], [0, 0, 1]]
UPDATE_REWARDS = [[0, 0], [-0.1, 0]]
SOLVE_TOKENS = [[40, 20, 10], [40, 40, 20]]
UPDATE_TOKENS = [[30, 30], [50, 30]]


def make_episode(kind, position, reward, turn_tokens):
    turns = tuple(
        Turn(
            prompt_tokens=np.zeros(7, np.int32),
            response_tokens=np.zeros(count, np.int32),
            sampler_logprobs=np.zeros(count, np.float32),
            policy_version=0,
            version_spans=(VersionSpan(0, 0, count),),
            stop_reason=StopReason.STOP_TOKEN,
        )
        for count in turn_tokens
    )
    return Episode(
        kind=kind,
        position=position,
        turns=turns,
        raw_reward=reward,
        reward=reward,
        is_success=reward > 0,
        has_format_error=False,
        stop_reason=StopReason.ENVIRONMENT,
        feedback="",
        hint_in="",
        hint_out="",
        observations=(),
        actions=(),
    )


def make_run(run, task_rewards, update_rewards, solve_tokens, update_tokens, *, taskset="lake"):
    """A trajectory; every solve episode has its tokens spread over two turns."""
    episodes = []
    for k, (reward, tokens) in enumerate(zip(task_rewards, solve_tokens, strict=True)):
        turns = (tokens // 2, tokens - tokens // 2)
        episodes.append(make_episode(EpisodeKind.SOLVE_TASK, k, float(reward), turns))
        if k < len(update_rewards):
            h, turns = float(update_rewards[k]), (update_tokens[k],)
            episodes.append(make_episode(EpisodeKind.UPDATE_CONTEXT, k, h, turns))
    task = Task(taskset=taskset, taskset_id=0, index=0, record={})
    num_tasks = len(task_rewards)
    pack = Pack(
        tasks=(task,) * num_tasks,
        seed=0,
        mode=PackMode.COD,
        env_task_indices=tuple(range(num_tasks)),
    )
    return Trajectory(pack=pack, run=run, episodes=tuple(episodes), failure=None)


def group_a(**kwargs):
    columns = zip(TASK_REWARDS, UPDATE_REWARDS, SOLVE_TOKENS, UPDATE_TOKENS, strict=True)
    return [make_run(run, *column, **kwargs) for run, column in enumerate(columns)]


def group_with_long_successes():
    """The same rewards, but the good run has the long answers: RED has nothing to do."""
    columns = zip(
        TASK_REWARDS, UPDATE_REWARDS, SOLVE_TOKENS[::-1], UPDATE_TOKENS[::-1], strict=True
    )
    return [make_run(run, *column) for run, column in enumerate(columns)]


def failed(run):
    return dataclasses.replace(
        run, episodes=run.episodes[:2], failure=StopReason.ENVIRONMENT_FAILED
    )


def rules(**changes):
    chosen = config_lib.default_config().credit
    chosen.update(changes)
    return scoring.make_rules(chosen)


def test_a_whole_step_is_vector_a():
    (scored,), metrics = scoring.score_trajectories([group_a()], rules())
    assert [one.trajectory.run for one in scored] == [0, 1]
    # In the order of the episodes: solve 0, update 0, solve 1, update 1, solve 2.
    np.testing.assert_allclose(scored[0].scores, [0.198801, 0.222571, 0.325683, 0, 0], atol=5e-7)
    np.testing.assert_allclose(scored[1].scores, [-0.139727, -0.151013, -0.191905, 0, 0], atol=5e-7)
    np.testing.assert_allclose(scored[0].returns, [2 / 3, 2 / 3, 1, 0.5, 1])
    after = (40 * 0.198801 + 30 * 0.222571 + 20 * 0.325683) - (
        40 * 0.139727 + 50 * 0.151013 + 40 * 0.191905
    )
    assert metrics == {
        "credit/dropped_runs": 0.0,
        "credit/reweight_active_frac": 1.0,
        "credit/reweight_temperature": 0.9453125,
        "credit/token_mean_score_before": pytest.approx(-8.666667 / 310, abs=1e-8),
        "credit/token_mean_score_after": pytest.approx(after / 310, abs=1e-7),
        "credit/zero_variance_frac": 0.4,  # solve 2 and update 1 of five keys
    }
    assert all(type(value) is float for value in metrics.values())


def test_a_failed_run_is_dropped_before_the_returns_and_counted():
    group = group_a()
    (scored,), metrics = scoring.score_trajectories(
        [[group[0], failed(group[1]), group[1]]], rules()
    )
    (expected,), _ = scoring.score_trajectories([group], rules())
    assert scored == expected
    assert metrics["credit/dropped_runs"] == 1.0


def test_a_step_in_which_all_failed_says_so():
    scored, metrics = scoring.score_trajectories([[failed(run) for run in group_a()]], rules())
    assert scored == [[]]
    assert metrics == {"credit/dropped_runs": 2.0}
    assert scoring.score_trajectories([], rules()) == ([], {"credit/dropped_runs": 0.0})


def test_empty_groups_keep_their_place():
    scored, _ = scoring.score_trajectories([group_a(), [failed(group_a()[0])], group_a()], rules())
    assert [len(group) for group in scored] == [2, 0, 2]


def test_packs_of_one_task_have_no_updates():
    group = [make_run(run, [reward], [], [10], []) for run, reward in enumerate((1, 0))]
    (scored,), metrics = scoring.score_trajectories([group], rules())
    assert [one.scores for one in scored] == [(0.5,), (-0.5,)]
    assert metrics["credit/reweight_active_frac"] == 0.0
    assert "credit/reweight_temperature" not in metrics


@pytest.mark.parametrize(
    ("level", "active", "temperature"),
    [("batch", 0.0, None), ("taskset", 0.5, 0.9453125), ("pack", 1 / 3, 0.9453125)],
)
def test_the_level_says_which_episodes_red_looks_at_together(level, active, temperature):
    # The group of task set "grid" needs RED; those of "lake" have tokens to spare.
    step = [group_a(taskset="grid"), group_with_long_successes(), group_with_long_successes()]
    scored, metrics = scoring.score_trajectories(step, rules(reweight_group=level))
    assert metrics["credit/reweight_active_frac"] == active
    assert metrics.get("credit/reweight_temperature") == temperature
    is_changed = scored[0][0].scores[0] != pytest.approx(1 / 6)
    assert is_changed == (temperature is not None)
    assert scored[1][0].scores[0] == pytest.approx(1 / 6)


def test_shift_counts_as_active_though_it_has_no_temperature():
    _, metrics = scoring.score_trajectories([group_a()], rules(reweight="shift"))
    assert metrics["credit/reweight_active_frac"] == 1.0
    assert metrics["credit/token_mean_score_after"] == pytest.approx(0, abs=1e-12)
    assert "credit/reweight_temperature" not in metrics


def test_the_coarse_scheme_gives_every_episode_the_score_of_its_run():
    (scored,), metrics = scoring.score_trajectories(
        [group_a()], rules(scheme="coarse", reweight="off")
    )
    assert [one.scores for one in scored] == [(0.5,) * 5, (-0.5,) * 5]
    assert [one.returns for one in scored] == [(2.0,) * 5, (1.0,) * 5]
    assert metrics["credit/zero_variance_frac"] == 0.0


def test_every_rule_follows_from_the_config():
    (scored,), _ = scoring.score_trajectories(
        [group_a()],
        rules(
            style="discounted",
            gamma=0.5,
            baseline="leave_one_out",
            reweight="fixed",
            reweight_temperature=1.0,
        ),
    )
    assert scored[0].scores[0] == pytest.approx(0.5 * np.exp(0.5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scheme": "fine"}, r"credit\.scheme must be one of episodes, coarse; got 'fine'"),
        ({"style": "sum"}, r"credit\.style must be one of"),
        ({"style": "window_mean"}, r"credit\.window must be at least 1"),
        ({"baseline": "none"}, r"credit\.baseline must be one of"),
        ({"reweight": "on"}, r"credit\.reweight must be one of"),
        ({"reweight": "fixed"}, r"credit\.reweight_temperature must be above 0"),
        ({"reweight_group": "task"}, r"credit\.reweight_group must be one of pack, taskset, batch"),
    ],
)
def test_rules_are_checked_when_they_are_made(changes, message):
    with pytest.raises(ValueError, match=message):
        rules(**changes)


def test_a_reward_that_is_not_finite_is_not_taken_for_a_dropped_run():
    group = [make_run(0, [np.nan], [], [10], [])]
    with pytest.raises(ValueError, match="must give finite rewards"):
        scoring.score_trajectories([group], rules())
