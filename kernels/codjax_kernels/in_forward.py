"""Losses that are a sum over entries, with their gradient made in the forward pass.

A loss ``sum_k f_k(logprob_k, entropy_k)`` says what it wants of an entry as soon as the entry's
statistics are known. So a block of sources is projected, f differentiated, and its logits turned
into gradients before the next block: 3 matrix products, 6 K D V operations, where recomputing takes
4 or 5, at the price of the logits of one block. The gradient then only waits to be multiplied by
the cotangent of the loss.

On a mesh, statistics are put together slot by slot and block by block, so that all blocks together
move what one reduction of O(K) would, and hidden gradients are summed as their block is done. A
loss in which entries meet (a ratio of whole samples) is not of this
form: `scored_logprobs` and automatic differentiation are for it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from codjax_kernels import extras
from codjax_kernels.cutting import block_of, padded
from codjax_kernels.logprobs import (
    Setting,
    logit_gradient,
    logprob_and_entropy,
    scored_logprobs,
)
from codjax_kernels.mesh import (
    Scored,
    Specs,
    localise,
    on_mesh,
    reduce_statistics,
    reduce_table,
)
from codjax_kernels.records import Statistics
from codjax_kernels.selection import Local, slot_rows, to_hidden

Loss = Callable[[Array, Array, Any], Array]  # (logprobs [n], entropy [n], operands) → scalar


class _State(NamedTuple):
    """Where the loop over blocks of slots stands."""

    slot_bar: Float[Array, "slots D"]
    table_bar: Float[Array, "V D"]
    logprobs: Float[Array, " K"]  # by entry
    entropy: Float[Array, " K"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def scored_loss(  # noqa: PLR0917 - custom_vjp takes arguments by position
    setting: Setting, loss: Loss, hidden: Array, table: Array, scored: Scored, operands: Any
) -> tuple[Array, Array, Array]:
    """See `codjax_kernels.scored_loss`."""
    logprobs_BK, entropy_BK = scored_logprobs(setting, hidden, table, scored)
    return total_of(loss, logprobs_BK, entropy_BK, operands), logprobs_BK, entropy_BK


def _loss_forward(  # noqa: PLR0917 - as `scored_loss`
    setting: Setting, loss: Loss, hidden: Array, table: Array, scored: Scored, operands: Any
) -> tuple[tuple[Array, Array, Array], tuple[Array, Array]]:
    specs = Specs.of(setting.layout)

    def forward(hidden, table, scored, operands):  # type: ignore[no-untyped-def]
        local = localise(setting.layout, hidden, table, scored)
        made = _blocks(setting, loss, local, _flat(operands))
        logprobs_K, entropy_K = made.logprobs, made.entropy
        if setting.layout is not None and setting.layout.tokens:
            # An entry is scored where its source is; elsewhere it is 0.
            both = jax.lax.psum(jnp.stack([logprobs_K, entropy_K]), setting.layout.tokens)
            logprobs_K, entropy_K = both[0], both[1]
        shape = scored.target.shape
        return (
            logprobs_K.reshape(shape),
            entropy_K.reshape(shape),
            to_hidden(local, made.slot_bar).reshape(hidden.shape),
            reduce_table(setting.layout, made.table_bar.astype(table.dtype)),
        )

    operand_specs = jax.tree.map(lambda x: specs.entry if x.ndim else specs.whole, operands)
    run = on_mesh(
        setting.layout,
        forward,
        (specs.hidden, specs.table, specs.entry, operand_specs),
        (specs.entry, specs.entry, specs.hidden, specs.table),
    )
    logprobs_BK, entropy_BK, hidden_bar, table_bar = run(hidden, table, scored, operands)
    results = (total_of(loss, logprobs_BK, entropy_BK, operands), logprobs_BK, entropy_BK)
    return results, (hidden_bar, table_bar)


def _loss_backward(
    setting: Setting,
    loss: Loss,
    residuals: tuple[Array, Array],
    cotangents: tuple[Array, Array, Array],
) -> tuple[Array, Array, None, None]:
    hidden_bar, table_bar = ((cotangents[0] * bar).astype(bar.dtype) for bar in residuals)
    return hidden_bar, table_bar, None, None


scored_loss.defvjp(_loss_forward, _loss_backward)


def total_of(loss: Loss, logprobs_BK: Array, entropy_BK: Array, operands: Any) -> Array:
    """The loss of entries, which it gets in one line."""
    return loss(logprobs_BK.reshape(-1), entropy_BK.reshape(-1), _flat(operands))


def _flat(operands: Any) -> Any:
    """Entries in one line; numbers as they are."""
    return jax.tree.map(lambda x: x.reshape(-1) if x.ndim else x, operands)


def _blocks(setting: Setting, loss: Loss, local: Local, operands: Any) -> _State:
    """Gradients of slots and table, and results of the entries, block after block of slots."""
    stored_statistics = setting.passes.stored_statistics
    stored_gradients = setting.passes.stored_gradients
    assert stored_statistics is not None
    assert stored_gradients is not None
    axes = setting.layout.vocab if setting.layout is not None else ()
    num_entries, most_slots = local.targets.shape[0], local.selection.slot_entry.shape[0]
    num_slots: Array | int = most_slots
    if local.selection.num_slots is not None:
        num_slots = local.selection.num_slots
    size = math.ceil(most_slots / math.ceil(most_slots / setting.passes.block_rows))
    num_blocks = math.ceil(most_slots / size)
    rows = padded(slot_rows(local), num_blocks * size)
    extra_logit = _extra_logits(local, axes)

    def step(turn: Array, state: _State) -> _State:
        begin = turn * size
        block = block_of(rows, begin, size)
        part, stored = stored_statistics(block, local.table)
        whole, is_here = _of_entries(local, reduce_statistics(axes, part), extra_logit, begin)
        results = logprob_and_entropy(whole)
        bars = jax.grad(loss, argnums=(0, 1))(*results, operands)
        logprob_bar, entropy_bar = (jnp.where(is_here, bar, 0.0) for bar in bars)
        gradient = logit_gradient(
            local, whole, logprob_bar, entropy_bar if setting.entropy_gradient else None
        )
        gradient = block_of(padded(gradient, num_blocks * size), begin, size)
        bar, table_bar = stored_gradients(block, local.table, stored, gradient, state.table_bar)
        bar, table_bar = extras.add_gradients(bar, table_bar, local, logprob_bar, begin)
        if axes:
            bar = jax.lax.psum(bar, axes)
        logprob, entropy = (
            jnp.where(is_here, new, old)
            for new, old in zip(results, (state.logprobs, state.entropy), strict=True)
        )
        slot_bar = jax.lax.dynamic_update_slice(state.slot_bar, bar, (begin, 0))
        return _State(slot_bar, table_bar, logprob, entropy)

    start = _State(
        slot_bar=jnp.zeros_like(rows.hidden),
        table_bar=jnp.zeros(local.table.shape, jnp.float32),
        logprobs=jnp.zeros(num_entries, jnp.float32),
        entropy=jnp.zeros(num_entries, jnp.float32),
    )
    made = jax.lax.fori_loop(0, (num_slots + size - 1) // size, step, start)
    return made._replace(slot_bar=made.slot_bar[:most_slots])


def _extra_logits(local: Local, axes: tuple[str, ...]) -> Float[Array, " K"]:
    """Target logits of the extra entries, of the whole vocabulary; 0 for others."""
    found = jnp.zeros(local.targets.shape[0], jnp.float32)
    if local.selection.extra_entry is None:
        return found
    found = extras.add_logits(found, local)
    return jax.lax.psum(found, axes) if axes else found


def _of_entries(
    local: Local, of_slot: Statistics, extra_logit: Float[Array, " K"], begin: Array
) -> tuple[Statistics, Array]:
    """Statistics of the entries of a block, 0 for others, and the mask of those entries.

    Args:
        local: the work of this device.
        of_slot: of the slots ``begin …``, of the whole vocabulary.
        extra_logit: of `_extra_logits`.
        begin: first slot of the block.
    """
    selection, size = local.selection, of_slot.log_normaliser.shape[0]
    slot = selection.entry_slot - begin
    is_here = local.is_here & (slot >= 0) & (slot < size)
    of_entry = jax.tree.map(lambda x: selection.to_entries(x, begin), of_slot)
    target_logit = jnp.where(selection.is_main, of_entry.target_logit, extra_logit)
    whole = of_entry._replace(target_logit=target_logit)
    return jax.tree.map(lambda x: jnp.where(is_here, x, 0.0), whole), is_here
