"""Cut over eight devices, both operations are what they are on one: by XLA, and by TPU kernels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codjax_kernels import Layout, forest_attention, scored_logprobs, scored_loss, token_kl
from jax.sharding import AxisType

from tests.kernels import forests

XLA = {"implementation": "xla"}
PALLAS = {"implementation": "pallas_tpu", "interpret": True}


def layout(shape, **axes):
    mesh = jax.make_mesh(shape, ("a", "b", "c"), axis_types=(AxisType.Auto,) * 3)
    return Layout(mesh=mesh, **axes)


def value_and_grad(function, weights, *inputs):
    """Results of a function of arrays, and the gradient of their weighted sum."""

    def total(*inputs):
        out = function(*inputs)
        return jnp.sum(weights * out), out

    run = jax.value_and_grad(total, tuple(range(len(inputs))), has_aux=True)
    return jax.tree.leaves(jax.jit(run)(*inputs))


ATTENTION_LAYOUTS = {
    "rows and heads": ((2, 1, 4), {"rows": ("a",), "heads": ("c",)}),
    "tokens": ((1, 8, 1), {"tokens": ("b",)}),
    "all": ((2, 2, 2), {"rows": ("a",), "tokens": ("b",), "heads": ("c",)}),
}


@pytest.mark.parametrize("name", ATTENTION_LAYOUTS)
@pytest.mark.parametrize("settings", [XLA, PALLAS], ids=["xla", "pallas"])
def test_attention(name, settings):
    shape, axes = ATTENTION_LAYOUTS[name]
    rng = np.random.default_rng(0)
    q, k, v, weights = (
        rng.normal(size=(2, 48, heads, 64)).astype(np.float32) for heads in (8, 4, 4, 8)
    )
    ends = jnp.asarray(forests.random_forest(rng, 2, 48))
    one = functools.partial(forest_attention, subtree_end=ends, **XLA)
    many = functools.partial(
        forest_attention, subtree_end=ends, layout=layout(shape, **axes), **settings
    )
    got = value_and_grad(many, weights, q, k, v)
    for value, expected in zip(got, value_and_grad(one, weights, q, k, v), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("entropy_gradient", [True, False])
def test_log_probs_by_tpu_kernels(entropy_gradient):
    rng = np.random.default_rng(1)
    hidden = rng.normal(size=(2, 8, 16)).astype(np.float32)
    table = rng.normal(size=(64, 16)).astype(np.float32)
    source = rng.integers(0, 8, (2, 6)).astype(np.int32)
    target = rng.integers(0, 64, (2, 6)).astype(np.int32)
    weights = rng.normal(size=(2, 6)).astype(np.float32)
    made = {"source": source, "target": target, "entropy_gradient": entropy_gradient}
    on_mesh = layout((2, 2, 2), rows=("a",), tokens=("b",), vocab=("c",), width=("a",))

    def by(**settings):
        def function(hidden, table):
            logprobs, entropy = scored_logprobs(hidden, table, **made, **settings)
            return logprobs + 0.3 * entropy if entropy_gradient else logprobs

        return value_and_grad(function, weights, hidden, table)

    for value, expected in zip(by(**PALLAS, layout=on_mesh), by(**XLA), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("on_mesh", [False, True])
def test_gradients_in_forward_by_tpu_kernels(on_mesh):
    rng = np.random.default_rng(2)
    hidden = rng.normal(size=(2, 8, 16)).astype(np.float32)
    table = rng.normal(size=(64, 16)).astype(np.float32)
    weights = rng.normal(size=(2, 6)).astype(np.float32)
    entries = {
        "source": rng.integers(0, 8, (2, 6)).astype(np.int32),
        "target": rng.integers(0, 64, (2, 6)).astype(np.int32),
        "is_valid": rng.random((2, 6)) > 0.3,
    }
    axes = {"rows": ("a",), "tokens": ("b",), "vocab": ("c",), "width": ("a",)}
    cut = layout((2, 2, 2), **axes) if on_mesh else None

    def by(**settings):
        def loss(logprobs, entropy, weights):
            return jnp.sum(weights * (jnp.exp(logprobs) + 0.3 * entropy))

        def total(hidden, table):
            made = scored_loss(loss, hidden, table, **entries, operands=weights, **settings)
            return made[0], made

        return jax.tree.leaves(
            jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(hidden, table)
        )

    for value, expected in zip(by(**PALLAS, layout=cut), by(**XLA), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=2e-5)


def test_divergence_by_tpu_kernels():
    rng = np.random.default_rng(3)
    hidden, other = (rng.normal(size=(20, width)).astype(np.float32) for width in (16, 24))
    table, others = (rng.normal(size=(50, width)).astype(np.float32) for width in (16, 24))

    def by(**settings):
        def divergence(hidden, table):
            return token_kl(
                hidden, table, teacher_hidden=other, teacher_unembedding=others, **settings
            )

        return value_and_grad(divergence, 1.0, hidden, table)

    for value, expected in zip(by(**PALLAS), by(**XLA), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=5e-5)
