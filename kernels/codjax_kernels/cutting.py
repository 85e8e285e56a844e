"""Rows in blocks of one size, for loops whose number of turns is known at run time only."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


def padded(tree: Any, num_rows: int) -> Any:
    """Every array with zeros behind, to so many rows; numbers as they are."""

    def pad(x: Array) -> Array:
        missing = num_rows - x.shape[0] if x.ndim else 0
        return jnp.pad(x, ((0, missing),) + ((0, 0),) * (x.ndim - 1)) if missing else x

    return jax.tree.map(pad, tree)


def block_of(tree: Any, begin: Array, size: int) -> Any:
    """`size` rows of every array from `begin` on; a number (`num_valid`) counts from there."""

    def cut(x: Array) -> Array:
        if x.ndim == 0:
            return jnp.clip(x - begin, 0, size)
        return jax.lax.dynamic_slice_in_dim(x, begin, size)

    return jax.tree.map(cut, tree)
