import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from codjax import credit

# spec/algorithm.md §13 A: two runs over three tasks.
TASK_REWARDS = [[0, 1, 1], [0, 0, 1]]
UPDATE_REWARDS = [[0, 0], [-0.1, 0]]
SOLVE_TOKENS = [[40, 20, 10], [40, 40, 20]]
UPDATE_TOKENS = [[30, 30], [50, 30]]
STYLES = [
    {"style": "mean"},
    {"style": "window_mean", "window": 2},
    {"style": "discounted", "gamma": 0.5},
]


def flat(solve, update):
    """Both runs one after the other: solve 0, 1, 2, update 0, 1."""
    return np.concatenate([solve, update], axis=1).ravel()


# Group scores


@pytest.mark.parametrize(
    ("style", "solve_returns", "update_returns"),
    [
        (STYLES[0], [[2 / 3, 1, 1], [1 / 3, 0.5, 1]], [[2 / 3, 0.5], [0.3, 0.5]]),
        (STYLES[1], [[0.5, 1, 1], [0, 0.5, 1]], [[0.5, 0.5], [-0.05, 0.5]]),
        (STYLES[2], [[0.75, 1.5, 1], [0.25, 0.5, 1]], [[0.75, 0.5], [0.15, 0.5]]),
    ],
)
def test_vector_a_returns(style, solve_returns, update_returns):
    solve, update = credit.returns(TASK_REWARDS, UPDATE_REWARDS, **style)
    np.testing.assert_allclose(solve, solve_returns, atol=1e-12)
    np.testing.assert_allclose(update, update_returns, atol=1e-12)


@pytest.mark.parametrize(
    ("style", "solve_of_first", "update_of_first"),
    [
        (STYLES[0], [1 / 6, 0.25, 0], [0.55 / 3, 0]),
        (STYLES[1], [0.25, 0.25, 0], [0.275, 0]),
        (STYLES[2], [0.25, 0.5, 0], [0.3, 0]),
    ],
)
def test_vector_a_scores(style, solve_of_first, update_of_first):
    solve, update = credit.group_scores(TASK_REWARDS, UPDATE_REWARDS, **style)
    np.testing.assert_allclose(solve, [solve_of_first, -np.array(solve_of_first)], atol=1e-12)
    np.testing.assert_allclose(update, [update_of_first, -np.array(update_of_first)], atol=1e-12)


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int32])
def test_arrays_of_any_kind_come_in(kind):
    tasks, updates = np.array(TASK_REWARDS, kind), np.zeros((2, 2), kind)
    expected = credit.group_scores(TASK_REWARDS, [[0, 0], [0, 0]])
    for convert in (np.asarray, jnp.asarray, np.ndarray.tolist):
        for found, wanted in zip(
            credit.group_scores(convert(tasks), convert(updates)), expected, strict=True
        ):
            assert isinstance(found, np.ndarray)
            assert found.dtype == np.float64
            np.testing.assert_array_equal(found, wanted)


def test_a_dropped_run_is_nan_and_no_part_of_the_baseline():
    nan = np.nan
    tasks = [TASK_REWARDS[0], [nan] * 3, TASK_REWARDS[1], [1, nan, 1]]
    updates = [UPDATE_REWARDS[0], [nan] * 2, UPDATE_REWARDS[1], [0, 0]]
    expected = credit.group_scores(TASK_REWARDS, UPDATE_REWARDS)
    for found, wanted in zip(credit.group_scores(tasks, updates), expected, strict=True):
        np.testing.assert_array_equal(found[[0, 2]], wanted)
        assert np.isnan(found[[1, 3]]).all()


@pytest.mark.parametrize("baseline", [credit.group_mean, credit.leave_one_out])
def test_a_run_alone_has_score_zero(baseline):
    solve, update = credit.group_scores(
        [[0.3, 1.0], [np.nan, 0.0]], [[-0.1], [0.0]], baseline=baseline
    )
    np.testing.assert_array_equal(solve, [[0, 0], [np.nan, np.nan]])
    np.testing.assert_array_equal(update, [[0], [np.nan]])


def test_all_runs_dropped_gives_nan():
    solve, update = credit.group_scores(np.full((2, 2), np.nan), np.full((2, 1), np.nan))
    assert np.isnan(solve).all()
    assert np.isnan(update).all()


def test_one_task_without_updates_is_plain_grpo_without_std():
    solve, update = credit.group_scores([[1.0], [0.0], [0.5]], np.zeros((3, 0)))
    np.testing.assert_allclose(solve, [[0.5], [-0.5], [0.0]])
    assert update.shape == (3, 0)


def test_window_one_and_gamma_zero_leave_hints_without_later_credit():
    for style in ({"style": "window_mean", "window": 1}, {"style": "discounted", "gamma": 0}):
        solve, update = credit.returns(TASK_REWARDS, UPDATE_REWARDS, **style)
        np.testing.assert_array_equal(solve, TASK_REWARDS)
        np.testing.assert_array_equal(update, UPDATE_REWARDS)


def test_gamma_one_is_the_plain_sum():
    solve, _ = credit.returns(TASK_REWARDS, UPDATE_REWARDS, "discounted", gamma=1)
    np.testing.assert_array_equal(solve, [[2, 2, 1], [1, 1, 1]])


def test_leave_one_out_by_hand():
    solve, _ = credit.group_scores(
        [[1.0], [0.0], [0.5]], np.zeros((3, 0)), baseline=credit.leave_one_out
    )
    np.testing.assert_allclose(solve, [[0.75], [-0.75], [0.0]])


def test_leave_one_out_is_group_mean_scaled():
    plain = credit.group_scores(TASK_REWARDS, UPDATE_REWARDS)
    scaled = credit.group_scores(TASK_REWARDS, UPDATE_REWARDS, baseline=credit.leave_one_out)
    for one, other in zip(plain, scaled, strict=True):
        np.testing.assert_allclose(2 * one, other, atol=1e-12)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"credit\.style must be one of mean, window_mean"):
        credit.group_scores(TASK_REWARDS, UPDATE_REWARDS, style="median")
    with pytest.raises(ValueError, match=r"credit\.window must be at least 1.*got None"):
        credit.group_scores(TASK_REWARDS, UPDATE_REWARDS, style="window_mean")
    with pytest.raises(ValueError, match=r"credit\.gamma must be from 0 to 1; got 1\.5"):
        credit.group_scores(TASK_REWARDS, UPDATE_REWARDS, style="discounted", gamma=1.5)
    with pytest.raises(ValueError, match=r"got shapes \(2, 3\) and \(2, 3\)"):
        credit.group_scores(TASK_REWARDS, TASK_REWARDS)
    with pytest.raises(ValueError, match="finite"):
        credit.group_scores([[np.inf]], np.zeros((1, 0)))


@st.composite
def groups(draw):
    shape = (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    numbers = st.floats(-1, 1, width=32)
    return (
        draw(hnp.arrays(np.float64, shape, elements=numbers)),
        draw(hnp.arrays(np.float64, (shape[0], shape[1] - 1), elements=numbers)),
    )


styles = st.sampled_from([*STYLES, {"style": "discounted", "gamma": 1.0}])


@settings(deadline=None)
@given(group=groups(), style=styles)
def test_scores_of_a_key_sum_to_zero_over_runs(group, style):
    for scores in credit.group_scores(*group, **style):
        np.testing.assert_allclose(scores.sum(axis=0), 0, atol=1e-12)


@settings(deadline=None)
@given(group=groups(), style=styles, constant=st.floats(-3, 3))
def test_a_constant_added_to_all_rewards_changes_nothing(group, style, constant):
    moved = credit.group_scores(*(rewards + constant for rewards in group), **style)
    for scores, others in zip(credit.group_scores(*group, **style), moved, strict=True):
        np.testing.assert_allclose(scores, others, atol=1e-11)


@settings(deadline=None)
@given(group=groups(), style=styles, data=st.data())
def test_credit_ignores_rewards_before_the_episode(group, style, data):
    tasks, updates = group
    j = data.draw(st.integers(0, tasks.shape[1] - 1))
    g = data.draw(st.integers(0, tasks.shape[0] - 1))
    changed = tasks.copy()
    changed[g, j] += 1.0
    solve, update = credit.group_scores(tasks, updates, **style)
    solve_changed, update_changed = credit.group_scores(changed, updates, **style)
    np.testing.assert_array_equal(solve[:, j + 1 :], solve_changed[:, j + 1 :])
    np.testing.assert_array_equal(update[:, j:], update_changed[:, j:])  # nor of (update, j)


@settings(deadline=None)
@given(group=groups(), style=styles, data=st.data())
def test_an_update_reward_concerns_its_own_episode_only(group, style, data):
    tasks, updates = group
    if updates.shape[1] == 0:
        return
    j = data.draw(st.integers(0, updates.shape[1] - 1))
    changed = updates.copy()
    changed[0, j] += 1.0
    solve, update = credit.group_scores(tasks, updates, **style)
    solve_changed, update_changed = credit.group_scores(tasks, changed, **style)
    np.testing.assert_array_equal(solve, solve_changed)
    np.testing.assert_array_equal(
        np.delete(update, j, axis=1), np.delete(update_changed, j, axis=1)
    )


@settings(deadline=None)
@given(group=groups(), style=styles, data=st.data())
def test_permuting_runs_permutes_scores(group, style, data):
    order = data.draw(st.permutations(range(group[0].shape[0])))
    permuted = credit.group_scores(*(rewards[order] for rewards in group), **style)
    for scores, others in zip(credit.group_scores(*group, **style), permuted, strict=True):
        np.testing.assert_allclose(scores[order], others, atol=1e-12)


@settings(deadline=None)
@given(
    rewards=hnp.arrays(np.float64, (1, 4), elements=st.floats(-1, 1)),
    num_runs=st.integers(1, 9),
    style=styles,
    baseline=st.sampled_from([credit.group_mean, credit.leave_one_out]),
)
def test_a_group_of_equal_rewards_gives_exact_zeros(rewards, num_runs, style, baseline):
    tasks = np.repeat(rewards, num_runs, axis=0)
    for scores in credit.group_scores(tasks, tasks[:, :3], **style, baseline=baseline):
        np.testing.assert_array_equal(scores, 0.0)


# Coarse scores


def test_coarse_scores_by_hand():
    np.testing.assert_allclose(credit.coarse_scores(TASK_REWARDS), [0.5, -0.5])
    # Later tasks are heavier: 0.25 * 0 + 0.5 * 1 + 1 against 0.5 * 0 + 1.
    np.testing.assert_allclose(credit.coarse_scores(TASK_REWARDS, decay=0.5), [0.25, -0.25])
    np.testing.assert_allclose(credit.coarse_scores(TASK_REWARDS, divide_by_std=True), [1, -1])


def test_coarse_scores_skip_dropped_runs():
    tasks = [TASK_REWARDS[0], [np.nan] * 3, TASK_REWARDS[1]]
    np.testing.assert_allclose(credit.coarse_scores(tasks, divide_by_std=True), [1.0, np.nan, -1.0])
    assert np.isnan(credit.coarse_scores([[np.nan, np.nan]], divide_by_std=True)).all()


def test_rounding_is_not_blown_up_by_a_tiny_std():
    tasks = [[0.1, 0.2], [0.3, 0.0]]  # 0.1 + 0.2 is not 0.3
    np.testing.assert_array_equal(credit.coarse_scores(tasks, divide_by_std=True), [0, 0])


# RED


def test_vector_a_adaptive():
    scores = flat(*credit.group_scores(TASK_REWARDS, UPDATE_REWARDS))
    tokens = flat(SOLVE_TOKENS, UPDATE_TOKENS)
    assert np.sum(tokens) == 310
    assert np.sum(scores * tokens) == pytest.approx(-8.666667, abs=1e-6)
    weighted, temperature = credit.reweight(scores, tokens)
    assert temperature == 0.9453125
    first = [0.198801, 0.325683, 0, 0.222571, 0]
    second = [-0.139727, -0.191905, 0, -0.151013, 0]
    np.testing.assert_allclose(weighted, first + second, atol=5e-7)


def test_vector_a_shift():
    scores = flat(*credit.group_scores(TASK_REWARDS, UPDATE_REWARDS))
    tokens = flat(SOLVE_TOKENS, UPDATE_TOKENS)
    shifted, temperature = credit.reweight(scores, tokens, mode="shift")
    np.testing.assert_allclose(shifted - scores, 0.0279570, atol=5e-8)
    assert temperature is None
    assert np.sum(shifted * tokens) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("scores", "tokens", "temperature", "weighted"),
    [
        ([0.5, -0.5], [300, 100], None, [0.5, -0.5]),
        ([0.5, -0.5], [100, 120], 5.4984375, [0.547599, -0.456539]),
        ([0.5, -0.5], [100, 300], 0.9453125, [0.848554, -0.294619]),
        ([0.9, -0.1], [100, 1000], 9.4703125, [0.989726, -0.098950]),
        ([0.5, -0.5], [100, 101], 99.9515625, [0.502507, -0.497505]),
        ([-0.2, -0.1], [5, 5], 0.8484375, [-0.157999, -0.088882]),
    ],
)
def test_vector_b(scores, tokens, temperature, weighted):
    for convert in (list, np.asarray, jnp.asarray):
        found, used = credit.reweight(convert(scores), convert(tokens))
        # Half a digit of the table, and what float32 makes of a decimal.
        np.testing.assert_allclose(found, weighted, atol=6e-7)
        assert used == (None if temperature is None else pytest.approx(temperature, abs=1e-9))


def test_fixed_weighs_always_and_off_never():
    weighted, temperature = credit.reweight([0.5, -0.5], [300, 100], "fixed", 2)
    np.testing.assert_allclose(weighted, [0.5 * np.exp(0.25), -0.5 * np.exp(-0.25)])
    assert temperature == 2.0
    weighted, temperature = credit.reweight([0.5, -0.5], [100, 300], "off")
    np.testing.assert_array_equal(weighted, [0.5, -0.5])
    assert temperature is None


def test_shift_leaves_a_positive_mean():
    shifted, _ = credit.reweight([0.5, -0.5], [300, 100], mode="shift")
    np.testing.assert_array_equal(shifted, [0.5, -0.5])


def test_nothing_to_weigh():
    for mode in ("off", "adaptive", "shift"):
        assert credit.reweight([], [], mode)[0].shape == (0,)
        np.testing.assert_array_equal(credit.reweight([-1.0], [0], mode)[0], [-1.0])


def test_dropped_scores_have_no_part_in_red():
    weighted, temperature = credit.reweight([0.5, np.nan, -0.5], [100, 10**6, 120])
    np.testing.assert_allclose(weighted, [0.547599, np.nan, -0.456539], atol=5e-7)
    assert temperature == 5.4984375


def test_red_does_not_write_into_its_input():
    scores = np.array([0.5, -0.5])
    for mode in credit.REWEIGHT_MODES:
        weighted, _ = credit.reweight(scores, [100, 120], mode, 1.0)
        weighted[:] = 7
        np.testing.assert_array_equal(scores, [0.5, -0.5])


def test_bad_red_arguments_are_named():
    with pytest.raises(ValueError, match=r"credit\.reweight must be one of off, fixed.*'soft'"):
        credit.reweight([0.0], [1], mode="soft")
    for temperature in (None, 0, -1.0):
        with pytest.raises(ValueError, match=r"credit\.reweight_temperature must be above 0"):
            credit.reweight([0.0], [1], "fixed", temperature)
    with pytest.raises(ValueError, match=r"got shapes \(2,\) and \(1,\)"):
        credit.reweight([0.0, 1.0], [1])
    with pytest.raises(ValueError, match=r"overflows for a score of 4 at T = 0\.001"):
        credit.reweight([4.0, -3.0], [1, 1], "fixed", 0.001)


score_lists = st.lists(
    st.tuples(st.floats(-1, 1, width=16), st.integers(0, 2000)), min_size=1, max_size=12
)


@settings(deadline=None)
@given(pairs=score_lists)
def test_red_never_lowers_the_token_sum_and_never_overshoots_by_much(pairs):
    scores, tokens = map(np.array, zip(*pairs, strict=True))
    weighted, temperature = credit.reweight(scores, tokens)
    before, after = np.sum(scores * tokens), np.sum(weighted * tokens)
    slack = 1e-9 * max(1, tokens.sum())
    assert after >= before - slack
    assert (temperature is not None) == (before < -slack)
    if temperature is not None:
        # F falls with T: its root is within a bracket's width, or beyond an end of the search.
        def token_sum(temperature):
            return np.sum(tokens * scores * np.exp(scores / temperature))

        floor, ceiling = 0.8484375, 99.9515625
        assert floor - 1e-9 <= temperature <= ceiling + 1e-9
        assert temperature < floor + 1e-9 or token_sum(temperature - 0.05) >= -slack
        assert temperature > ceiling - 1e-9 or token_sum(temperature + 0.05) <= slack


@settings(deadline=None)
@given(group=groups(), tokens=st.lists(st.integers(1, 500), min_size=9, max_size=9))
def test_equal_token_totals_per_episode_never_activate(group, tokens):
    solve, update = credit.group_scores(*group)
    scores = np.concatenate([solve, update], axis=1)
    weighted, temperature = credit.reweight(
        scores.ravel(), np.tile(tokens[: scores.shape[1]], len(scores))
    )
    assert temperature is None
    np.testing.assert_array_equal(weighted, scores.ravel())


@settings(deadline=None)
@given(pairs=score_lists)
def test_splitting_a_sample_into_turns_changes_nothing(pairs):
    scores, tokens = map(np.array, zip(*pairs, strict=True))
    whole, temperature = credit.reweight(scores, tokens)
    split, split_temperature = credit.reweight(
        np.concatenate([scores, scores]), np.concatenate([tokens // 2, tokens - tokens // 2])
    )
    assert split_temperature == temperature
    np.testing.assert_allclose(split, np.tile(whole, 2), atol=1e-12)
