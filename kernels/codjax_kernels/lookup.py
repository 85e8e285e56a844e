"""Rows of a token table that is cut over the devices of a mesh, and their gradient.

What travels is what is asked for: every device looks up, in its part of the vocabulary and of
the width, the tokens of all rows of its group, in the compute dtype, and sends each device the
part of its own rows. Left to the partitioner, a table cut along both of its axes makes it
gather activations of all rows, in the dtype of the table, and gradients of whole tables.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from codjax_kernels.mesh import on_mesh
from codjax_kernels.records import Layout


def embedding_lookup(
    table: Float[Array, "V D"],
    tokens: Int[Array, "B T"],
    dtype: Any,
    *,
    layout: Layout | None = None,
) -> Float[Array, "B T D"]:
    """``table[tokens]`` in another dtype; the gradient is summed in the dtype of the table.

    Args:
        table: one row a token id.
        tokens: ids in `[0, V)`; any other reads zeros on a mesh.
        dtype: of the result.
        layout: how rows, tokens, vocabulary and width lie on a mesh; None: one device.

    Raises:
        ValueError: the width is cut by a mesh axis that does not cut the rows.
    """
    if layout is None:
        return table[tokens].astype(dtype)
    if not set(layout.width) <= set(layout.rows):
        raise ValueError(
            "the axes of layout.width must be among those of layout.rows, along which rows are "
            f"exchanged for parts of the width; got {layout.width} and {layout.rows}."
        )
    return _lookup(layout, jnp.dtype(dtype), table, tokens)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _lookup(layout: Layout, dtype: Any, table: Array, tokens: Array) -> Array:
    def on_device(table, tokens):  # type: ignore[no-untyped-def]
        ids, is_here = _ids_here(layout, table.shape[0], tokens)
        found = jnp.where(is_here[..., None], table[ids].astype(dtype), 0)
        if layout.width:
            found = jax.lax.all_to_all(found, layout.width, split_axis=0, concat_axis=2, tiled=True)
        # One device has the row and the others add zeros, so that the sum is exact.
        return jax.lax.psum(found, layout.vocab) if layout.vocab else found

    return on_mesh(layout, on_device, (_table(layout), _tokens(layout)), _hidden(layout))(
        table, tokens
    )


def _forward(
    layout: Layout, dtype: Any, table: Array, tokens: Array
) -> tuple[Array, tuple[Array, Array]]:
    # The table stands for its shape and dtype, which a residual cannot carry alone.
    return _lookup(layout, dtype, table, tokens), (table, tokens)


def _backward(
    layout: Layout, dtype: Any, residuals: tuple[Array, Array], cotangent: Array
) -> tuple[Array, None]:
    def on_device(table, tokens, bar):  # type: ignore[no-untyped-def]
        if layout.width:
            bar = jax.lax.all_to_all(bar, layout.width, split_axis=2, concat_axis=0, tiled=True)
        ids, is_here = _ids_here(layout, table.shape[0], tokens)
        bar = jnp.where(is_here[..., None], bar, 0).astype(table.dtype)
        table_bar = jnp.zeros_like(table).at[ids].add(bar)
        copies = tuple(a for a in (*layout.rows, *layout.tokens) if a not in layout.width)
        return jax.lax.psum(table_bar, copies) if copies else table_bar

    table, tokens = residuals
    specs = (_table(layout), _tokens(layout), _hidden(layout))
    return on_mesh(layout, on_device, specs, _table(layout))(table, tokens, cotangent), None


_lookup.defvjp(_forward, _backward)


def _ids_here(layout: Layout, num_ids: int, tokens: Array) -> tuple[Array, Array]:
    """Tokens of all rows of the group as rows of this part of the table, and which are in it."""
    if layout.width:
        tokens = jax.lax.all_gather(tokens, layout.width, axis=0, tiled=True)
    first = jax.lax.axis_index(layout.vocab) * num_ids if layout.vocab else 0
    ids = tokens - first
    is_here = (ids >= 0) & (ids < num_ids)
    return jnp.where(is_here, ids, 0), is_here


def _table(layout: Layout) -> PartitionSpec:
    return PartitionSpec(layout.vocab or None, layout.width or None)


def _tokens(layout: Layout) -> PartitionSpec:
    return PartitionSpec(layout.rows or None, layout.tokens or None)


def _hidden(layout: Layout) -> PartitionSpec:
    return PartitionSpec(layout.rows or None, layout.tokens or None)
