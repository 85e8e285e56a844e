"""One operation on the devices of a mesh: who works on what, and what is summed.

Each device projects the sources that lie on it onto the part of the vocabulary that it holds.
Everything here is called inside of `on_mesh`, which is `shard_map` with every axis manual, so
that no collective runs but those written below.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from codjax_kernels.records import Layout, Statistics
from codjax_kernels.selection import Local, Selection, one_each, select


class Scored(NamedTuple):
    """Entries to be scored, as the caller has them; see `codjax_kernels.scored_logprobs`."""

    source: Int[Array, "B K"] | None  # None: entry k reads hidden state k, with B = 1
    target: Int[Array, "B K"]  # in range
    is_valid: Bool[Array, "B K"] | None  # None: all, or with `num_valid` the first
    inverse_temperature: Float[Array, "B K"] | None  # None: 1
    num_valid: Int[Array, ""] | None = None  # without a source


class Specs(NamedTuple):
    """Partitions of the arrays of one operation."""

    hidden: PartitionSpec
    table: PartitionSpec
    entry: PartitionSpec
    parts: PartitionSpec  # of what differs from device to device
    whole: PartitionSpec  # of what every device has

    @classmethod
    def of(cls, layout: Layout | None) -> Specs:
        """The partitions of a layout; of None, which needs none, those of one device."""
        if layout is None:
            return cls(*[PartitionSpec()] * 5)
        rows, parts = layout.rows or None, (*layout.tokens, *layout.vocab) or None
        return cls(
            hidden=PartitionSpec(rows, layout.tokens or None),
            table=PartitionSpec(layout.vocab or None, layout.width or None),
            entry=PartitionSpec(rows),
            parts=PartitionSpec(parts, rows),
            whole=PartitionSpec(),
        )


def check_layout(layout: Layout) -> None:
    """Raise ValueError unless the axes are those of the mesh, and none cuts two things at once."""
    if set(layout.mesh.axis_types) != {AxisType.Auto}:
        raise ValueError(
            f"layout.mesh must have axes of type Auto; got {layout.mesh.axis_types}. Make it with "
            "axis_types=(jax.sharding.AxisType.Auto, …)."
        )
    cuts = {name: getattr(layout, name) for name in Layout._fields if name != "mesh"}
    for name, axes in cuts.items():
        if not isinstance(axes, tuple) or not set(axes) <= set(layout.mesh.axis_names):
            raise ValueError(
                f"layout.{name} must be a tuple of axes of the mesh, {layout.mesh.axis_names}; got "
                f"{axes!r}."
            )
    # Attention has rows, tokens and heads; log-probs have rows, tokens and vocab.
    for together in (("rows", "tokens", "heads"), ("rows", "tokens", "vocab")):
        used = [axis for name in together for axis in cuts[name]]
        if len(used) != len(set(used)):
            named = ", ".join(f"layout.{name} = {cuts[name]}" for name in together)
            raise ValueError(f"a mesh axis can cut one of these only; got {named}.")
    if not set(layout.width) <= {*layout.rows, *layout.tokens}:
        raise ValueError(
            "the axes of layout.width must be among those of layout.rows and layout.tokens; got "
            f"{layout.width}, {layout.rows} and {layout.tokens}."
        )


def on_mesh(
    layout: Layout | None, function: Callable[..., Any], in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """`function` on the devices of the layout, each with its parts; itself without a layout."""
    if layout is None:
        return function
    return jax.shard_map(
        function, mesh=layout.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def reduced_axes(layout: Layout | None) -> tuple[str, ...]:
    """Mesh axes over which the statistics of an entry are put together."""
    return () if layout is None else (*layout.tokens, *layout.vocab)


def localise(layout: Layout | None, hidden: Array, table: Array, scored: Scored) -> Local:
    """The part of the work that falls to this device."""
    rows, num_tokens, width = hidden.shape
    first_token = first_id = jnp.int32(0)
    if layout is not None:
        first_token = _axis_index(layout, layout.tokens) * num_tokens
        first_id = _axis_index(layout, layout.vocab) * table.shape[0]
        if layout.width:
            table = jax.lax.all_gather(table, layout.width, axis=1, tiled=True)
    target = scored.target.reshape(-1) - first_id
    inverse = scored.inverse_temperature
    is_here, selection = _selected(scored, first_token, rows, num_tokens)
    return Local(
        hidden=hidden.reshape(rows * num_tokens, width),
        table=table,
        targets=jnp.where((target >= 0) & (target < table.shape[0]), target, -1),
        inverse_temperature=None if inverse is None else inverse.reshape(-1),
        is_here=is_here,
        selection=selection,
    )


def reduce_statistics(axes: tuple[str, ...], part: Statistics) -> Statistics:
    """Statistics of the whole from those of every part, one max and one sum of O(K)."""
    if not axes:
        return part
    highest = jax.lax.pmax(part.log_normaliser, axes)
    share = jnp.exp(part.log_normaliser - highest)
    sums = jax.lax.psum(jnp.stack([share, share * part.mean_logit, part.target_logit]), axes)
    return Statistics(
        target_logit=sums[2],
        log_normaliser=highest + jnp.log(sums[0]),
        mean_logit=sums[1] / sums[0],
    )


def reduce_table(layout: Layout | None, table_bar: Array) -> Array:
    """The table's gradient summed over the devices that hold copies, cut as the table is.

    What each device has made in float32 is rounded to the table's dtype before it travels.
    """
    if layout is None:
        return table_bar
    # Cut first: what is summed over the copies is then smaller by the devices of the width.
    if layout.width:
        table_bar = jax.lax.psum_scatter(table_bar, layout.width, scatter_dimension=1, tiled=True)
    copies = tuple(a for a in (*layout.rows, *layout.tokens) if a not in layout.width)
    return jax.lax.psum(table_bar, copies) if copies else table_bar


def _axis_index(layout: Layout, axes: tuple[str, ...]) -> Int[Array, ""]:
    return jax.lax.axis_index(axes).astype(jnp.int32) if axes else jnp.int32(0)


def _selected(
    scored: Scored, first_token: Array, rows: int, num_tokens: int
) -> tuple[Array, Selection]:
    """Which entries have their source here, and the slots of those sources."""
    if scored.source is None:
        num_entries = scored.target.size
        if scored.num_valid is None:
            return jnp.ones(num_entries, bool), one_each(num_entries, None)
        is_here = jnp.arange(num_entries) < scored.num_valid
        return is_here, one_each(num_entries, scored.num_valid)
    token = scored.source - first_token
    is_here = (token >= 0) & (token < num_tokens)
    if scored.is_valid is not None:
        is_here &= scored.is_valid
    row = jnp.arange(rows, dtype=jnp.int32)[:, None]
    is_here = is_here.reshape(-1)
    return is_here, select((token + num_tokens * row).reshape(-1), is_here, rows * num_tokens)
