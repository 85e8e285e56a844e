"""The targets of a source beyond its first: one dot product each, nothing of the vocabulary.

Their number is known only at run time, so they are done `CHUNK` at a time in a loop of as many
turns as there are chunks: no extra targets cost nothing.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from codjax_kernels.selection import Local

CHUNK = 256


def add_logits(
    target_logit: Float[Array, " K"], local: Local, begin: Array | int, size: int
) -> Float[Array, " K"]:
    """`target_logit` with those of the extra entries of the slots ``begin … begin + size - 1``."""
    if local.selection.extra_entry is None:
        return target_logit
    first, last = _range(local, begin, size)

    def step(turn: Array, found: Array) -> Array:
        entry, hidden, rows, inverse = _chunk(local, first + turn * CHUNK, last)
        logits = jnp.sum(hidden * rows, axis=-1) * inverse
        return found.at[entry].set(logits, mode="drop")

    return jax.lax.fori_loop(0, _num_chunks(first, last), step, target_logit)


def add_gradients(
    slot_bar: Float[Array, "slots D"],
    table_bar: Float[Array, "V D"],
    local: Local,
    logprob_bar: Float[Array, " K"],
    begin: Array | int = 0,
) -> tuple[Float[Array, "slots D"], Float[Array, "V D"]]:
    """Gradients with what the logits of the extra entries contribute.

    `slot_bar` is of the slots ``begin …``, `logprob_bar` of all entries.
    """
    if local.selection.extra_entry is None:
        return slot_bar, table_bar
    first, last = _range(local, begin, slot_bar.shape[0])

    def step(turn: Array, bars: tuple[Array, Array]) -> tuple[Array, Array]:
        slot_bar, table_bar = bars
        entry, hidden, rows, inverse = _chunk(local, first + turn * CHUNK, last)
        # Entry K stands for none, and its cotangent for 0.
        bar = jnp.take(logprob_bar, entry, mode="fill", fill_value=0.0) * inverse
        slot = jnp.take(local.selection.entry_slot, entry, mode="fill", fill_value=0) - begin
        target = jnp.take(local.targets, entry, mode="fill", fill_value=0)
        to_slot = (bar[:, None] * rows).astype(slot_bar.dtype)
        to_table = (bar[:, None] * hidden).astype(table_bar.dtype)
        slot_bar = slot_bar.at[jnp.maximum(slot, 0)].add(to_slot)
        return slot_bar, table_bar.at[jnp.maximum(target, 0)].add(to_table)

    return jax.lax.fori_loop(0, _num_chunks(first, last), step, (slot_bar, table_bar))


def _range(local: Local, begin: Array | int, size: int) -> tuple[Array, Array]:
    """Which of the extra entries, which stand in the order of their slots, are of these slots."""
    selection = local.selection
    assert selection.extra_entry is not None
    assert selection.num_extra is not None
    slot = selection.entry_slot[selection.extra_entry]
    is_extra = jnp.arange(slot.shape[0]) < selection.num_extra
    first = jnp.sum(is_extra & (slot < begin), dtype=jnp.int32)
    return first, jnp.sum(is_extra & (slot < begin + size), dtype=jnp.int32)


def _num_chunks(first: Array, last: Array) -> Int[Array, ""]:
    return (last - first + CHUNK - 1) // CHUNK


def _chunk(local: Local, begin: Array, end: Array) -> tuple[Array, Array, Array, Array]:
    """Entries of a chunk (K for none), their hidden states, table rows and inverse temperatures.

    Where there is none, or the target is in another shard, the inverse temperature is 0.
    """
    selection = local.selection
    assert selection.extra_entry is not None
    assert selection.slot_source is not None
    (num_entries,) = selection.extra_entry.shape
    index = begin + jnp.arange(CHUNK, dtype=jnp.int32)
    is_extra = index < end
    entry = selection.extra_entry[jnp.minimum(index, num_entries - 1)]
    hidden = local.hidden[selection.slot_source[selection.entry_slot[entry]]]
    target = local.targets[entry]
    rows = local.table[jnp.maximum(target, 0)]
    inverse = jnp.float32(1)
    if local.inverse_temperature is not None:
        inverse = local.inverse_temperature[entry]
    inverse = jnp.where(is_extra & (target >= 0), inverse, 0.0)
    entry = jnp.where(is_extra, entry, num_entries)
    return entry, hidden.astype(jnp.float32), rows.astype(jnp.float32), inverse
