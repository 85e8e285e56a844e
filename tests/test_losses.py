import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from codjax import losses

# spec/algorithm.md §13 C: log-probs now, log-probs of the sampler, advantages.
Q = np.array([-1, -0.8, -0.7, -1.3, -1, -1.3, -0.7, -1], np.float32)
Q_OLD = np.full(8, -1, np.float32)
ADVANTAGES = np.array([0.5, 0.5, 0.5, 0.5, -0.5, -0.5, -0.5, 0], np.float32)
ONES = np.ones(8, np.float32)
# Two samples of four entries.
SAMPLES = np.array([0, 0, 0, 0, 1, 1, 1, 1])
MODES = list(itertools.product(losses.CLIP_MODES, losses.WEIGHT_MODES))


def value(q, *, weights=ONES, **kwargs):
    return losses.rec_loss(q, Q_OLD, ADVANTAGES, weights, **kwargs)[0]


def gradient(**kwargs):
    """Gradient with respect to the log-probs, before the division by 8."""
    return 8 * jax.grad(lambda q: value(q, num_scored=8, **kwargs))(jnp.asarray(Q))


# Policy loss


@pytest.mark.parametrize(
    ("clip_mode", "weight_mode", "loss", "grad"),
    [
        ("one_side", "none", 0.0375, [-0.5, 0, 0, -0.5, 0.5, 0, 0.5, 0]),
        ("one_side", "importance", 0.001135, [-0.5, 0, 0, -0.370409, 0.5, 0, 0.674929, 0]),
        ("two_side", "none", 0, [-0.5, 0, 0, 0, 0.5, 0, 0, 0]),
        ("two_side", "importance", 0, [-0.5, 0, 0, 0, 0.5, 0, 0, 0]),
    ],
)
def test_vector_c(clip_mode, weight_mode, loss, grad):
    modes = {"clip_mode": clip_mode, "weight_mode": weight_mode}
    assert float(value(Q, **modes)) == pytest.approx(loss, abs=5e-7)
    np.testing.assert_allclose(gradient(**modes), grad, atol=5e-7)
    _, metrics = losses.rec_loss(Q, Q_OLD, ADVANTAGES, ONES, **modes)
    num_kept = 5 if clip_mode == "one_side" else 3
    assert float(metrics["loss/clip_frac"]) == (8 - num_kept) / 8


def test_metrics_by_hand():
    _, metrics = losses.rec_loss(Q, Q_OLD, ADVANTAGES, ONES)
    assert set(metrics) == {
        "loss/clip_frac",
        "loss/log_ratio_abs_mean",
        "loss/ratio_mean",
        "loss/log_ratio_abs_max",
    }
    assert float(metrics["loss/log_ratio_abs_mean"]) == pytest.approx(1.4 / 8)
    ratios = [1, np.exp(0.2), np.exp(0.3), np.exp(-0.3), 1, np.exp(-0.3), np.exp(0.3), 1]
    assert float(metrics["loss/ratio_mean"]) == pytest.approx(np.mean(ratios))
    assert float(metrics["loss/log_ratio_abs_max"]) == pytest.approx(0.3)


@pytest.mark.parametrize("aggregation", losses.AGGREGATIONS)
def test_with_num_entries_the_metrics_are_means_over_entries(aggregation):
    per_sample, divisor = losses.aggregation_weights([6, 2], aggregation, constant=3)
    weights = np.repeat(per_sample, [6, 2])
    _, metrics = losses.rec_loss(
        Q, Q_OLD, ADVANTAGES, weights, num_scored=divisor, num_entries=np.int32(8)
    )
    assert float(metrics["loss/clip_frac"]) == pytest.approx(3 / 8)
    assert float(metrics["loss/log_ratio_abs_mean"]) == pytest.approx(1.4 / 8)


@pytest.mark.parametrize("clip_mode", losses.CLIP_MODES)
def test_at_ratio_one_the_gradient_is_plain_policy_gradient(clip_mode):
    for weight_mode in ("none", "importance", "truncated", "sequence"):
        grad = jax.grad(
            lambda q, mode=weight_mode: losses.rec_loss(
                q, Q_OLD, ADVANTAGES, ONES, clip_mode, mode, sample_ids=SAMPLES
            )[0]
        )(jnp.asarray(Q_OLD))
        np.testing.assert_array_equal(grad, -ADVANTAGES / 8)


def test_one_side_keeps_an_advantage_of_zero_and_what_moved_the_wrong_way():
    q = jnp.array([-9.0, 9.0, -9.0, 9.0, -9.0, 9.0])
    advantages = jnp.array([1.0, 1.0, -1.0, -1.0, 0.0, 0.0])
    zeros, ones = jnp.zeros(6), jnp.ones(6)
    grad = jax.grad(lambda q: losses.rec_loss(q, zeros, advantages, ones)[0])(q) * 6
    np.testing.assert_array_equal(grad, [-1, 0, 0, 1, 0, 0])
    _, metrics = losses.rec_loss(q, zeros, advantages, ones)
    assert float(metrics["loss/clip_frac"]) == pytest.approx(2 / 6)


def test_ring_by_hand():
    # Ratios 0.3, 0.5, 1, 2, 4 with each sign; outer limits 0.4 and 3.
    ratios = jnp.array([0.3, 0.5, 1.0, 2.0, 4.0] * 2)
    advantages = jnp.array([1.0] * 5 + [-1.0] * 5)
    grad = jax.grad(
        lambda q: losses.rec_loss(q, jnp.zeros(10), advantages, jnp.ones(10), "ring")[0]
    )(jnp.log(ratios))
    np.testing.assert_array_equal(grad * 10 != 0, [1, 0, 1, 0, 0, 0, 0, 1, 0, 1])


def test_sequence_one_side_by_hand():
    # Mean log-ratios: sample 0 (0 + .2 + .3 - .3) / 4 = .05, sample 1 (0 - .3 + .3 + 0) / 4 = 0.
    modes = {"clip_mode": "sequence_one_side", "sample_ids": SAMPLES}
    kept_all = gradient(eps_high=0.06, eps_low=0.01, **modes)
    np.testing.assert_allclose(kept_all, -ADVANTAGES, atol=1e-6)
    without_first = gradient(eps_high=0.04, eps_low=0.01, **modes)
    np.testing.assert_allclose(without_first, [0, 0, 0, 0, 0.5, 0.5, 0.5, 0], atol=1e-6)


def test_sequence_weight_is_the_same_for_every_entry_of_a_sample():
    grad = gradient(clip_mode="none", weight_mode="sequence", sample_ids=SAMPLES)
    np.testing.assert_allclose(grad, -ADVANTAGES * np.repeat(np.exp([0.05, 0]), 4), atol=1e-6)


def test_sequence_modes_leave_padding_out_of_a_sample():
    weights = np.array([1, 1, 0, 1, 1, 1, 1, 1], np.float32)
    ids = np.array([3, 3, 99, 3, 5, 5, 5, 5])  # numbers need not be dense; padding may hold any
    grad = gradient(weights=weights, clip_mode="none", weight_mode="sequence", sample_ids=ids)
    first = np.exp((0 + 0.2 - 0.3) / 3)
    scale = [first, first, 0, first, 1, 1, 1, 1]
    np.testing.assert_allclose(grad, -ADVANTAGES * scale, atol=1e-6)


def test_truncated_weight_by_hand():
    ratios = jnp.array([0.1, 1.0, 5.0])
    ones = jnp.ones(3)
    grad = jax.grad(lambda q: losses.rec_loss(q, jnp.zeros(3), ones, ones, "none", "truncated")[0])(
        jnp.log(ratios)
    )
    np.testing.assert_allclose(grad * 3, [-0.4, -1.0, -3.0], rtol=1e-6)


def test_advantage_weight_is_fixed_temperature_red():
    grad = gradient(clip_mode="none", weight_mode="advantage", advantage_temperature=2)
    np.testing.assert_allclose(grad, -ADVANTAGES * np.exp(ADVANTAGES / 2), rtol=1e-6)


def test_weights_multiply_and_the_divisor_defaults_to_their_sum():
    weights = np.array([2, 0, 0, 1, 0.5, 0, 0, 0], np.float32)
    # -A q: 0.5, 0.65, -0.5
    assert float(value(Q, weights=weights)) == pytest.approx((2 * 0.5 + 0.65 - 0.25) / 3.5)
    assert float(value(Q, weights=weights, num_scored=7)) == pytest.approx(1.4 / 7)


def test_masked_out_entries_count_in_the_divisor():
    loss, _ = losses.rec_loss([-1.0, 0.0], [-1.0, -1.0], [1.0, 1.0], [1, 1])
    assert float(loss) == 0.5


def test_regularisers_by_hand_are_not_masked():
    d = Q - Q_OLD
    squared = {"regulariser": "squared_log_ratio", "regulariser_coef": 0.1}
    assert float(value(Q, **squared)) == pytest.approx(0.0375 + 0.1 * np.mean(d**2), abs=1e-6)
    np.testing.assert_allclose(gradient(**squared) - gradient(), 0.2 * d, atol=1e-6)
    forward = {"regulariser": "forward_kl", "regulariser_coef": 0.1}
    assert float(value(Q, **forward)) == pytest.approx(0.0375 - 0.1 * np.mean(Q), abs=1e-6)
    np.testing.assert_allclose(gradient(**forward) - gradient(), -0.1, atol=1e-6)


@pytest.mark.parametrize(("clip_mode", "weight_mode"), MODES)
@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf, 1e30])
def test_whatever_stands_on_padding_changes_nothing(clip_mode, weight_mode, junk):
    weights = np.array([1, 0, 1, 1, 0, 1, 0.5, 1], np.float32)

    def loss(q, old, advantages, ids):
        return losses.rec_loss(
            q,
            old,
            advantages,
            weights,
            clip_mode,
            weight_mode,
            sample_ids=ids,
            regulariser="squared_log_ratio",
            regulariser_coef=0.3,
        )

    compute = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (clean, clean_metrics), clean_grad = compute(Q, Q_OLD, ADVANTAGES, SAMPLES)
    dirty = [np.where(weights == 0, np.float32(junk), array) for array in (Q, Q_OLD, ADVANTAGES)]
    dirty_ids = np.where(weights == 0, 10**6, SAMPLES)
    (found, metrics), grad = compute(*dirty, dirty_ids)
    assert float(found) == float(clean)
    assert metrics == clean_metrics
    np.testing.assert_array_equal(grad, np.where(weights == 0, 0, clean_grad))
    assert np.isfinite(grad).all()


def test_a_dropped_entry_with_an_infinite_ratio_harms_nobody():
    q = jnp.array([0.0, -1.0])
    loss, grad = jax.value_and_grad(
        lambda q: losses.rec_loss(
            q, jnp.array([-200.0, -1.0]), jnp.ones(2), jnp.ones(2), "one_side", "importance"
        )[0]
    )(q)
    assert float(loss) == 0.5
    np.testing.assert_array_equal(grad, [0, -0.5])


def test_only_padding_gives_zero_not_nan():
    nothing = np.full(3, np.nan, np.float32)
    loss, metrics = losses.rec_loss(nothing, nothing, nothing, np.zeros(3))
    assert float(loss) == 0
    assert all(float(metric) == 0 for metric in metrics.values())
    assert float(losses.kl_loss(nothing, nothing, np.zeros(3))) == 0


@settings(max_examples=15, deadline=None)
@given(mode=st.sampled_from(MODES), cut=st.integers(1, 7), seed=st.integers(0, 99))
@example(mode=("sequence_one_side", "none"), cut=7, seed=0)  # a sample of one entry
def test_micro_batches_are_one_batch(mode, cut, seed):
    rng = np.random.default_rng(seed)
    q, old, advantages = rng.normal(size=(3, 8)).astype(np.float32)
    weights = rng.integers(0, 3, 8).astype(np.float32) / 2
    ids = np.arange(8) >= cut  # a sample never lies in two micro-batches

    def loss(part):
        return losses.rec_loss(
            q[part],
            old[part],
            advantages[part],
            weights[part],
            *mode,
            num_scored=np.float32(5),
            # Samples are counted from 0 in every micro-batch: an id is below the number of entries.
            sample_ids=ids[part].astype(np.int32) - int(ids[part].min()),
        )

    whole, whole_metrics = loss(slice(None))
    (left, left_metrics), (right, right_metrics) = loss(slice(0, cut)), loss(slice(cut, None))
    np.testing.assert_allclose(left + right, whole, rtol=1e-5, atol=1e-6)
    merged = losses.merge_metrics(left_metrics, right_metrics)
    for name, metric in whole_metrics.items():
        np.testing.assert_allclose(merged[name], metric, rtol=1e-5, atol=1e-6)


def test_merging_needs_equal_names():
    with pytest.raises(ValueError, match="loss/ratio_mean"):
        losses.merge_metrics({}, {"loss/ratio_mean": jnp.zeros(())})


@pytest.mark.parametrize("regulariser", losses.REGULARISERS)
@pytest.mark.parametrize("clip_mode", ["none", "one_side", "two_side", "ring"])
def test_gradient_is_that_of_the_value_where_no_ratio_weighs(clip_mode, regulariser):
    # All ratios of the vector are away from the limits, so M is constant near them.
    check_grads(
        lambda q: value(
            q, clip_mode=clip_mode, regulariser=regulariser, regulariser_coef=0.1, num_scored=8
        ),
        (jnp.asarray(Q),),
        order=1,
        modes=["rev"],
        eps=1e-2,
        rtol=1e-3,
        atol=1e-4,  # float32 differences over 2 eps
    )


@given(shift=st.sampled_from([-0.5, -0.1, 0.0, 0.1, 0.5]), advantage=st.sampled_from([-1.0, 1.0]))
@settings(max_examples=10, deadline=None)
def test_one_side_importance_has_the_gradient_of_ppo(shift, advantage):
    def ppo(q):
        ratio = jnp.exp(q + 1.0)
        clipped = jnp.clip(ratio, 0.8, 1.2)
        return -jnp.minimum(ratio * advantage, clipped * advantage)[0]

    q = jnp.array([-1.0 + shift])
    grad = jax.grad(
        lambda q: losses.rec_loss(q, [-1.0], [advantage], [1], weight_mode="importance")[0]
    )(q)
    np.testing.assert_allclose(grad, jax.grad(ppo)(q), rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, np.float64, np.int32])
def test_arrays_of_any_kind_give_float32(dtype):
    q = np.array([-1, -2, -1]).astype(dtype)
    for convert in (np.asarray, jnp.asarray, np.ndarray.tolist):
        loss, metrics = losses.rec_loss(convert(q), convert(q), convert(q), np.ones(3, bool))
        assert loss.dtype == jnp.float32
        assert float(loss) == -2.0
        assert all(metric.dtype == jnp.float32 for metric in metrics.values())


def test_num_scored_may_be_any_scalar():
    for num_scored in (4, 4.0, np.int32(4), np.float32(4), jnp.asarray(4), np.asarray(4)):
        assert float(value(Q, num_scored=num_scored)) == pytest.approx(0.075)


def test_it_is_traced_once():
    traces = []

    @jax.jit
    def step(q, num_scored):
        traces.append(1)
        return value(q, num_scored=num_scored)

    step(Q, jnp.asarray(8))
    step(Q + 1, jnp.asarray(9))
    assert len(traces) == 1


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"loss\.clip_mode must be one of none, one_side.*'ppo'"):
        value(Q, clip_mode="ppo")
    with pytest.raises(ValueError, match=r"loss\.weight_mode must be one of none, importance"):
        value(Q, weight_mode="is")
    with pytest.raises(ValueError, match=r"loss\.regulariser must be one of none, squared"):
        value(Q, regulariser="l2")
    with pytest.raises(ValueError, match=r"loss\.kl_estimator must be one of k1, k2, k3"):
        losses.kl_loss([0.0], [0.0], [1], "k4")
    for modes in ({"clip_mode": "sequence_one_side"}, {"weight_mode": "sequence"}):
        with pytest.raises(ValueError, match="needs sample_ids"):
            value(Q, **modes)
    with pytest.raises(ValueError, match="all of one length"):
        losses.rec_loss([0.0], [0.0], [0.0], [1, 1])


# KL


@pytest.mark.parametrize(("estimator", "expected"), [("k1", 0.5), ("k2", 0.125), ("k3", 0.106531)])
def test_vector_d(estimator, expected):
    loss = losses.kl_loss([-1.0], [-1.5], [1], estimator)
    assert float(loss) == pytest.approx(expected, abs=5e-7)


@pytest.mark.parametrize("estimator", losses.KL_ESTIMATORS)
def test_kl_gradient(estimator):
    check_grads(
        lambda q: losses.kl_loss(q, Q_OLD + 0.3, ONES, estimator, 4),
        (jnp.asarray(Q),),
        order=1,
        modes=["rev"],
        eps=1e-2,
        rtol=1e-2,
        atol=1e-4,  # float32 differences over 2 eps
    )


@pytest.mark.parametrize("estimator", losses.KL_ESTIMATORS)
def test_kl_ignores_padding(estimator):
    weights = np.array([1, 0, 1, 0], np.float32)
    q = jnp.array([-1.0, jnp.nan, -2.0, jnp.inf])
    ref = np.array([-1.5, 0.0, -1.0, np.nan], np.float32)
    loss, grad = jax.value_and_grad(losses.kl_loss)(q, ref, weights, estimator)
    expected = losses.kl_loss(q[::2], ref[::2], weights[::2], estimator)
    assert float(loss) == pytest.approx(float(expected))
    np.testing.assert_array_equal(grad[1::2], 0)
    assert np.isfinite(grad).all()


def test_k2_gradient_is_the_reverse_kl_gradient_on_policy():
    logits, ref = jnp.array([0.3, -0.4, 1.1]), jax.nn.log_softmax(jnp.array([1.0, 0.0, -0.5]))
    policy = jax.nn.softmax(logits)

    def exact(logits):
        logprobs = jax.nn.log_softmax(logits)
        return jnp.sum(jnp.exp(logprobs) * (logprobs - ref))

    def expected_k2(logits):  # the tokens are drawn from the policy, hence the weights
        return losses.kl_loss(jax.nn.log_softmax(logits), ref, policy, "k2")

    np.testing.assert_allclose(jax.grad(expected_k2)(logits), jax.grad(exact)(logits), atol=1e-6)


# Aggregation


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        # Two samples with per-entry losses (1, 2, 3) and (6).
        ("token_mean", 12 / 4),
        ("sample_mean_token_sum", (6 + 6) / 2),
        ("sample_mean_token_mean", (2 + 6) / 2),
        ("constant", 12 / 10),
    ],
)
def test_aggregations_by_hand(aggregation, expected):
    per_sample, divisor = losses.aggregation_weights([3, 1], aggregation, constant=10)
    weights = np.repeat(per_sample, [3, 1])
    # With A = -1 and W = M = 1 the loss of an entry is its log-prob.
    q = np.array([1, 2, 3, 6], np.float32)
    loss, _ = losses.rec_loss(q, q, -np.ones(4), weights, num_scored=divisor)
    assert float(loss) == pytest.approx(expected)


def test_a_sample_without_tokens_gets_no_infinite_weight():
    weights, divisor = losses.aggregation_weights([2, 0], "sample_mean_token_mean")
    assert weights.tolist() == [0.5, 1.0]
    assert divisor == 2.0


def test_bad_aggregations_are_named():
    with pytest.raises(ValueError, match=r"loss\.aggregation must be one of token_mean"):
        losses.aggregation_weights([1], "mean")
    with pytest.raises(ValueError, match=r"loss\.aggregation_constant must be above 0.*got None"):
        losses.aggregation_weights([1], "constant")
