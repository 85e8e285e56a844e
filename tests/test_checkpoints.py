"""What was saved comes back bit for bit, on whatever devices, and half a checkpoint is none."""

import functools
import shutil

import jax
import numpy as np
import optax
import pytest

from codjax import batching, build, checkpoints, checks, learner, losses, models, sharding, types
from tests import small

CONFIG = small.decoder_config()
LOOP = {"step": 2, "waiting": [[{"seed": 2**64 - 1, "text": "√"}]]}
MESHES = ((2, 2, 2), (8, 1, 1), (1, 4, 2), (4, 1, 2))


def make_learner(data=2, fsdp=2, tensor=2):
    return learner.Learner(
        models.init(CONFIG, seed=0),
        optimizer=optax.adamw(1e-2),
        schedule=optax.constant_schedule(1e-2),
        objective=learner.Objective(
            policy_loss=functools.partial(
                losses.rec_loss, clip_mode="one_side", weight_mode="none"
            ),
            is_per_token=True,
            temperature=1.0,
        ),
        mesh=sharding.make_mesh(data=data, fsdp=fsdp, tensor=tensor),
        rows_per_microbatch=8,
    )


@pytest.fixture(scope="module")
def made():
    return make_learner()


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    sequences = [
        types.Sequence(
            tokens=rng.integers(1, 24, 12).astype(np.int32),
            is_scored=np.arange(12) > 4,
            advantages=rng.normal(size=12).astype(np.float32),
            sampler_logprobs=rng.normal(-3, 0.2, 12).astype(np.float32),
        )
        for _ in range(8)
    ]
    return batching.build_batch(sequences, 12, 8)


def first_state(made):
    return made.init_state(build.params_of(models.init(CONFIG, seed=0)))


def after(made, batch, *, num_updates):
    state = first_state(made)
    for _ in range(num_updates):
        state, _ = made.update(state, batch)
    return state


def on_host(tree):
    return jax.tree.map(np.array, tree)


def assert_same(one, other):
    """Same structure and same bits."""
    one_leaves, one_structure = jax.tree.flatten(on_host(one))
    other_leaves, other_structure = jax.tree.flatten(on_host(other))
    assert one_structure == other_structure
    for a, b in zip(one_leaves, other_leaves, strict=True):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


@pytest.fixture
def opened(tmp_path):
    """Opens the checkpoints of a workdir, and closes them after the test."""
    stores = []

    def open_store(**changes):
        stores.append(checkpoints.Checkpoints(tmp_path, **({"keep": 3} | changes)))
        return stores[-1]

    yield open_store
    for store in stores:
        store.close()


def test_saved_restored_and_gone_on_is_never_stopped(made, batch, opened):
    state = after(made, batch, num_updates=2)
    store = opened()
    store.save(2, state, LOOP)
    store.wait()

    restored, loop = opened(read_only=True).restore(2, made.abstract_state())

    assert loop == LOOP
    assert int(restored.step) == 2
    assert_same(restored, state)
    went_on, metrics = made.update(restored, batch)
    never_stopped, expected = made.update(state, batch)
    assert metrics == expected
    assert_same(went_on, never_stopped)


def test_another_split_of_the_devices_holds_the_same_values(made, batch, opened):
    state = after(made, batch, num_updates=2)
    store = opened()
    store.save(2, state, LOOP)
    store.wait()
    losses = []
    for sizes in MESHES:
        other = make_learner(*sizes)
        restored, _ = store.restore(2, other.abstract_state())
        assert_same(restored, state)
        wanted = jax.tree.leaves(other.state_shardings)
        assert [leaf.sharding for leaf in jax.tree.leaves(restored)] == wanted
        # Two more steps, the second of which shows what the first did.
        for _ in range(2):
            restored, metrics = other.update(restored, batch)
        losses.append(metrics["loss/total"])
    np.testing.assert_allclose(losses, losses[0], atol=1e-5)


def test_parameters_alone(made, batch, opened):
    state = after(made, batch, num_updates=1)
    store = opened()
    store.save(1, state, LOOP)
    store.wait()
    whole_on_each = make_learner(8, 1, 1)
    params = opened(read_only=True).restore_params(1, whole_on_each.abstract_state().params)
    assert_same(params, state.params)


def test_the_state_may_be_used_up_while_it_is_written(made, batch, opened):
    state = after(made, batch, num_updates=1)
    expected = on_host(state)
    store = opened()
    store.save(1, state, LOOP)
    for _ in range(5):
        state, _ = made.update(state, batch)  # gives the buffers of what is being saved away
    store.wait()
    restored, _ = store.restore(1, made.abstract_state())
    assert_same(restored, expected)


def test_step_0_stays_while_old_ones_go(made, opened):
    store = opened(keep=2)
    assert (store.steps(), store.latest_step()) == ([], None)
    state = first_state(made)
    for step in (0, 5, 10, 15):
        store.save(step, state, LOOP | {"step": step})
    store.wait()
    assert (store.steps(), store.latest_step()) == ([0, 10, 15], 15)
    assert store.restore(10, made.abstract_state())[1]["step"] == 10


def test_a_step_that_is_not_there_is_named_with_those_that_are(made, opened):
    store = opened()
    with pytest.raises(checkpoints.CheckpointError, match="holds no step 3; there are none"):
        store.restore_params(3, made.abstract_state().params)
    for step in (0, 4):
        store.save(step, first_state(made), LOOP)
    store.wait()
    with pytest.raises(checkpoints.CheckpointError, match=r"holds no step 3; there are \[0, 4\]"):
        store.restore_params(3, made.abstract_state().params)
    assert issubclass(checkpoints.CheckpointError, checks.ConfigError)  # one line, exit status 2


def test_reading_where_nothing_was_written_is_refused(tmp_path, opened):
    with pytest.raises(checkpoints.CheckpointError, match="train first: codjax train --workdir="):
        opened(read_only=True)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_not_seen_and_is_removed(made, tmp_path, opened):
    store = opened()
    store.save(1, first_state(made), LOOP)
    store.close()
    half = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    (half / "params.orbax-checkpoint-tmp").mkdir(parents=True)
    (half / "params.orbax-checkpoint-tmp" / "d").write_bytes(b"half")

    reader = opened(read_only=True)
    assert (reader.steps(), reader.latest_step()) == ([1], 1)
    assert half.exists()  # it may be a trainer's that is still writing

    writer = opened()
    assert (writer.steps(), writer.latest_step()) == ([1], 1)
    writer.save(2, first_state(made), LOOP)  # waits until the folder is clean
    writer.wait()
    assert writer.steps() == [1, 2]
    assert sorted(path.name for path in half.parent.iterdir()) == ["1", "2"]


def test_an_old_step_that_was_being_removed_disturbs_nobody(made, tmp_path, opened):
    store = opened(keep=2)
    for step in (0, 1, 2):
        store.save(step, first_state(made), LOOP | {"step": step})
    store.close()
    shutil.rmtree(tmp_path / "checkpoints" / "1" / "params")

    store = opened(keep=2)
    assert store.restore(store.latest_step(), made.abstract_state())[1]["step"] == 2
    for step in (3, 4):
        store.save(step, first_state(made), LOOP | {"step": step})
    store.wait()
    assert store.steps() == [0, 3, 4]
    assert not (tmp_path / "checkpoints" / "1").exists()
