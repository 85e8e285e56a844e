"""Vectors of spec/algorithm.md §13 E and environments_core.md §8, then §5.2 branch by branch."""

import pytest

from codjax.rollout import rewards


def task(
    raw_reward, num_turns, max_turns=8, *, lengths=(), coef=0.1, zero=1_000_000, full=2_000_000
):
    return rewards.task_reward(
        raw_reward,
        num_turns=num_turns,
        max_turns=max_turns,
        response_lengths=lengths,
        coef=coef,
        zero_tokens=zero,
        full_tokens=full,
    )


@pytest.mark.parametrize(
    ("raw_reward", "num_turns", "max_turns", "reward"),
    [
        (1.0, 4, 8, 0.95),
        (1.0, 8, 8, 0.9),
        (0.03, 8, 8, 0.0),
        (0.0, 8, 8, 0.0),
        (1.0, 1, 8, 0.9875),
        (1.0, 3, 15, 0.98),
        (-1.0, 8, 8, -1.0),
    ],
)
def test_turn_penalty(raw_reward, num_turns, max_turns, reward):
    assert task(raw_reward, num_turns, max_turns) == pytest.approx(reward, abs=1e-12)


def test_token_penalty_is_the_mean_over_turns():
    # Shares 0, 1/2, 1, 1; turns 4 of 8.
    value = task(1.0, 4, lengths=(100, 150, 200, 900), zero=100, full=200)
    assert value == pytest.approx(1 - 0.1 * (2.5 / 4 + 0.5))


def test_no_coefficient_no_penalty():
    assert task(1.0, 8, coef=0.0) == 1.0


def test_without_turns_there_is_no_token_penalty():
    assert task(1.0, 0) == 1.0


@pytest.mark.parametrize(
    ("parsed", "num_tokens", "thresholds", "reward"),
    [
        (False, 5, (None, None, None), -0.1),
        (False, 5, (None, 10, 20), -0.1),
        (True, 5, (None, None, None), 0.0),
        (True, 5, (9, None, 20), 0.0),  # a threshold unset: length does not count
        (True, 5, (9, 10, None), 0.0),
        (True, 5, (9, 10, 20), -0.1),  # too short
        (True, 9, (9, 10, 20), 0.0),
        (True, 15, (None, 10, 20), -0.05),
        (True, 99, (None, 10, 20), -0.1),
    ],
)
def test_update_reward(parsed, num_tokens, thresholds, reward):
    min_tokens, zero, full = thresholds
    value = rewards.update_reward(
        parsed=parsed,
        num_tokens=num_tokens,
        coef=0.1,
        min_tokens=min_tokens,
        zero_tokens=zero,
        full_tokens=full,
    )
    assert value == pytest.approx(reward)
    assert str(value) != "-0.0"
