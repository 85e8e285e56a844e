"""Grouped experts = every expert asked one by one, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codjax.models import experts
from codjax.models.family import Chosen, Tables

NUM, WIDTH, MLP = 4, 6, 5


def tables_of(rng):
    shapes = ((NUM, WIDTH, MLP), (NUM, WIDTH, MLP), (NUM, MLP, WIDTH))
    return Tables(*(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes))


def one_by_one(x, chosen, tables):
    """Every expert on every token, weighted by what the token gave it."""
    total = jnp.zeros_like(x)
    for expert in range(NUM):
        weight = jnp.sum(jnp.where(chosen.expert_ids == expert, chosen.weights, 0), axis=-1)
        inner = jax.nn.silu(x @ tables.gate[expert]) * (x @ tables.up[expert])
        total += weight[..., None] * (inner @ tables.down[expert])
    return total


@pytest.mark.parametrize(
    "expert_ids",
    [
        [[[0, 1], [2, 3], [1, 0]], [[3, 1], [0, 2], [2, 1]]],
        [[[2, 0]] * 3, [[2, 0]] * 3],  # all to the same: none is dropped, two get nothing
        [[[0, -3], [7, 4], [-1, 3]], [[1, 2], [9, 9], [0, 3]]],  # experts of other devices
    ],
    ids=["spread", "one-sided", "elsewhere"],
)
def test_grouped_equals_one_by_one(expert_ids):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 3, WIDTH)), jnp.float32)
    weights = jnp.asarray(rng.uniform(size=(2, 3, 2)), jnp.float32)
    tables, ids = tables_of(rng), jnp.asarray(expert_ids)

    def total(function, x, weights, tables):
        out = function(x, Chosen(weights, ids), tables)
        return jnp.sum(jnp.sin(out)), out

    grad = jax.value_and_grad(total, argnums=(1, 2, 3), has_aux=True)
    found = jax.jit(grad, static_argnums=0)(experts.run, x, weights, tables)
    expected = grad(one_by_one, x, weights, tables)
    # float32, sums of a dozen terms of a few units in another order.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-5)
    jax.tree.map(close, found, expected)


def test_router_takes_the_likeliest_and_weighs_them_by_their_probability():
    y = jnp.asarray([[[1.0, 0.0]]])
    router = jnp.log(jnp.asarray([[0.1, 0.4, 0.2, 0.3], [1.0, 1.0, 1.0, 1.0]]))
    raw = experts.route(y, router, num_chosen=2, normalise=False)
    assert raw.expert_ids.tolist() == [[[1, 3]]]
    np.testing.assert_allclose(raw.weights, [[[0.4, 0.3]]], rtol=1e-6)
    normalised = experts.route(y, router, num_chosen=2, normalise=True)
    np.testing.assert_allclose(normalised.weights, [[[4 / 7, 3 / 7]]], rtol=1e-6)


def test_router_is_float32_where_activations_are_bfloat16():
    """Logits 8 and 8 + 2^-6 differ in float32 and not in bfloat16."""
    y = jnp.ones((1, 1, 2), jnp.bfloat16)
    router = jnp.asarray([[8.0, 8.0], [0.0, 2.0**-6]], jnp.bfloat16)
    chosen = experts.route(y, router, num_chosen=1, normalise=False)
    assert chosen.expert_ids.tolist() == [[[1]]]
    assert chosen.weights.dtype == jnp.bfloat16
