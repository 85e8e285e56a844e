"""The door to log-probs: which hidden state meets which target."""

import jax
import jax.numpy as jnp
import numpy as np

from codjax import logprobs

# Two rows of three hidden states of width 2; logits over V = 3 are (x, y, 0).
HIDDEN = jnp.array([[[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]], [[3.0, 0.0], [0.0, 0.0], [0.0, 1.0]]])
UNEMBEDDING = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])


def log_softmax(*logits):
    return np.asarray(logits) - np.log(np.sum(np.exp(logits)))


def test_every_entry_reads_its_own_row_and_index():
    source, target = jnp.array([[1, 1], [2, 0]]), jnp.array([[0, 2], [1, 1]])
    got, entropy = logprobs.scored_logprobs(HIDDEN, UNEMBEDDING, source, target)
    first, third, fourth = log_softmax(1, 0, 0), log_softmax(0, 1, 0), log_softmax(3, 0, 0)
    np.testing.assert_allclose(got, [[first[0], first[2]], [third[1], fourth[1]]], rtol=1e-6)
    expected = [[-np.sum(np.exp(x) * x) for x in row] for row in ([first] * 2, [third, fourth])]
    np.testing.assert_allclose(entropy, expected, rtol=1e-5)


def test_temperature_divides_logits():
    source, target = jnp.array([[2], [0]]), jnp.array([[1], [0]])
    got, _ = logprobs.scored_logprobs(HIDDEN, UNEMBEDDING, source, target, temperature=2.0)
    expected = [[log_softmax(0, 1, 0)[1]], [log_softmax(1.5, 0, 0)[0]]]
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_two_entries_with_one_source_add_their_gradients():
    def loss(hidden, source, target):
        return jnp.sum(logprobs.scored_logprobs(hidden, UNEMBEDDING, source, target)[0])

    both = jax.grad(loss)(HIDDEN, jnp.array([[1, 1], [0, 0]]), jnp.array([[0, 2], [0, 0]]))
    one, other = (
        jax.grad(loss)(HIDDEN, jnp.array([[1], [0]]), jnp.array([[target], [0]]))
        for target in (0, 2)
    )
    np.testing.assert_allclose(both, one + other, rtol=1e-6)
    np.testing.assert_array_equal(both[:, 2], 0.0)


def test_padding_entries_are_finite_wherever_they_point():
    source, target = jnp.array([[-7, 99], [3, 0]]), jnp.array([[-1, 99], [3, 0]])
    got, entropy = logprobs.scored_logprobs(HIDDEN, UNEMBEDDING, source, target)
    assert np.isfinite(got).all()
    assert np.isfinite(entropy).all()


def test_no_scored_entries():
    empty = jnp.zeros((2, 0), jnp.int32)
    got, entropy = logprobs.scored_logprobs(HIDDEN, UNEMBEDDING, empty, empty)
    assert got.shape == entropy.shape == (2, 0)
