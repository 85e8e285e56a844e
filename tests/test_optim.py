"""Momentum in half the bytes; second moments as a row and a column; where both lie on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from codjax import optim, sharding
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


def factored(**changes):
    config = default_config().optimizer
    config.update({"second_moment": "factored", "learning_rate": 0.1, "weight_decay": 0.0})
    config.update(changes)
    return optim.make_optimizer(config, num_steps=10)


def state_of(kind, state):
    (found,) = [
        x
        for x in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kind))
        if isinstance(x, kind)
    ]
    return found


def test_a_factored_second_moment_is_a_row_and_a_column():
    params = {"w": jnp.ones((3, 128, 256)), "norm": jnp.ones(7)}
    moments = state_of(optax.FactoredState, factored().init(params))
    assert (moments.v_row["w"].shape, moments.v_col["w"].shape) == ((3, 128), (3, 256))
    assert moments.v["norm"].shape == (7,)
    numbers = sum(x.size for x in jax.tree.leaves(factored(b1=0.0).init(params)))
    assert numbers < 0.02 * 3 * 128 * 256


def test_squares_of_rank_one_are_factored_without_loss():
    rows, columns = jnp.linspace(0.1, 1.0, 128), jnp.linspace(1.0, 2.0, 256)
    sign = jnp.where(jnp.arange(256) % 3 == 0, -1.0, 1.0)
    gradient = {"w": rows[:, None] * (columns * sign)[None, :]}
    optimizer = factored(b1=0.0, grad_clip_norm=1e9)
    params = {"w": jnp.zeros((128, 256))}
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    # As Adam's first step: the sign of the gradient at the learning rate.
    np.testing.assert_allclose(updates["w"], -0.1 * jnp.broadcast_to(sign, (128, 256)), rtol=1e-5)


def test_decay_and_momentum_of_a_factored_moment_are_those_of_the_config():
    optimizer = factored(b1=0.5, weight_decay=0.2, grad_clip_norm=1e9, momentum_dtype="bfloat16")
    params = {"w": jnp.full((128, 128), 2.0)}
    state = optimizer.init(params)
    assert state_of(optax.EmaState, state).ema["w"].dtype == jnp.bfloat16
    zero = {"w": jnp.zeros((128, 128))}
    updates, _ = optimizer.update(zero, state, params)
    np.testing.assert_allclose(updates["w"], -0.1 * 0.2 * 2.0, rtol=1e-6)
    one = {"w": jnp.ones((128, 128))}
    updates, state = optimizer.update(one, state, {"w": jnp.zeros((128, 128))})
    np.testing.assert_allclose(updates["w"], -0.1, rtol=1e-2)  # the average has no bias
    updates, state = optimizer.update(zero, state, {"w": jnp.zeros((128, 128))})
    np.testing.assert_allclose(updates["w"], -0.1 / 3, rtol=1e-2)  # (1 / 4) / (3 / 4)


def test_moments_lie_as_their_parameters_or_as_the_axes_that_are_left():
    mesh = sharding.make_mesh(1, 4, 2)

    def cut(*axes):
        return jax.sharding.NamedSharding(mesh, PartitionSpec(*axes))

    params = {"w": jax.ShapeDtypeStruct((3, 128, 256), jnp.float32)}
    lies = optim.moment_shardings(factored(), params, {"w": cut(None, "fsdp", "tensor")})
    moments = state_of(optax.FactoredState, lies)
    assert moments.v_row["w"].spec == PartitionSpec(None, "fsdp")
    assert moments.v_col["w"].spec == PartitionSpec(None, "tensor")
    assert moments.v["w"].spec == PartitionSpec()  # a placeholder of one number
    assert state_of(optax.EmaState, lies).ema["w"].spec == PartitionSpec(None, "fsdp", "tensor")
    assert moments.count.spec == PartitionSpec()
