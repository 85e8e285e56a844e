"""The targets of a source beyond its first: one dot product each, nothing of the vocabulary.

Their number is known only at run time, so they are done `CHUNK` at a time in a loop of as many
turns as there are chunks: no extra targets cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from codjax_kernels.selection import Local

CHUNK = 256
_NO_ROW = jnp.iinfo(jnp.int32).max  # past every end, where scatters drop it


def add_logits(target_logit: Float[Array, " K"], local: Local) -> Float[Array, " K"]:
    """`target_logit` with those of the extra entries, by the table at hand."""
    entries = local.selection.extra_entry
    if entries is None:
        return target_logit
    num_extra = local.selection.num_extra
    assert num_extra is not None

    def step(turn: Array, found: Array) -> Array:
        index = turn * CHUNK + jnp.arange(CHUNK, dtype=jnp.int32)
        entry = entries[jnp.minimum(index, entries.shape[0] - 1)]
        hidden, rows, inverse = _operands(local, entry)
        logits = jnp.sum(hidden * rows, axis=-1) * inverse
        return found.at[jnp.where(index < num_extra, entry, _NO_ROW)].set(logits, mode="drop")

    return jax.lax.fori_loop(0, _num_chunks(num_extra), step, target_logit)


def add_gradients(
    slot_bar: Float[Array, "slots D"],
    table_bar: Float[Array, "V D"],
    local: Local,
    logprob_bar: Float[Array, " K"],
    begin: Array | int = 0,
) -> tuple[Float[Array, "slots D"], Float[Array, "V D"]]:
    """Gradients with what the logits of the extra entries contribute.

    What a slot, or a row of the table, gets from several entries is summed in float32 and rounded
    once. `slot_bar` is of the slots ``begin …``, `logprob_bar` of all entries.
    """
    selection = local.selection
    entry, num_extra = selection.extra_entry, selection.num_extra
    if entry is None or num_extra is None:
        return slot_bar, table_bar
    slot = selection.entry_slot[entry] - begin
    is_here = (slot >= 0) & (slot < slot_bar.shape[0])
    is_here &= jnp.arange(entry.shape[0]) < num_extra
    by_slot = jax.lax.sort((jnp.where(is_here, slot, _NO_ROW), entry), num_keys=1)
    target = local.targets[entry]
    is_target = is_here & (target >= 0)
    by_target = jax.lax.sort((jnp.where(is_target, target, _NO_ROW), entry), num_keys=1)

    def of_hidden(entry: Array) -> Array:
        _, rows, inverse = _operands(local, entry)
        return (logprob_bar[entry] * inverse)[:, None] * rows

    def of_table(entry: Array) -> Array:
        hidden, _, inverse = _operands(local, entry)
        return (logprob_bar[entry] * inverse)[:, None] * hidden

    slots, entries = by_slot
    slot_bar = _add_sums(slot_bar, slots, entries, jnp.sum(is_here), terms=of_hidden)
    targets, entries = by_target
    return slot_bar, _add_sums(table_bar, targets, entries, jnp.sum(is_target), terms=of_table)


def _add_sums(
    total: Float[Array, "n D"],
    row: Int[Array, " K"],
    entry: Int[Array, " K"],
    num_entries: Int[Array, ""],
    *,
    terms: Callable[[Array], Array],
) -> Float[Array, "n D"]:
    """`total` with the sums of the terms of the first entries, which stand in order of their rows.

    Args:
        total: what is added to.
        row: of `total` that the term of an entry belongs to, ascending.
        entry: what `terms` is asked for.
        num_entries: how many count.
        terms: ``entries [CHUNK] → [CHUNK D]``, float32.
    """

    def step(turn: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        total, open_row, open_sum = state
        index = turn * CHUNK + jnp.arange(CHUNK, dtype=jnp.int32)
        at = jnp.minimum(index, row.shape[0] - 1)
        rows = jnp.where(index < num_entries, row[at], _NO_ROW)
        # A run of equal rows may go on in the next chunk, so that the last one stays open.
        is_new = rows != jnp.concatenate([open_row[None], rows[:-1]])
        run = jnp.cumsum(is_new, dtype=jnp.int32)
        sums = jax.ops.segment_sum(terms(entry[at]), run, CHUNK + 1).at[0].add(open_sum)
        run_row = jnp.full(CHUNK + 1, _NO_ROW).at[0].set(open_row).at[run].set(rows)
        is_closed = jnp.arange(CHUNK + 1) < run[-1]
        total = _added(total, jnp.where(is_closed, run_row, _NO_ROW), sums)
        return total, run_row[run[-1]], sums[run[-1]]

    nothing = (total, jnp.int32(_NO_ROW), jnp.zeros(total.shape[1], jnp.float32))
    total, row_left, sum_left = jax.lax.fori_loop(0, _num_chunks(num_entries), step, nothing)
    return _added(total, row_left[None], sum_left[None])


def _added(total: Array, row: Array, sums: Array) -> Array:
    """`total` with sums added to some rows, each row once."""
    before = total.at[row].get(mode="fill", fill_value=0).astype(jnp.float32)
    return total.at[row].set((before + sums).astype(total.dtype), mode="drop")


def _num_chunks(num_entries: Array) -> Int[Array, ""]:
    return (num_entries + CHUNK - 1) // CHUNK


def _operands(
    local: Local, entry: Int[Array, " n"]
) -> tuple[Float[Array, "n D"], Float[Array, "n D"], Float[Array, " n"]]:
    """Hidden states, table rows and inverse temperatures of entries, float32.

    Where the target is in another shard, the inverse temperature is 0.
    """
    selection, target = local.selection, local.targets[entry]
    assert selection.slot_source is not None
    hidden = local.hidden[selection.slot_source[selection.entry_slot[entry]]]
    rows = local.table[jnp.maximum(target, 0)]
    inverse = jnp.float32(1)
    if local.inverse_temperature is not None:
        inverse = local.inverse_temperature[entry]
    inverse = jnp.where(target >= 0, inverse, 0.0)
    return hidden.astype(jnp.float32), rows.astype(jnp.float32), inverse
