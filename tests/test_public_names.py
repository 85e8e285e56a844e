"""The names that other programs call, as they call them: with lists, NumPy or JAX arrays."""

import jax.numpy as jnp
import numpy as np
import pytest
from codjax_kernels import forest_attention, token_logprobs

from codjax import batching, credit, envs, losses, packs


@pytest.mark.parametrize("kind", [list, np.asarray, jnp.asarray])
def test_a_batch_of_anything(kind):
    sequence = batching.Sequence(
        kind([5, 6, 7]), kind([False, True, True]), kind([0.0, 1.0, 1.0]), kind([0.0, -1.0, -2.0])
    )
    batch = batching.build_batch([sequence], row_length=4)
    assert batch.target.tolist() == [[6, 7]]
    assert batch.sampler_logprobs.tolist() == [[-1.0, -2.0]]


@pytest.mark.parametrize(
    ("field", "values", "message"),
    [
        (1, [False, True], "differ in length"),
        (0, [5, -6, 7], "no token id"),
        (2, [0.0, np.nan, 1.0], "not finite"),
    ],
)
def test_a_sequence_that_cannot_be_trained_on_is_refused(field, values, message):
    fields = [[5, 6, 7], [False, True, True], [0.0, 1.0, 1.0], [0.0, -1.0, -2.0]]
    fields[field] = values
    with pytest.raises(ValueError, match=message):
        batching.build_batch([batching.Sequence(*fields)], row_length=4)


def test_the_mathematics_takes_lists():
    solve, update = credit.group_scores([[0, 1], [0, 0]], [[0], [0]], "mean", None, 1.0)
    assert solve.tolist() == [[0.25, 0.5], [-0.25, -0.5]]
    assert update.tolist() == [[0.25], [-0.25]]  # the mean of its own 0 and the later 1
    assert credit.reweight([0.5, -0.5], [300, 100], "adaptive", None)[1] is None
    loss, _ = losses.rec_loss([-1.0], [-1.0], [0.5], [1.0], "one_side", "none", 0.2, 0.2, None)
    assert float(loss) == 0.5
    assert packs.stable_seed([(0, 0), (0, 1), (0, 2), (0, 3)]) == 15069623396018555611


def test_the_kernels_take_arrays():
    rng = np.random.default_rng(0)
    logprobs, entropy = token_logprobs(
        rng.normal(size=(3, 4)).astype(np.float32),
        rng.normal(size=(7, 4)).astype(np.float32),
        np.array([0, 1, 6]),
        temperature=1.0,
    )
    assert logprobs.shape == entropy.shape == (3,)
    q, k = (rng.normal(size=(1, 5, n, 4)).astype(np.float32) for n in (2, 1))
    assert forest_attention(q, k, k, np.array([[5, 5, 3, 5, 5]])).shape == q.shape


def test_an_environment_from_its_records():
    for name in ("frozen_lake_obscure", "frozen_lake_compact"):
        records = envs.sample_records(name, n=3)
        env = envs.make(name)
        assert env.reset(records[0], pack_seed=1, slot=0, pack_size=4)
        assert isinstance(env.system_prompt, str)
        assert env.step("no answer").done
        result = env.result()
        assert (result.raw_reward, result.format_error, result.num_turns) == (0.0, True, 1)
