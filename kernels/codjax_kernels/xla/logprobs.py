"""The passes of `token_logprobs` in plain JAX, a chunk of rows at a time.

Logits exist for one chunk. The number of chunks follows `num_valid` at run time, so that padding
behind the last valid chunk costs nothing. Recomputing: 2 K D V multiply-adds forward and backward
3 products, 8 K D V in all; with the gradient made in the forward pass (`stored_…`), 6 K D V.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from codjax_kernels import cutting
from codjax_kernels.records import (
    KlGradient,
    LogitGradient,
    LogprobPasses,
    Rows,
    Statistics,
    Teacher,
    TeacherStatistics,
)

# Logits of fewer numbers than this (4 MiB) are made in one piece: a loop would only cost time.
SINGLE_CHUNK_LOGITS = 1 << 20

Carry = TypeVar("Carry")


@functools.cache
def passes(chunk_size: int) -> LogprobPasses:
    """The passes with at most `chunk_size` rows of logits at once."""
    return LogprobPasses(
        statistics=functools.partial(statistics, chunk_size=chunk_size),
        statistics_and_mean=None,  # no fewer products than `gradients`
        gradients=functools.partial(gradients, chunk_size=chunk_size),
        table_gradient=None,
        stored_statistics=stored_statistics,
        stored_gradients=stored_gradients,
        block_rows=chunk_size,
        kl_statistics=functools.partial(kl_statistics, chunk_size=chunk_size),
        kl_gradients=functools.partial(kl_gradients, chunk_size=chunk_size),
    )


def statistics(rows: Rows, table: Float[Array, "V D"], *, chunk_size: int) -> Statistics:
    """Target logit, log-normaliser and mean logit of every row."""
    chunk = _chunk_rows(rows, table, chunk_size)
    padded = cutting.padded(rows, _rounded(rows, chunk))

    def step(begin: Array, out: Statistics) -> Statistics:
        part, _ = stored_statistics(cutting.block_of(padded, begin, chunk), table)
        return jax.tree.map(
            lambda whole, new: jax.lax.dynamic_update_slice(whole, new, (begin,)),
            out,
            part,
        )

    out = Statistics(*[jnp.zeros(padded.hidden.shape[0], jnp.float32)] * 3)
    out = _over_chunks(rows, chunk, step, out)
    return jax.tree.map(lambda x: x[: rows.hidden.shape[0]], out)


def gradients(
    rows: Rows, table: Float[Array, "V D"], gradient: LogitGradient, *, chunk_size: int
) -> tuple[Float[Array, "K D"], Float[Array, "V D"]]:
    """Gradients of hidden states and table, the table's summed in float32."""
    chunk = _chunk_rows(rows, table, chunk_size)
    padded, padded_gradient = cutting.padded((rows, gradient), _rounded(rows, chunk))

    def step(begin: Array, bars: tuple[Array, Array]) -> tuple[Array, Array]:
        hidden_bars, total = bars
        part, part_gradient = cutting.block_of((padded, padded_gradient), begin, chunk)
        logits = _logits(part, table)
        hidden_bar, total = stored_gradients(part, table, logits, part_gradient, total)
        return jax.lax.dynamic_update_slice(hidden_bars, hidden_bar, (begin, 0)), total

    bars = (jnp.zeros_like(padded.hidden), jnp.zeros(table.shape, jnp.float32))
    hidden_bars, total = _over_chunks(rows, chunk, step, bars)
    return hidden_bars[: rows.hidden.shape[0]], total.astype(table.dtype)


def stored_statistics(
    rows: Rows, table: Float[Array, "V D"]
) -> tuple[Statistics, Float[Array, "K V"]]:
    """Statistics and the logits they come from, float32, all rows at once."""
    logits = _logits(rows, table)
    highest = jnp.max(logits, axis=-1)
    shifted = logits - highest[:, None]
    exp = jnp.exp(shifted)
    total = jnp.sum(exp, axis=-1)
    # A gather would do, but the comparison fuses.
    of_target = jnp.sum(jnp.where(_is_target(rows, logits), logits, 0.0), axis=-1)
    made = Statistics(
        target_logit=of_target,
        log_normaliser=highest + jnp.log(total),
        mean_logit=highest + jnp.sum(exp * shifted, axis=-1) / total,
    )
    return made, logits


def stored_gradients(
    rows: Rows,
    table: Float[Array, "V D"],
    stored: Float[Array, "K V"],
    gradient: LogitGradient,
    total: Float[Array, "V D"],
) -> tuple[Float[Array, "K D"], Float[Array, "V D"]]:
    """Gradient of the hidden states, and `total` with that of the table, from the logits."""
    of_all = gradient.of_all[:, None]
    if gradient.of_logit is not None:
        of_all = of_all + gradient.of_logit[:, None] * stored
    of_target = jnp.where(_is_target(rows, stored), gradient.of_target[:, None], 0.0)
    bar = jnp.exp(stored - gradient.log_normaliser[:, None]) * of_all + of_target
    return _bars(rows, table, bar, total)


def kl_statistics(
    rows: Rows, table: Float[Array, "V D"], teacher: Teacher, *, chunk_size: int
) -> tuple[Statistics, TeacherStatistics]:
    """Statistics of the student and of the teacher, a chunk of rows at a time."""
    chunk = _chunk_rows(rows, table, chunk_size)
    num_rows = rows.hidden.shape[0]
    padded, hidden = cutting.padded((rows, teacher.hidden), _rounded(rows, chunk))

    def step(begin: Array, out: tuple[Statistics, TeacherStatistics]) -> Any:
        part, part_hidden = cutting.block_of((padded, hidden), begin, chunk)
        student, logits = stored_statistics(part, table)
        of_teacher = _logits(part._replace(hidden=part_hidden), teacher.table)
        probabilities = jnp.exp(logits - student.log_normaliser[:, None])
        other = TeacherStatistics(
            log_normaliser=jax.nn.logsumexp(of_teacher, axis=-1),
            mean_logit=jnp.sum(probabilities * of_teacher, axis=-1),
        )
        return jax.tree.map(
            lambda whole, new: jax.lax.dynamic_update_slice(whole, new, (begin,)),
            out,
            (student, other),
        )

    zero = jnp.zeros(padded.hidden.shape[0], jnp.float32)
    start = (Statistics(zero, zero, zero), TeacherStatistics(zero, zero))
    return jax.tree.map(lambda x: x[:num_rows], _over_chunks(rows, chunk, step, start))


def kl_gradients(
    rows: Rows,
    table: Float[Array, "V D"],
    teacher: Teacher,
    gradient: KlGradient,
    *,
    chunk_size: int,
) -> tuple[Float[Array, "K D"], Float[Array, "V D"]]:
    """Gradients of the student's hidden states and table."""
    chunk = _chunk_rows(rows, table, chunk_size)
    padded = cutting.padded((rows, teacher.hidden, gradient), _rounded(rows, chunk))

    def step(begin: Array, bars: tuple[Array, Array]) -> tuple[Array, Array]:
        hidden_bars, total = bars
        part, part_hidden, of = cutting.block_of(padded, begin, chunk)
        logits = _logits(part, table)
        of_teacher = _logits(part._replace(hidden=part_hidden), teacher.table)
        logprobs = logits - of.log_normaliser[:, None]
        difference = logprobs - (of_teacher - of.teacher_log_normaliser[:, None])
        bar = jnp.exp(logprobs) * (difference - of.kl[:, None]) * of.cotangent[:, None]
        hidden_bar, total = _bars(part, table, bar, total)
        return jax.lax.dynamic_update_slice(hidden_bars, hidden_bar, (begin, 0)), total

    bars = (jnp.zeros_like(padded[0].hidden), jnp.zeros(table.shape, jnp.float32))
    hidden_bars, total = _over_chunks(rows, chunk, step, bars)
    return hidden_bars[: rows.hidden.shape[0]], total.astype(table.dtype)


def _bars(
    rows: Rows, table: Float[Array, "V D"], bar: Float[Array, "K V"], total: Float[Array, "V D"]
) -> tuple[Float[Array, "K D"], Float[Array, "V D"]]:
    """Gradient of the hidden states, and `total` with the table's, from that of the logits."""
    if rows.inverse_temperature is not None:
        bar = bar * rows.inverse_temperature[:, None]
    hidden = rows.hidden
    if rows.num_valid is not None:  # padding may hold anything, nan included
        is_valid = (jnp.arange(hidden.shape[0]) < rows.num_valid)[:, None]
        bar, hidden = jnp.where(is_valid, bar, 0.0), jnp.where(is_valid, hidden, 0)
    bar = bar.astype(hidden.dtype)  # matrix units take both sides alike
    hidden_bar = jnp.einsum("kv,vd->kd", bar, table, preferred_element_type=jnp.float32)
    table_bar = jnp.einsum("kv,kd->vd", bar, hidden, preferred_element_type=jnp.float32)
    return hidden_bar.astype(hidden.dtype), total + table_bar


def _logits(rows: Rows, table: Float[Array, "V D"]) -> Float[Array, "K V"]:
    products = jnp.einsum("kd,vd->kv", rows.hidden, table, preferred_element_type=jnp.float32)
    if rows.inverse_temperature is None:
        return products
    return products * rows.inverse_temperature[:, None]


def _is_target(rows: Rows, logits: Float[Array, "K V"]) -> Array:
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    return ids == rows.targets[:, None]


def _chunk_rows(rows: Rows, table: Array, chunk_size: int) -> int:
    num_rows = rows.hidden.shape[0]
    if num_rows * table.shape[0] <= SINGLE_CHUNK_LOGITS:
        return num_rows
    return min(math.ceil(num_rows / math.ceil(num_rows / chunk_size)), num_rows)


def _rounded(rows: Rows, chunk: int) -> int:
    return math.ceil(rows.hidden.shape[0] / chunk) * chunk


def _over_chunks(
    rows: Rows, chunk: int, step: Callable[[Array, Carry], Carry], carry: Carry
) -> Carry:
    """`step(begin, carry)` for every chunk that holds a valid row."""
    num_rows = rows.hidden.shape[0]
    if rows.num_valid is None:
        num_chunks: Any = math.ceil(num_rows / chunk)
    else:
        num_chunks = (jnp.minimum(rows.num_valid, num_rows) + chunk - 1) // chunk
    return jax.lax.fori_loop(0, num_chunks, lambda i, carry: step(i * chunk, carry), carry)
