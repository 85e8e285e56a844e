"""Which hidden states are projected: each source once, padding never.

Scored entries come as (source, target) pairs, in any order, with padding among them. Two entries
with one source (two runs that stood at the same node of a forest) need one projection. `select`
gives every distinct source a *slot*, slots that are used first, so that a pass with
`num_valid = num_slots` costs what the distinct sources cost. The first entry of a slot is its
*main* one: its target is picked inside of the pass. The others are *extra*: one dot product each.

Example: sources 7, 2, 7 with targets a, b, c → slots (2, 7), main targets (b, a), extra (c in
slot 1).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from codjax_kernels.records import Rows


class Selection(NamedTuple):
    """Slots of the entries, and entries of the slots: S of them, the lesser of K and R."""

    slot_source: Int[Array, " S"] | None  # hidden state of each slot, 0 where unused; None: its own
    slot_entry: Int[Array, " S"]  # main entry of each slot; 0 where unused
    num_slots: Int[Array, ""] | None  # None: all
    entry_slot: Int[Array, " K"]  # slot of each entry; 0 for padding
    is_main: Bool[Array, " K"]  # by entry; False for padding
    extra_entry: Int[Array, " K"] | None  # 0 behind the last; None: none
    num_extra: Int[Array, ""] | None

    def to_entries(self, of_slot: Float[Array, " slots"], begin: Array | int) -> Array:
        """The value of every entry's slot, given those of the slots ``begin …``; else anything."""
        num_entries, size = self.entry_slot.shape[0], of_slot.shape[0]
        if self.slot_source is not None:
            return of_slot[jnp.clip(self.entry_slot - begin, 0, size - 1)]
        if num_entries == size:
            return of_slot
        line = jnp.zeros(num_entries + size, of_slot.dtype)
        return jax.lax.dynamic_update_slice(line, of_slot, (begin,))[:num_entries]

    def to_slots(self, of_entry: Shaped[Array, " K"]) -> Shaped[Array, " S"]:
        """The value of the main entry of every slot."""
        return of_entry if self.slot_source is None else of_entry[self.slot_entry]

    def sum_to_slots(self, of_entry: Float[Array, " K"]) -> Float[Array, " S"]:
        """The sum over the entries of every slot."""
        if self.slot_source is None:
            return of_entry
        zeros = jnp.zeros(self.slot_entry.shape[0], of_entry.dtype)
        return zeros.at[self.entry_slot].add(of_entry)


class Local(NamedTuple):
    """What one device works on: entries in one line, sources counted over its own hidden states."""

    hidden: Float[Array, "R D"]
    table: Float[Array, "V D"]  # its part of the vocabulary, whole rows
    targets: Int[Array, " K"]  # row of its part, or -1
    inverse_temperature: Float[Array, " K"] | None
    is_here: Bool[Array, " K"]  # valid, and its source is one of `hidden`
    selection: Selection


def select(source: Int[Array, " K"], is_valid: Bool[Array, " K"], num_sources: int) -> Selection:
    """Slots for the distinct sources of the valid entries, in the order of the sources.

    Args:
        source: index of the hidden state that predicts each entry, at least 0 where valid.
        is_valid: False for padding.
        num_sources: R, hidden states that there are.
    """
    (num_entries,) = source.shape
    most_slots = min(num_entries, num_sources)
    last = jnp.iinfo(jnp.int32).max
    key = jnp.where(is_valid, source.astype(jnp.int32), last)
    index = jnp.arange(num_entries, dtype=jnp.int32)
    key, order = jax.lax.sort((key, index), num_keys=1, is_stable=True)
    is_used = key < last
    is_first = is_used & jnp.concatenate([jnp.ones(1, bool), key[1:] != key[:-1]])
    slot = jnp.maximum(jnp.cumsum(is_first, dtype=jnp.int32) - 1, 0)
    # What is not to be written goes past the end, where scatters drop it.
    first_to = jnp.where(is_first, slot, most_slots)
    zeros, of_slots = jnp.zeros(num_entries, jnp.int32), jnp.zeros(most_slots, jnp.int32)
    is_extra = is_used & ~is_first
    extra_to = jnp.where(is_extra, jnp.cumsum(is_extra, dtype=jnp.int32) - 1, num_entries)
    return Selection(
        slot_source=of_slots.at[first_to].set(key, mode="drop"),
        slot_entry=of_slots.at[first_to].set(order, mode="drop"),
        num_slots=jnp.sum(is_first, dtype=jnp.int32),
        entry_slot=zeros.at[order].set(jnp.where(is_used, slot, 0)),
        is_main=jnp.zeros(num_entries, bool).at[order].set(is_first),
        extra_entry=zeros.at[extra_to].set(order, mode="drop"),
        num_extra=jnp.sum(is_extra, dtype=jnp.int32),
    )


def one_each(num_entries: int, num_valid: Int[Array, ""] | None) -> Selection:
    """The selection in which entry k reads hidden state k, and the first `num_valid` count."""
    index = jnp.arange(num_entries, dtype=jnp.int32)
    return Selection(
        slot_source=None,
        slot_entry=index,
        num_slots=num_valid,
        entry_slot=index,
        is_main=jnp.ones(num_entries, bool),
        extra_entry=None,
        num_extra=None,
    )


def slot_rows(local: Local) -> Rows:
    """The distinct sources as rows for a pass, each with its main target."""
    selection, inverse = local.selection, local.inverse_temperature
    source = selection.slot_source
    return Rows(
        hidden=local.hidden if source is None else local.hidden[source],
        targets=selection.to_slots(local.targets),
        inverse_temperature=None if inverse is None else selection.to_slots(inverse),
        num_valid=selection.num_slots,
    )


def to_hidden(local: Local, slot_bar: Float[Array, "S D"]) -> Float[Array, "R D"]:
    """Gradient of the hidden states from that of the slots; 0 for the others."""
    selection = local.selection
    if selection.num_slots is None:
        return slot_bar
    is_used = jnp.arange(slot_bar.shape[0]) < selection.num_slots
    if selection.slot_source is None:
        return jnp.where(is_used[:, None], slot_bar, 0)
    # What is not to be written goes past the end, where scatters drop it.
    to = jnp.where(is_used, selection.slot_source, local.hidden.shape[0])
    zero = jnp.zeros(local.hidden.shape, slot_bar.dtype)
    return zero.at[to].set(slot_bar, mode="drop")
