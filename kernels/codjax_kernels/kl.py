"""The divergence of a student from a teacher over the whole vocabulary, without their logits.

With ``z`` and ``z'`` the scaled logits of student and teacher, ``l`` and ``l'`` their
log-normalisers, and ``p = exp(z - l)``:

    KL(student || teacher) = sum_v p_v ((z_v - l) - (z'_v - l')) = (c - l) - (c' - l')

with ``c = sum_v p_v z_v`` and ``c' = sum_v p_v z'_v``, all of which one pass over the two streams
of tables collects. The derivative by ``z_v`` is ``p_v ((z_v - l) - (z'_v - l') - KL)``; a second
pass makes both logits again. Nothing flows to the teacher.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from codjax_kernels.records import KlGradient, LogprobPasses, Rows, Teacher


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def divergence(
    passes: LogprobPasses, rows: Rows, table: Float[Array, "V D"], teacher: Teacher
) -> Float[Array, " K"]:
    """See `codjax_kernels.token_kl`."""
    return _forward(passes, rows, table, teacher)[0]


def _forward(
    passes: LogprobPasses, rows: Rows, table: Array, teacher: Teacher
) -> tuple[Array, tuple[Any, ...]]:
    assert passes.kl_statistics is not None
    student, other = passes.kl_statistics(rows, table, teacher)
    kl = (student.mean_logit - student.log_normaliser) - (other.mean_logit - other.log_normaliser)
    # Rounding may make it -1e-6 where the two agree; the bound costs no gradient.
    kl = jnp.maximum(kl, 0.0)
    if rows.num_valid is not None:
        kl = jnp.where(jnp.arange(kl.shape[0]) < rows.num_valid, kl, 0.0)
    return kl, (rows, table, teacher, kl, student.log_normaliser, other.log_normaliser)


def _backward(
    passes: LogprobPasses, residuals: tuple[Any, ...], cotangent: Array
) -> tuple[Rows, Array, None]:
    rows, table, teacher, kl, log_normaliser, teacher_log_normaliser = residuals
    assert passes.kl_gradients is not None
    gradient = KlGradient(cotangent, kl, log_normaliser, teacher_log_normaliser)
    hidden_bar, table_bar = passes.kl_gradients(rows, table, teacher, gradient)
    if rows.num_valid is not None:
        is_valid = jnp.arange(kl.shape[0]) < rows.num_valid
        hidden_bar = jnp.where(is_valid[:, None], hidden_bar, 0)
    return Rows(hidden_bar, None, None, None), table_bar, None  # type: ignore[arg-type]


divergence.defvjp(_forward, _backward)
