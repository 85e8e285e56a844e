"""Sums, means and variances under a weight; the only place that divides by a mask.

Whatever stands where the weight is 0, nan and inf included, changes neither value nor gradient:
the values are replaced before anything is computed from them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def fill(values: Float[Array, " ..."], mask: Bool[Array, "..."], value: float = 0.0) -> jax.Array:
    """`values` where `mask`, else `value`; gradients flow only through the kept ones."""
    return jnp.where(mask, values, jnp.asarray(value, values.dtype))


def weighted_sum(values: Float[Array, " ..."], weights: Float[Array, "..."]) -> jax.Array:
    """Sum of ``weights * values`` in float32, ignoring values of weight 0."""
    weights = weights.astype(jnp.float32)
    return jnp.sum(weights * fill(values.astype(jnp.float32), weights != 0))


def mean(values: Float[Array, " ..."], mask: Float[Array, "..."] | Bool[Array, "..."]) -> jax.Array:
    """Weighted mean in float32; 0 where all weights are 0."""
    weights = mask.astype(jnp.float32)
    total = jnp.sum(weights)
    return weighted_sum(values, weights) / jnp.where(total == 0, 1.0, total)


def variance(
    values: Float[Array, " ..."], mask: Float[Array, "..."] | Bool[Array, "..."]
) -> jax.Array:
    """Weighted population variance in float32; 0 where all weights are 0."""
    centred = fill(values.astype(jnp.float32), mask != 0) - mean(values, mask)
    return mean(centred * centred, mask)
