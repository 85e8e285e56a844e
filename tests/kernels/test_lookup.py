"""Lookups in a table that is cut over a mesh are lookups in the whole table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codjax_kernels import embedding_lookup

from codjax import sharding

ROWS, TOKENS, IDS, WIDTH = 8, 6, 24, 16


@pytest.mark.parametrize(
    "axes", [(8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 8, 1), (1, 1, 1, 2), (2, 2, 2, 1), (1, 2, 2, 2)]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_and_gradients_on_a_mesh(axes, dtype):
    num_devices = int(np.prod(axes))
    mesh = sharding.make_mesh(*axes, devices=jax.devices()[:num_devices])
    rng = np.random.default_rng(0)
    table = rng.normal(size=(IDS, WIDTH)).astype(np.float32)
    tokens = jnp.asarray(rng.integers(0, IDS, (ROWS, TOKENS)).astype(np.int32))
    weights = rng.normal(size=(ROWS, TOKENS, WIDTH)).astype(np.float32)

    def total(layout):
        def loss(table):
            found = embedding_lookup(table, tokens, dtype, layout=layout)
            return (found * weights.astype(found.dtype)).astype(jnp.float32).sum(), found

        return jax.jit(jax.grad(loss, has_aux=True))

    expected_bar, expected = total(None)(table)
    bar, found = total(sharding.layout(mesh))(table)
    assert found.dtype == expected.dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(found, expected)  # a sum with zeros is exact
    # Gradients are summed in float32, in another order.
    np.testing.assert_allclose(bar, expected_bar, rtol=1e-6, atol=1e-6)


def test_a_width_cut_by_another_axis_than_the_rows_is_refused():
    mesh = sharding.make_mesh(1, 1, 8)
    layout = sharding.layout(mesh)._replace(width=("tensor",), vocab=())
    with pytest.raises(ValueError, match=r"axes of layout\.width must be among those of layout\.r"):
        embedding_lookup(jnp.zeros((8, 8)), jnp.zeros((8, 8), int), "float32", layout=layout)
