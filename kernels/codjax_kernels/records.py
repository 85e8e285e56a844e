"""The records that pass between the shared mathematics and its implementations.

`logprobs.py` owns the mathematics of `token_logprobs`: derivatives, reductions over a sharded
vocabulary, several targets of one source. An implementation (`xla/`, `tpu/`, `gpu/`) is a handful
of *passes* over local arrays: plain functions that know nothing of automatic differentiation or
of other devices. Shapes are in the letters of `ops.py`.

Notation. ``z_v = inverse_temperature * (h . W_v)`` are the scaled logits of a row,
``l = log sum_v exp(z_v)`` its log-normaliser, ``p_v = exp(z_v - l)``, ``y`` its target.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int


class Layout(NamedTuple):
    """How the arrays of an operation lie on a mesh: the mesh axes that cut each dimension.

    A mesh axis named nowhere holds copies. Sizes must divide.
    """

    mesh: jax.sharding.Mesh
    rows: tuple[str, ...] = ()  # B
    tokens: tuple[str, ...] = ()  # T: the context of long rows
    heads: tuple[str, ...] = ()  # N and M
    vocab: tuple[str, ...] = ()  # V
    width: tuple[str, ...] = ()  # D of the table as it is stored; it is gathered for use


class Rows(NamedTuple):
    """Hidden states to be projected, and what belongs to each."""

    hidden: Float[Array, "K D"]  # float32 or bfloat16, as the table
    targets: Int[Array, " K"]  # row of the table at hand, or -1: it is in another shard
    inverse_temperature: Float[Array, " K"] | None  # None: 1
    num_valid: Int[Array, ""] | None  # rows from here on are padding; None: all count


class Statistics(NamedTuple):
    """What one pass over the table at hand says of each row, float32.

    Of padding rows the values are unspecified.
    """

    target_logit: Float[Array, " K"]  # z_y, or 0 where the target is in another shard
    log_normaliser: Float[Array, " K"]  # l, of this table
    mean_logit: Float[Array, " K"]  # sum_v p_v z_v, so that entropy = l - mean


class LogitGradient(NamedTuple):
    """Derivative of the loss by the scaled logits.

    It is ``p_v (of_all + of_logit z_v) + [v = y] of_target``; all float32.
    """

    log_normaliser: Float[Array, " K"]  # of the whole vocabulary, of which the table may be a part
    of_target: Float[Array, " K"]
    of_all: Float[Array, " K"]
    of_logit: Float[Array, " K"] | None  # None: 0, when no gradient flows through the entropy


class Teacher(NamedTuple):
    """A second distribution over the same vocabulary; z' are its scaled logits."""

    hidden: Float[Array, "K E"]  # of the dtype of the student's, of any width
    table: Float[Array, "V E"]


class TeacherStatistics(NamedTuple):
    """What a pass says of the teacher, float32."""

    log_normaliser: Float[Array, " K"]  # l' = log sum_v exp(z'_v)
    mean_logit: Float[Array, " K"]  # sum_v p_v z'_v, with p of the student


class KlGradient(NamedTuple):
    """Derivative of the loss by the student's logits, ``p_v cotangent (z_v - l - z'_v + l' - kl)``.

    All float32.
    """

    cotangent: Float[Array, " K"]
    kl: Float[Array, " K"]
    log_normaliser: Float[Array, " K"]  # l
    teacher_log_normaliser: Float[Array, " K"]  # l'


class LogprobPasses(NamedTuple):
    """The passes of one implementation; `table` is `[V D]`, of the dtype of the hidden states.

    Attributes:
        statistics: ``(rows, table) -> Statistics``.
        statistics_and_mean: ``(rows, table) -> (Statistics, others [K D])`` with
            ``others = sum_{v != y} p_v W_v``, p of this table, in the dtype of the hidden states;
            None where `gradients` is the better way.
        gradients: ``(rows, table, gradient) -> (hidden_bar [K D], table_bar [V D])`` in the dtypes
            of their primals, logits computed again.
        table_gradient: ``(rows, table, gradient) -> table_bar``, the same without `hidden_bar`;
            there where `statistics_and_mean` is.
        stored_statistics: ``(rows, table) -> (Statistics, stored)``: also keeps what the backward
            pass needs of every logit; None where the implementation cannot.
        stored_gradients: ``(rows, table, stored, gradient, total) -> (hidden_bar, new total)``,
            the table's gradient added to `total` `[V D]` float32: no logit is computed again.
        block_rows: rows whose logits `stored_statistics` is to keep at once; 0 without it.
        kl_statistics: ``(rows, table, teacher) -> (Statistics, TeacherStatistics)``, the targets of
            the rows unused; None where the implementation has no divergences.
        kl_gradients: ``(rows, table, teacher, gradient) -> (hidden_bar, table_bar)``.
    """

    statistics: Callable[[Rows, Array], Statistics]
    statistics_and_mean: Callable[[Rows, Array], tuple[Statistics, Array]] | None
    gradients: Callable[[Rows, Array, LogitGradient], tuple[Array, Array]]
    table_gradient: Callable[[Rows, Array, LogitGradient], Array] | None
    stored_statistics: Callable[[Rows, Array], tuple[Statistics, Any]] | None
    stored_gradients: Callable[[Rows, Array, Any, LogitGradient, Array], tuple[Array, Array]] | None
    block_rows: int
    kl_statistics: Callable[[Rows, Array, Teacher], tuple[Statistics, TeacherStatistics]] | None = (
        None
    )
    kl_gradients: Callable[[Rows, Array, Teacher, KlGradient], tuple[Array, Array]] | None = None
