"""token_kl against float64 whole logits: values and gradients, padding, equal distributions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codjax_kernels import reference, token_kl
from codjax_kernels.xla import logprobs as xla


@pytest.fixture(autouse=True)
def _always_chunked(monkeypatch):
    monkeypatch.setattr(xla, "SINGLE_CHUNK_LOGITS", 0)


def problem(num_entries=13, width=8, teacher_width=6, vocab_size=19, seed=0):
    rng = np.random.default_rng(seed)
    sizes = [(num_entries, width), (vocab_size, width)]
    sizes += [(num_entries, teacher_width), (vocab_size, teacher_width)]
    return [rng.normal(size=size).astype(np.float32) for size in sizes]


def named(arrays):
    names = ("hidden", "unembedding", "teacher_hidden", "teacher_unembedding")
    return dict(zip(names, arrays, strict=True))


def value_and_gradients(function, arrays, weights, **settings):
    def total(hidden, unembedding):
        kl = function(**named([hidden, unembedding, *arrays[2:]]), **settings)
        return jnp.sum(weights * kl), kl

    return jax.value_and_grad(total, (0, 1), has_aux=True)(*arrays[:2])


@pytest.mark.parametrize("temperature", [1.0, 0.7, "by entry"])
def test_equals_whole_logits_in_float64(temperature):
    arrays, rng = problem(), np.random.default_rng(1)
    weights = rng.normal(size=13)
    if temperature == "by entry":
        temperature = rng.uniform(0.5, 1.5, 13).astype(np.float32)
    got = value_and_gradients(
        token_kl, arrays, weights.astype(np.float32), temperature=temperature, chunk_size=5
    )
    with jax.enable_x64(True):
        wide = [jnp.asarray(x, jnp.float64) for x in arrays]
        expected = value_and_gradients(
            reference.token_kl, wide, weights, temperature=jnp.asarray(temperature)
        )
    for value, exact in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(value, exact, atol=1e-5 * np.abs(exact).max())


def test_a_student_that_is_its_teacher_has_neither_divergence_nor_gradient():
    hidden, unembedding = problem()[:2]
    arrays = [hidden, unembedding, hidden, unembedding]
    (_, kl), gradients = value_and_gradients(token_kl, arrays, np.ones(13, np.float32))
    assert float(jnp.min(kl)) >= 0
    np.testing.assert_allclose(kl, 0, atol=1e-5)  # float32 logits of up to 10 cancel
    for gradient in gradients:
        np.testing.assert_allclose(gradient, 0, atol=1e-5)


@pytest.mark.parametrize("num_valid", [0, 4, 13])
def test_padding_counts_nothing(num_valid):
    arrays = problem()
    arrays[0][num_valid:] = np.nan
    weights = np.ones(13, np.float32)
    settings = {"num_valid": num_valid, "chunk_size": 3}
    (_, kl), gradients = value_and_gradients(token_kl, arrays, weights, **settings)
    short = [arrays[0][:num_valid], arrays[1], arrays[2][:num_valid], arrays[3]]
    expected = value_and_gradients(token_kl, short, weights[:num_valid])
    np.testing.assert_allclose(kl[:num_valid], expected[0][1], rtol=1e-5)
    np.testing.assert_allclose(gradients[0][:num_valid], expected[1][0], atol=1e-5)
    np.testing.assert_allclose(gradients[1], expected[1][1], atol=1e-5)
    assert not np.any(kl[num_valid:])
    assert not np.any(gradients[0][num_valid:])
