"""One update: forests, micro-batches and devices change nothing; weight 0 counts nothing."""

import functools

import jax
import numpy as np
import optax
import pytest

from codjax import batching, build, learner, losses, models, optim, sharding, types
from codjax.config import default_config
from tests import small

CONFIG = small.decoder_config(remat="full")
EXPERTS = small.decoder_config(
    remat="full", family="qwen3_moe", num_experts=4, experts_per_token=2, moe_intermediate_size=12
)


def objective(**changes):
    policy_loss = functools.partial(losses.rec_loss, clip_mode="one_side", weight_mode="importance")
    made = {"policy_loss": policy_loss, "is_per_token": True, "temperature": 1.0}
    return learner.Objective(**(made | changes))


def make_learner(*, rows=2, mesh=None, optimizer=None, config=CONFIG, **changes):
    return learner.Learner(
        models.init(config, seed=0),
        optimizer=optimizer or optax.adamw(1e-2, weight_decay=0.01),
        schedule=optax.constant_schedule(1e-2),
        objective=objective(**changes),
        mesh=mesh or sharding.one_device(),
        rows_per_microbatch=rows,
    )


def family(seed, count=14):
    """Sequences that share prefixes: each new one branches off an old one, or begins afresh."""
    rng = np.random.default_rng(seed)
    texts = [rng.integers(1, 24, 6)]
    while len(texts) < count:
        old = texts[rng.integers(len(texts))]
        keep = rng.integers(0, len(old))
        texts.append(np.concatenate([old[:keep], rng.integers(1, 24, rng.integers(2, 9))]))
    made = []
    for tokens in texts:
        is_scored = rng.random(len(tokens)) < 0.6
        is_scored[0], is_scored[-1] = False, True
        made.append(
            types.Sequence(
                tokens=tokens.astype(np.int32),
                is_scored=is_scored,
                # Not centred: a loss of terms that cancel has no relative accuracy.
                advantages=rng.normal(0.5, 1, len(tokens)).astype(np.float32),
                sampler_logprobs=rng.normal(-3, 0.2, len(tokens)).astype(np.float32),
            )
        )
    return made


def loss_and_grads(batch, config=CONFIG, **options):
    made = make_learner(config=config, **options)
    state = made.init_state(build.params_of(models.init(config, seed=0)))
    loss, grads, metrics = made.loss_and_grads(state.params, batch)
    return loss, jax.device_get(grads), metrics


def assert_same(one, other, rtol=1e-5):
    """Loss, metrics, and every gradient leaf relative to its own size."""
    assert one[0] == pytest.approx(other[0], rel=rtol)
    for name, value in one[2].items():
        assert value == pytest.approx(other[2][name], rel=1e-4, abs=1e-6), name
    leaves = zip(jax.tree.leaves(one[1]), jax.tree.leaves(other[1]), strict=True)
    for a, b in leaves:
        assert np.linalg.norm(a - b) <= rtol * np.linalg.norm(b)


@pytest.mark.parametrize("seed", range(4))
def test_a_forest_trains_as_every_sequence_alone(seed):
    sequences = family(seed)
    forest, report = batching.batch_sequences(sequences, row_length=64, rows_multiple=2)
    plain, plain_report = batching.batch_sequences(
        sequences, row_length=24, rows_multiple=2, share_prefixes=False
    )
    assert report.stored_tokens < 0.9 * plain_report.stored_tokens

    changes = {"entropy_coef": 0.1}
    assert_same(loss_and_grads(forest, **changes), loss_and_grads(plain, **changes))


def test_experts_train_the_same_in_a_forest_and_on_a_mesh_that_cuts_them():
    sequences = family(1)
    forest = pad_rows(batching.build_batch(sequences, 24), 8)
    plain = pad_rows(batching.build_batch(sequences, 24, share_prefixes=False), 16)
    mesh = sharding.make_mesh(data=1, fsdp=2, tensor=2, expert=2)
    alone = loss_and_grads(plain, config=EXPERTS, rows=16)
    assert_same(loss_and_grads(forest, config=EXPERTS, rows=8, mesh=mesh), alone)


def test_sequence_level_ratios_survive_the_forest_too():
    policy_loss = functools.partial(
        losses.rec_loss, clip_mode="sequence_one_side", weight_mode="sequence"
    )
    sequences = family(5)
    forest = batching.build_batch(sequences, 64)
    plain = batching.build_batch(sequences, 24, share_prefixes=False)
    plain = pad_rows(plain, 16)
    changes = {"policy_loss": policy_loss, "is_per_token": False}
    assert_same(
        loss_and_grads(forest, rows=forest.tokens.shape[0], **changes),
        loss_and_grads(plain, rows=16, **changes),
    )


@pytest.mark.parametrize("mesh", [None, (2, 2, 1, 2)])
def test_gradients_made_in_the_forward_pass_are_those_of_differentiation(mesh):
    batch = pad_rows(batching.build_batch(family(4), 24), 8)
    batch = batch._replace(ref_logprobs=batch.sampler_logprobs - 0.3)
    made = {
        "rows": 8,
        "mesh": mesh and sharding.make_mesh(*mesh),
        "kl_coef": 0.2,
        "entropy_coef": 0.1,
    }
    assert_same(
        loss_and_grads(batch, is_per_token=True, **made),
        loss_and_grads(batch, is_per_token=False, **made),
    )


def pad_rows(batch, multiple):
    missing = -batch.tokens.shape[0] % multiple
    return jax.tree.map(
        lambda x: np.pad(x, [(0, missing), (0, 0)]) if np.ndim(x) else x, batch
    )._replace(
        subtree_end=np.concatenate(
            [
                batch.subtree_end,
                np.tile(np.arange(1, batch.tokens.shape[1] + 1, dtype=np.int32), (missing, 1)),
            ]
        )
    )


def test_micro_batched_is_whole():
    batch = batching.build_batch(family(1), 24, num_rows=12)
    whole = loss_and_grads(batch, rows=12, entropy_coef=0.1)
    for rows in (1, 2, 4):
        assert_same(loss_and_grads(batch, rows=rows, entropy_coef=0.1), whole)


@pytest.mark.parametrize(
    "axes", [(8, 1, 1, 1), (1, 8, 1, 1), (2, 2, 2, 1), (1, 4, 2, 1), (1, 1, 1, 8), (1, 2, 2, 2)]
)
def test_eight_devices_are_one(axes):
    mesh = sharding.make_mesh(*axes)
    batch = batching.build_batch(family(2), 24, num_rows=8)
    options = {"rows": 8, "entropy_coef": 0.1}
    assert_same(loss_and_grads(batch, mesh=mesh, **options), loss_and_grads(batch, **options))


@pytest.mark.parametrize(
    "axes", [(1, 8, 1, 1, 1), (2, 1, 1, 1, 4), (1, 1, 1, 2, 4), (1, 1, 2, 2, 2)]
)
def test_eight_devices_with_experts_are_one(axes):
    mesh = sharding.make_mesh(*axes)
    batch = batching.build_batch(family(2), 24, num_rows=8)
    options = {"rows": 8, "entropy_coef": 0.1, "config": EXPERTS}
    assert_same(loss_and_grads(batch, mesh=mesh, **options), loss_and_grads(batch, **options))


def test_sharded_updates_are_unsharded_updates():
    batch = batching.build_batch(family(2), 24, num_rows=8)
    params = []
    for mesh in (None, sharding.make_mesh(data=2, fsdp=2, tensor=2)):
        # SGD, since Adam divides noise by noise where a gradient is zero.
        made = make_learner(rows=8, mesh=mesh, optimizer=optax.sgd(0.1, momentum=0.9))
        state = made.init_state(build.params_of(models.init(CONFIG, seed=0)))
        for _ in range(3):
            state, _ = made.update(state, batch)
        params.append(jax.device_get(state.params))
    for a, b in zip(jax.tree.leaves(params[0]), jax.tree.leaves(params[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_the_second_update_compiles_nothing():
    made = make_learner(rows=2)
    state = made.init_state(build.params_of(models.init(CONFIG, seed=0)))
    state, _ = made.update(state, batching.build_batch(family(1), 32, 4, scored_per_row=32))
    compiled = made.num_compilations()
    for seed in range(3):
        more = batching.build_batch(family(seed), 32, 6, scored_per_row=32)
        state, _ = made.update(state, more)
    assert made.num_compilations() == compiled
    assert int(state.step) == 4


def test_an_update_moves_to_the_devices_only_what_it_says():
    """Rows are put there by name; nothing else of an update comes from the host."""
    made = make_learner(rows=2, mesh=sharding.make_mesh(data=2, fsdp=1, tensor=1, **two_devices()))
    state = made.init_state(build.params_of(models.init(CONFIG, seed=0)))
    batch = batching.build_batch(family(1), 32, 4, scored_per_row=32)
    state, _ = made.update(state, batch)
    with jax.transfer_guard("disallow"):
        with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
            made._accumulate(state.params, *made._zeros(state.params), batch)
        made.update(state, batch)


def two_devices():
    return {"devices": jax.devices()[:2]}


def test_traced_from_shapes_is_what_an_update_runs():
    made = make_learner(rows=2)
    state = made.init_state(build.params_of(models.init(CONFIG, seed=0)))
    batch = batching.build_batch(family(1), 64, 2, scored_per_row=64)
    traced = made.trace(row_length=64, scored_per_row=64)
    grads, sums = made._zeros(state.params)
    grads, sums = (
        traced["accumulate"]
        .lower()
        .compile()(state.params, grads, sums, jax.device_put(batch, made._batch_shardings))
    )
    planned, _ = (
        traced["apply"].lower().compile()(jax.tree.map(lambda x: x + 0, state), grads, sums)
    )
    run, _ = made.update(state, batch)
    for a, b in zip(jax.tree.leaves(planned), jax.tree.leaves(run), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_zero_advantage_without_decay_moves_no_weight():
    made = make_learner(rows=4, optimizer=optax.adamw(1e-2, weight_decay=0.0))
    state = made.init_state(build.params_of(models.init(CONFIG, seed=0)))
    before = jax.device_get(state.params)
    batch = batching.build_batch(family(3), 32, 4)
    state, metrics = made.update(state, batch._replace(advantages=np.zeros_like(batch.advantages)))
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(a, np.asarray(b))
    assert metrics["optimizer/grad_norm"] == 0


def test_what_stands_on_padding_entries_changes_nothing():
    batch = batching.build_batch(family(4), 32, 4, scored_per_row=64)
    is_padding = np.asarray(batch.weights) == 0
    assert is_padding.any()
    poisoned = batch._replace(
        advantages=np.where(is_padding, np.nan, batch.advantages).astype(np.float32),
        sampler_logprobs=np.where(is_padding, np.inf, batch.sampler_logprobs).astype(np.float32),
        target=np.where(is_padding, 23, batch.target).astype(np.int32),
        source=np.where(is_padding, 31, batch.source).astype(np.int32),
    )
    options = {"rows": 4, "entropy_coef": 0.1}
    assert_same(loss_and_grads(poisoned, **options), loss_and_grads(batch, **options), rtol=1e-7)


def test_kl_to_the_reference_is_zero_at_the_reference():
    made = make_learner(rows=4, kl_coef=1.0)
    state = made.init_state(build.params_of(models.init(CONFIG, seed=0)))
    batch = batching.build_batch(family(3), 32, 4)
    batch = batch._replace(
        ref_logprobs=made.score(state.params, batch), advantages=np.zeros_like(batch.advantages)
    )
    loss, grads, metrics = made.loss_and_grads(state.params, batch)
    assert loss == pytest.approx(0, abs=1e-7)
    assert metrics["loss/kl_policy_to_ref"] == pytest.approx(0, abs=1e-7)
    assert max(float(np.abs(g).max()) for g in jax.tree.leaves(jax.device_get(grads))) < 1e-5


def test_imitation_is_the_mean_negative_log_likelihood():
    sequences = family(6)
    batch = batching.build_batch(sequences, 32, 4)
    made = make_learner(rows=4)
    state = made.init_state(build.params_of(models.init(CONFIG, seed=0)))
    batch = batch._replace(advantages=np.ones_like(batch.advantages))
    logprobs = made.score(state.params, batch)
    expected = -np.sum(logprobs * batch.weights) / batch.num_scored
    imitator = make_learner(rows=4, policy_loss=learner.imitation_objective().policy_loss)
    assert imitator.loss_and_grads(state.params, batch)[0] == pytest.approx(expected, rel=1e-5)


def test_rows_that_do_not_divide_are_refused():
    made = make_learner(rows=4)
    with pytest.raises(ValueError, match=r"batching\.rows_per_microbatch = 4"):
        made.update(
            made.init_state(build.params_of(models.init(CONFIG, seed=0))),
            batching.build_batch(family(1), 64, 3),
        )


def test_updates_with_factored_moments_are_the_same_on_a_mesh():
    config = default_config().optimizer
    # An eps that keeps noise from being divided by noise where a gradient is zero.
    config.update({"second_moment": "factored", "learning_rate": 0.1, "eps": 1e-2})
    # Wide enough to be factored; rows over fsdp and columns over tensor are then cut.
    wide = small.decoder_config(hidden_size=128, intermediate_size=256)
    batch = batching.build_batch(family(2), 24, num_rows=8)
    params = []
    for mesh in (None, sharding.make_mesh(data=2, fsdp=2, tensor=2)):
        optimizer = optim.make_optimizer(config, num_steps=10)
        made = make_learner(rows=8, mesh=mesh, optimizer=optimizer, config=wide)
        state = made.init_state(build.params_of(models.init(wide, seed=0)))
        for _ in range(2):
            state, _ = made.update(state, batch)
        params.append(jax.device_get(state.params))
    for a, b in zip(jax.tree.leaves(params[0]), jax.tree.leaves(params[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    assert made.num_compilations() == 3  # zeros, accumulate, apply


def test_the_state_lies_where_its_parameters_lie():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    made = make_learner(rows=8, mesh=mesh)
    state = made.init_state(build.params_of(models.init(CONFIG, seed=0)))
    placed = {str(leaf.sharding.spec) for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim > 1}
    expected = {str(leaf.sharding.spec) for leaf in jax.tree.leaves(state.params) if leaf.ndim > 1}
    assert placed == expected
