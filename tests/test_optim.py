"""Momentum in half the bytes, the rest in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from codjax import optim
from codjax.config import default_config


def one_step(momentum_dtype):
    config = default_config().optimizer
    config.learning_rate, config.momentum_dtype = 0.1, momentum_dtype
    optimizer = optim.make_optimizer(config, num_steps=10)
    params = {"w": jnp.array([1.0, -2.0, 3.0])}
    state = optimizer.init(params)
    for _ in range(3):
        updates, state = optimizer.update({"w": jnp.array([0.3, -0.1, 0.2])}, state, params)
        params = optax.apply_updates(params, updates)
    return params["w"], state


@pytest.mark.parametrize("momentum_dtype", ["float32", "bfloat16"])
def test_only_the_first_moment_changes_its_dtype(momentum_dtype):
    _, state = one_step(momentum_dtype)
    (adam,) = [
        x
        for x in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState))
        if isinstance(x, optax.ScaleByAdamState)
    ]
    assert adam.mu["w"].dtype == jnp.dtype(momentum_dtype)
    assert adam.nu["w"].dtype == jnp.float32


def test_steps_differ_by_the_rounding_of_the_momentum():
    # bfloat16 keeps 8 bits: each of three steps of 0.1 may be off by 0.4 %.
    np.testing.assert_allclose(one_step("bfloat16")[0], one_step("float32")[0], atol=1.2e-3)
