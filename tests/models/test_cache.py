"""Decoding with the cache equals the full forward pass."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from codjax import models
from tests import small

CONFIG = small.decoder_config(vocab_size=30, hidden_size=24, tie_embeddings=True)
NUM_TOKENS = 12


@pytest.fixture(scope="module")
def model():
    return models.init(CONFIG, seed=2)


@pytest.fixture(scope="module")
def tokens():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.integers(0, CONFIG.vocab_size, (3, NUM_TOKENS)), jnp.int32)


@pytest.fixture(scope="module")
def whole(model, tokens):
    index = jnp.broadcast_to(jnp.arange(NUM_TOKENS)[None], tokens.shape)
    return model(tokens, index, jnp.full(tokens.shape, NUM_TOKENS))


@functools.partial(jax.jit, static_argnums=0)
def extend_split(graphdef, params, cache, tokens, start):
    return models.extend(nnx.merge(graphdef, params), cache, tokens, start)


def extend(model, cache, tokens, start):
    return extend_split(*nnx.split(model), cache, tokens, start)


def at(index):
    return jnp.full(3, index, jnp.int32)


def dirty_cache(num_rows=3, num_tokens=16):
    """A cache in which every entry is nonsense that must not be read."""
    empty = models.init_cache(CONFIG, num_rows, num_tokens)
    return jax.tree.map(lambda x: x + 100.0, empty)


def extend_by(model, tokens, sizes):
    cache, hidden, start = dirty_cache(), [], 0
    for size in sizes:
        part, cache = extend(model, cache, tokens[:, start : start + size], at(start))
        hidden.append(part)
        start += size
    return jnp.concatenate(hidden, axis=1), cache


@pytest.mark.parametrize("sizes", [[12], [7, 1, 1, 1, 1, 1], [1] * 12, [5, 4, 3]])
def test_pieces_equal_the_whole(model, tokens, whole, sizes):
    hidden, _ = extend_by(model, tokens, sizes)
    np.testing.assert_allclose(hidden, whole, atol=1e-5)


def test_chunks_leave_the_same_cache(model, tokens):
    _, one = extend_by(model, tokens, [12])
    _, many = extend_by(model, tokens, [5, 1, 6])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), one, many)


def test_rows_may_stand_at_different_indices(model, tokens, whole):
    start = jnp.array([3, 0, 8])
    _, cache = extend_by(model, tokens, [9])
    piece = jnp.stack([tokens[row, s : s + 4] for row, s in enumerate(start.tolist())])
    hidden, _ = extend(model, cache, piece, start)
    for row, s in enumerate(start.tolist()):
        np.testing.assert_allclose(hidden[row], whole[row, s : s + 4], atol=1e-5)


def test_rows_do_not_see_each_other(model, tokens):
    _, cache = extend_by(model, tokens, [6])
    hidden, after = extend(model, cache, tokens[:, 6:8], at(6))
    ruined = jax.tree.map(lambda x: x.at[:, [0, 2]].set(7.0), cache)
    piece = tokens[:, 6:8].at[jnp.array([0, 2])].set(0)
    other, ruined_after = extend(model, ruined, piece, jnp.array([0, 6, 11]))
    np.testing.assert_array_equal(other[1], hidden[1])
    np.testing.assert_array_equal(ruined_after.keys[:, 1], after.keys[:, 1])


def test_writes_past_the_end_are_dropped(model, tokens, whole):
    _, cache = extend_by(model, tokens, [12])
    hidden, after = extend(model, cache, tokens[:, :4], at(16))
    jax.tree.map(np.testing.assert_array_equal, after, cache)
    assert np.isfinite(hidden).all()
    # A chunk that sticks out writes what fits: indices 12..15 of six.
    _, partial = extend(model, cache, tokens[:, :6], at(12))
    np.testing.assert_array_equal(partial.keys[:, :, :12], cache.keys[:, :, :12])
    assert not np.any(np.asarray(partial.keys[:, :, 12:] == cache.keys[:, :, 12:]))


def test_rows_are_taken_back_by_starting_lower(model, tokens, whole):
    _, cache = extend_by(model, tokens, [12])
    hidden, _ = extend(model, cache, tokens[:, 5:7], at(5))
    np.testing.assert_allclose(hidden, whole[:, 5:7], atol=1e-5)


def test_donated_cache_is_written_in_place(model, tokens):
    graphdef, params = nnx.split(model)
    cache = models.init_cache(CONFIG, 64, 128)
    args = (params, cache, jnp.zeros((64, 1), jnp.int32), jnp.zeros(64, jnp.int32))
    step = functools.partial(extend_split.__wrapped__, graphdef)
    compiled = jax.jit(step, donate_argnums=(1,)).lower(*args).compile()
    memory = compiled.memory_analysis()
    cache_bytes = cache.keys.nbytes + cache.values.nbytes
    assert memory.alias_size_in_bytes == cache_bytes
    # One layer is looked at at a time; never a second cache of all layers.
    assert memory.temp_size_in_bytes < cache_bytes


def test_cache_has_the_compute_dtype(tokens):
    model = models.init(dataclasses.replace(CONFIG, dtype="bfloat16"), seed=2)
    cache = models.init_cache(model.config, 3, 16)
    hidden, cache = extend(model, cache, tokens[:, :4], at(0))
    assert {x.dtype for x in (hidden, *cache)} == {jnp.dtype(jnp.bfloat16)}
