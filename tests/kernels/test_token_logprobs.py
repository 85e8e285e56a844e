"""token_logprobs against float64 whole logits: values, gradients, memory, odd sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codjax_kernels import reference, token_logprobs
from codjax_kernels.xla import logprobs as xla

# K, D, V, chunk_size: sizes that no chunk divides, fewer entries than a chunk, exact fits.
SIZES = [(7, 5, 11, 512), (37, 8, 13, 10), (37, 8, 13, 16), (64, 16, 31, 16), (1, 4, 3, 1)]


@pytest.fixture(autouse=True)
def _always_chunked(monkeypatch):
    monkeypatch.setattr(xla, "SINGLE_CHUNK_LOGITS", 0)


def problem(num_entries, width, vocab_size, *, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(num_entries, width)).astype(np.float32) * scale
    unembedding = rng.normal(size=(vocab_size, width)).astype(np.float32)
    targets = rng.integers(0, vocab_size, num_entries).astype(np.int32)
    temperature = rng.uniform(0.5, 1.5, num_entries).astype(np.float32)
    bars = rng.normal(size=(2, num_entries)).astype(np.float32)
    return hidden, unembedding, targets, temperature, bars


def value_and_grad(function, hidden, unembedding, *rest, **settings):
    """Log-probs, entropy and the gradient of their sum weighted by `bars`."""
    targets, temperature, bars = rest

    def weighted(hidden, unembedding):
        logprobs, entropy = function(hidden, unembedding, targets, temperature, **settings)
        total = jnp.sum(bars[0] * logprobs) + jnp.sum(bars[1] * entropy)
        return total, (logprobs, entropy)

    run = jax.jit(jax.value_and_grad(weighted, (0, 1), has_aux=True))
    (_, (logprobs, entropy)), gradients = run(hidden, unembedding)
    return tuple(np.asarray(x, np.float64) for x in (logprobs, entropy, *gradients))


def oracle(hidden, unembedding, targets, temperature, bars):
    with jax.enable_x64(True):
        wide = [jnp.asarray(x, jnp.float64) for x in (hidden, unembedding, temperature, bars)]
        return value_and_grad(
            reference.token_logprobs, wide[0], wide[1], jnp.asarray(targets), wide[2], wide[3]
        )


def test_by_hand():
    # One feature, logits (0, log 3): probabilities 1/4 and 3/4.
    hidden, unembedding = jnp.ones((2, 1)), jnp.log(jnp.array([[1.0], [3.0]]))
    logprobs, entropy = token_logprobs(hidden, unembedding, jnp.array([0, 1]))
    np.testing.assert_allclose(logprobs, np.log([0.25, 0.75]), rtol=1e-6)
    expected = -(0.25 * np.log(0.25) + 0.75 * np.log(0.75))
    np.testing.assert_allclose(entropy, [expected, expected], rtol=1e-6)


@pytest.mark.parametrize(("num_entries", "width", "vocab_size", "chunk_size"), SIZES)
def test_equals_whole_logits_in_float64(num_entries, width, vocab_size, chunk_size):
    inputs = problem(num_entries, width, vocab_size)
    got = value_and_grad(token_logprobs, *inputs, chunk_size=chunk_size)
    for value, expected in zip(got, oracle(*inputs), strict=True):
        # float32 dot products of at most 16 terms: a few units in the last place of the largest.
        np.testing.assert_allclose(value, expected, atol=1e-5 * np.abs(expected).max() + 1e-6)


def test_one_piece_equals_chunks(monkeypatch):
    inputs = problem(100, 8, 13)
    chunked = value_and_grad(token_logprobs, *inputs, chunk_size=16)
    monkeypatch.setattr(xla, "SINGLE_CHUNK_LOGITS", 1 << 20)
    for one, other in zip(value_and_grad(token_logprobs, *inputs), chunked, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_as_exact_as_its_inputs():
    hidden, unembedding, targets, temperature, bars = problem(300, 32, 50)
    half = [jnp.asarray(x, jnp.bfloat16) for x in (hidden, unembedding)]
    rest = (targets, temperature, bars)
    logprobs, entropy, *gradients = value_and_grad(token_logprobs, *half, *rest, chunk_size=32)
    expected = oracle(*(np.asarray(x, np.float32) for x in half), *rest)
    # Products of bfloat16 numbers are exact in float32: values have float32 errors.
    np.testing.assert_allclose(logprobs, expected[0], atol=2e-5)
    np.testing.assert_allclose(entropy, expected[1], atol=5e-5)
    for gradient, exact in zip(gradients, expected[2:], strict=True):
        # Two roundings to 8 bits (of the logits' gradient and of the result), 2^-9 each.
        assert np.linalg.norm(gradient - exact) < 4e-3 * np.linalg.norm(exact)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_logprobs_never_above_zero_and_entropy_never_below(dtype):
    hidden, unembedding, _, _, _ = problem(500, 16, 40, scale=30.0)
    hidden, unembedding = jnp.asarray(hidden, dtype), jnp.asarray(unembedding, dtype)
    best = jnp.argmax(hidden @ unembedding.T, axis=-1)
    logprobs, entropy = token_logprobs(hidden, unembedding, best, 0.7, chunk_size=64)
    assert float(jnp.max(logprobs)) <= 0.0
    assert float(jnp.max(logprobs)) > -1e-6
    assert float(jnp.min(entropy)) >= 0.0


def test_certain_distribution_has_finite_gradient():
    hidden, unembedding = jnp.array([[1e4], [-1e4]]), jnp.array([[1.0], [-1.0], [0.0]])
    bars = jnp.ones((2, 2))
    got = value_and_grad(
        token_logprobs, hidden, unembedding, jnp.array([0, 0]), jnp.ones(2), bars, chunk_size=1
    )
    np.testing.assert_allclose(got[0], [0.0, -2e4])
    np.testing.assert_allclose(got[1], [0.0, 0.0])
    np.testing.assert_allclose(got[2], [[0.0], [2.0]])


def test_out_of_range_targets_read_as_zero():
    hidden, unembedding, targets, _, _ = problem(6, 4, 9)
    targets[[1, 4]] = [-1, 9]
    inside = np.where((targets >= 0) & (targets < 9), targets, 0)
    logprobs, _ = token_logprobs(hidden, unembedding, targets)
    np.testing.assert_array_equal(logprobs, token_logprobs(hidden, unembedding, inside)[0])


def test_temperature_of_all_equals_temperature_of_each():
    hidden, unembedding, targets, _, _ = problem(9, 4, 7)
    one = token_logprobs(hidden, unembedding, targets, 0.6)
    each = token_logprobs(hidden, unembedding, targets, np.full(9, 0.6, np.float32))
    np.testing.assert_array_equal(one[0], each[0])
    np.testing.assert_array_equal(one[1], each[1])


def test_no_entries():
    logprobs, entropy = token_logprobs(jnp.zeros((0, 4)), jnp.ones((3, 4)), jnp.zeros(0, jnp.int32))
    assert logprobs.shape == entropy.shape == (0,)


def test_logits_never_exist_beyond_a_chunk():
    num_entries, width, vocab_size, chunk_size = 4096, 16, 4096, 256

    def loss(hidden, unembedding, targets):
        logprobs, entropy = token_logprobs(hidden, unembedding, targets, chunk_size=chunk_size)
        return jnp.sum(logprobs) + jnp.sum(entropy)

    shapes = (
        jax.ShapeDtypeStruct((num_entries, width), jnp.float32),
        jax.ShapeDtypeStruct((vocab_size, width), jnp.float32),
        jax.ShapeDtypeStruct((num_entries,), jnp.int32),
    )
    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*shapes).compile()
    logits_bytes, chunk_bytes = num_entries * vocab_size * 4, chunk_size * vocab_size * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * chunk_bytes < logits_bytes / 2
    assert f"[{num_entries},{vocab_size}]" not in compiled.as_text()


def test_an_unknown_implementation_says_what_there_is():
    with pytest.raises(ValueError, match="one of 'xla', 'pallas_tpu', 'pallas_gpu'; got 'cuda'"):
        token_logprobs(jnp.ones((2, 4)), jnp.ones((3, 4)), jnp.zeros(2, jnp.int32), 1.0, "cuda")


def test_bad_calls():
    hidden, unembedding, targets = jnp.ones((2, 4)), jnp.ones((3, 4)), jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match="Pallas kernels only"):
        token_logprobs(hidden, unembedding, targets, interpret=True)
    with pytest.raises(ValueError, match="chunk_size must be at least 1; got 0"):
        token_logprobs(hidden, unembedding, targets, chunk_size=0)
