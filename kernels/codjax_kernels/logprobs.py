"""Log-probs and entropies of scored entries: what every implementation shares.

    scored → select slots → pass over the table at hand → reduce over the mesh → per entry

For an entry with source row h and target y, with ``z_v = (h . W_v) / temperature``,
``l = log sum_v exp(z_v)``, ``p_v = exp(z_v - l)`` and the mean logit ``c = sum_v p_v z_v``:

    logprob = z_y - l         d logprob / d z_v = [v = y] - p_v
    entropy = l - c           d entropy / d z_v = -p_v (z_v - c)

so that with cotangents g of the logprob and e of the entropy

    dz_v = p_v (a + b z_v) + g [v = y],    a = -g + e c,    b = -e;

over the targets of one source g and a add up. Kept between the two passes: l and c of every
entry; logits are computed again. Where the entropy has no gradient, an implementation may keep
``sum_{v != y} p_v W_v`` of every row instead (`LogprobPasses`).

On a mesh (`Layout`), each device projects the sources that lie on it onto the part of the
vocabulary that it holds. Forward then costs one max and one sum of O(K), backward one sum of
`[K D]` (and that of the table's gradient over the devices that hold copies). The two passes are
two `shard_map`s inside one custom VJP, so that nothing else is ever reduced.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from codjax_kernels import extras
from codjax_kernels.mesh import (
    Scored,
    Specs,
    localise,
    on_mesh,
    reduce_statistics,
    reduce_table,
    reduced_axes,
)
from codjax_kernels.records import Layout, LogitGradient, LogprobPasses, Rows, Statistics
from codjax_kernels.selection import Local, slot_rows, to_hidden

_NOWHERE = -1e30  # log-normaliser of no logit at all; finite, so that nothing becomes nan


class Setting(NamedTuple):
    """What is known when a program is traced."""

    passes: LogprobPasses
    layout: Layout | None
    entropy_gradient: bool


class Saved(NamedTuple):
    """What the forward pass keeps: per entry, and for each slot of each device."""

    log_normaliser: Float[Array, "B K"]
    mean_logit: Float[Array, "B K"]
    logprobs: Float[Array, "B K"]
    others: Float[Array, "parts slots D"] | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scored_logprobs(
    setting: Setting, hidden: Float[Array, "B T D"], table: Float[Array, "V D"], scored: Scored
) -> tuple[Float[Array, "B K"], Float[Array, "B K"]]:
    """See `codjax_kernels.scored_logprobs`."""
    saved = _sharded_forward(setting, hidden, table, scored, keeps_mean=False)
    return saved.logprobs, _entropy(saved)


def _scored_forward(
    setting: Setting, hidden: Array, table: Array, scored: Scored
) -> tuple[tuple[Array, Array], tuple[Any, ...]]:
    keeps_mean = setting.passes.statistics_and_mean is not None and not setting.entropy_gradient
    saved = _sharded_forward(setting, hidden, table, scored, keeps_mean=keeps_mean)
    return (saved.logprobs, _entropy(saved)), (hidden, table, scored, saved)


def _scored_backward(
    setting: Setting, residuals: tuple[Any, ...], cotangents: tuple[Array, Array]
) -> tuple[Array, Array, None]:
    hidden, table, scored, saved = residuals
    specs = Specs.of(setting.layout)

    def backward(hidden, table, scored, saved, cotangents):  # type: ignore[no-untyped-def]
        local = localise(setting.layout, hidden, table, scored)
        hidden_bar, table_bar = _backward_local(setting, local, saved, cotangents)
        return hidden_bar.reshape(hidden.shape), reduce_table(setting.layout, table_bar)

    run = on_mesh(
        setting.layout,
        backward,
        (specs.hidden, specs.table, specs.entry, _saved_specs(specs, saved.others), specs.entry),
        (specs.hidden, specs.table),
    )
    hidden_bar, table_bar = run(hidden, table, scored, saved, cotangents)
    return hidden_bar, table_bar, None


scored_logprobs.defvjp(_scored_forward, _scored_backward)


def logprob_and_entropy(whole: Statistics) -> tuple[Array, Array]:
    """The results, within their bounds.

    A log-prob may come out 1e-6 above 0, since the target's logit and the normaliser are rounded
    apart. The bounds cost no gradient: the backward pass does not see them.
    """
    logprob = jnp.minimum(whole.target_logit - whole.log_normaliser, 0.0)
    return logprob, jnp.maximum(whole.log_normaliser - whole.mean_logit, 0.0)


def _entropy(saved: Saved) -> Array:
    return jnp.maximum(saved.log_normaliser - saved.mean_logit, 0.0)


def _sharded_forward(
    setting: Setting, hidden: Array, table: Array, scored: Scored, *, keeps_mean: bool
) -> Saved:
    specs = Specs.of(setting.layout)

    def forward(hidden, table, scored):  # type: ignore[no-untyped-def]
        local = localise(setting.layout, hidden, table, scored)
        return _forward_local(setting, local, scored.target.shape, keeps_mean=keeps_mean)

    in_specs = (specs.hidden, specs.table, specs.entry)
    run = on_mesh(setting.layout, forward, in_specs, _saved_specs(specs, keeps_mean or None))
    return run(hidden, table, scored)


def _saved_specs(specs: Specs, others: object | None) -> Any:
    """The partition of every field that is there."""
    parts: Any = None if others is None else specs.parts
    entry: Any = specs.entry
    return Saved(log_normaliser=entry, mean_logit=entry, logprobs=entry, others=parts)


def _entry_statistics(local: Local, part: Statistics, axes: tuple[str, ...]) -> Statistics:
    """Statistics of the entries, from those of all slots by the table at hand.

    They are put together over the mesh axes `axes`; 0 where no device has the entry.
    """
    selection = local.selection
    of_entry = jax.tree.map(lambda x: selection.to_entries(x, 0), part)
    target_logit = jnp.where(selection.is_main, of_entry.target_logit, 0.0)
    target_logit = extras.add_logits(target_logit, local)
    of_entry = Statistics(
        target_logit=jnp.where(local.is_here, target_logit, 0.0),
        log_normaliser=jnp.where(local.is_here, of_entry.log_normaliser, _NOWHERE),
        mean_logit=jnp.where(local.is_here, of_entry.mean_logit, 0.0),
    )
    whole = reduce_statistics(axes, of_entry)
    is_nowhere = whole.log_normaliser <= _NOWHERE / 2
    return jax.tree.map(lambda x: jnp.where(is_nowhere, 0.0, x), whole)


def logit_gradient(
    local: Local,
    whole: Statistics,
    logprob_bar: Float[Array, " K"],
    entropy_bar: Float[Array, " K"] | None,
) -> LogitGradient:
    """Derivative by the logits of every slot, from the cotangents of its entries (0 elsewhere)."""
    selection = local.selection
    of_all = -logprob_bar
    if entropy_bar is not None:
        of_all = of_all + entropy_bar * whole.mean_logit
    return LogitGradient(
        log_normaliser=selection.to_slots(whole.log_normaliser),
        of_target=selection.to_slots(logprob_bar),
        of_all=selection.sum_to_slots(of_all),
        of_logit=None if entropy_bar is None else selection.sum_to_slots(-entropy_bar),
    )


def _forward_local(
    setting: Setting, local: Local, shape: tuple[int, int], *, keeps_mean: bool
) -> Saved:
    rows, selection = slot_rows(local), local.selection
    others = None
    if keeps_mean:
        assert setting.passes.statistics_and_mean is not None
        part, others = setting.passes.statistics_and_mean(rows, local.table)
    else:
        part = setting.passes.statistics(rows, local.table)
    whole = _entry_statistics(local, part, reduced_axes(setting.layout))
    if others is not None:
        share = jnp.exp(part.log_normaliser - selection.to_slots(whole.log_normaliser))
        others = (others * share[:, None]).astype(others.dtype)[None]
    logprobs, _ = logprob_and_entropy(whole)
    return Saved(
        log_normaliser=whole.log_normaliser.reshape(shape),
        mean_logit=whole.mean_logit.reshape(shape),
        logprobs=logprobs.reshape(shape),
        others=others,
    )


def _backward_local(
    setting: Setting, local: Local, saved: Saved, cotangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    flat = functools.partial(jnp.reshape, shape=(-1,))
    logprob_bar, entropy_bar = (jnp.where(local.is_here, flat(bar), 0.0) for bar in cotangents)
    rows = slot_rows(local)
    whole = Statistics(jnp.zeros(()), flat(saved.log_normaliser), flat(saved.mean_logit))
    gradient = logit_gradient(
        local, whole, logprob_bar, entropy_bar if setting.entropy_gradient else None
    )
    if saved.others is None:
        slot_bar, table_bar = setting.passes.gradients(rows, local.table, gradient)
    else:
        assert setting.passes.table_gradient is not None
        table_bar = setting.passes.table_gradient(rows, local.table, gradient)
        others = saved.others.reshape(rows.hidden.shape)
        slot_logprobs = local.selection.to_slots(flat(saved.logprobs))
        slot_bar = _hidden_gradient(rows, local.table, gradient, slot_logprobs, others)
    slot_bar, table_bar = extras.add_gradients(slot_bar, table_bar, local, logprob_bar)
    if setting.layout is not None and setting.layout.vocab:
        slot_bar = jax.lax.psum(slot_bar, setting.layout.vocab)
    return to_hidden(local, slot_bar), table_bar


def _hidden_gradient(
    rows: Rows, table: Array, gradient: LogitGradient, logprobs: Array, others: Array
) -> Float[Array, "K D"]:
    """``a sum_v p_v W_v + g W_y`` from the mean row without the target's share.

    The factor of W_y is ``g + a p_y``, written so that nothing cancels where p_y is close to 1:
    with one target g + a is exactly 0.
    """
    factor = gradient.of_target + gradient.of_all + gradient.of_all * jnp.expm1(logprobs)
    factor = jnp.where(rows.targets >= 0, factor, 0.0)
    of_target = table[jnp.maximum(rows.targets, 0)].astype(jnp.float32)
    bar = gradient.of_all[:, None] * others + factor[:, None] * of_target
    if rows.inverse_temperature is not None:
        bar = bar * rows.inverse_temperature[:, None]
    return bar.astype(others.dtype)
