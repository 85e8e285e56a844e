"""Passes of `token_logprobs` on a Hopper GPU: statistics, and gradients that compute logits again.

`statistics`: a thread block owns 128 rows and a span of the vocabulary, and keeps a running
maximum, sum of exponentials, mean logit and target logit of each row; spans are joined after.
2 K D V operations; O(K) written.

`gradients`: an accumulator of [rows D] fits neither registers nor shared memory (1 MiB for 64
rows at D 4,096), and thread blocks that share D out would each compute all logits again. So, a
slice of the vocabulary at a time, the derivative by the logits is computed once and stored in
bfloat16 (STAGED_LOGITS of them, or MINIMUM_SLICE a row); two plain products read it. Times the
slice of the table it is a part of the hidden gradient; transposed, times the hidden states, it is
the gradient of the slice. 6 K D V operations. To store and read derivatives and to add up [K D]
takes ``6 + 16 D / slice`` bytes a logit for ``6 D`` operations: 14 bytes for 24,576 at D 4,096
and a slice of 8,192, where an H100 balances at 295 operations a byte.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float

from codjax_kernels.gpu import logprob_kernels as kernels
from codjax_kernels.gpu import target
from codjax_kernels.gpu.logprob_kernels import LOG2_E, PaddedRows
from codjax_kernels.gpu.products import ROWS, STEP
from codjax_kernels.records import LogitGradient, LogprobPasses, Rows, Statistics

STAGED_LOGITS = 1 << 27  # derivatives stored at once: 256 MiB
MINIMUM_SLICE = 2048  # of the vocabulary; below it, adding up [K D] would cost most

Sums = tuple[Array, Array]  # float32 [K D] of the hidden states, and [V D] of the table


@functools.cache
def passes(interpret: Any) -> LogprobPasses:
    """The passes, run on a GPU, or with True or `InterpretGPUParams` on a CPU."""
    return LogprobPasses(
        statistics=functools.partial(statistics, interpret=interpret),
        statistics_and_mean=None,  # no fewer products than `gradients`, which keeps derivatives
        gradients=functools.partial(gradients, interpret=interpret),
        table_gradient=None,
        stored_statistics=None,
        stored_gradients=None,
        block_rows=0,
    )


def statistics(rows: Rows, table: Float[Array, "V D"], *, interpret: Any = False) -> Statistics:
    """Target logit, log-normaliser and mean logit of each row, float32.

    Args:
        rows: hidden states [K D], bfloat16 with D a multiple of 64, and what belongs to them.
        table: bfloat16.
        interpret: True or `plgpu.InterpretGPUParams` to run on a CPU.

    Raises:
        ValueError: jax is too old, or operands that the kernels do not take.
    """
    _check(rows, table)
    num_rows = len(rows.targets)
    parts = kernels.statistics_of_spans(
        _whole_blocks(rows), _lengthen(table, 8), vocab_size=len(table), interpret=interpret
    )
    maximum, total, weighted, target_logit = parts[..., :num_rows]
    largest = jnp.max(maximum, axis=0)
    weight = jnp.exp2(maximum - largest[None])
    total = jnp.sum(total * weight, axis=0)
    return Statistics(
        target_logit=jnp.sum(target_logit, axis=0) / LOG2_E,
        log_normaliser=(largest + jnp.log2(total)) / LOG2_E,
        mean_logit=jnp.sum(weighted * weight, axis=0) / (total * LOG2_E),
    )


def gradients(
    rows: Rows,
    table: Float[Array, "V D"],
    gradient: LogitGradient,
    *,
    interpret: Any = False,
) -> tuple[Float[Array, "K D"], Float[Array, "V D"]]:
    """Gradients of the hidden states and of the table, bfloat16, summed in float32.

    Args:
        rows: as in `statistics`.
        table: as in `statistics`.
        gradient: the derivative of the loss by the scaled logits.
        interpret: as in `statistics`.

    Raises:
        ValueError: as in `statistics`.
    """
    _check(rows, table)
    num_rows, vocab_size = len(rows.targets), len(table)
    counts = jnp.arange(num_rows) < (num_rows if rows.num_valid is None else rows.num_valid)
    # Padding may hold anything, and its derivative of 0 times nan would be nan.
    padded = _whole_blocks(rows._replace(hidden=jnp.where(counts[:, None], rows.hidden, 0)))
    factors = _factors(rows, gradient, counts)
    whole_table = _lengthen(table, 8)
    length, num_slices = _slices(len(padded.hidden), vocab_size)

    def add_slice(index: Any, sums: Sums, end: int | None = None) -> Sums:
        hidden_sum, table_bar = sums
        first = jnp.reshape(jnp.asarray(index * length, jnp.int32), (1,))
        derivatives = kernels.derivatives(
            padded,
            whole_table,
            factors,
            first,
            vocab_size=vocab_size,
            length=length,
            interpret=interpret,
        )
        hidden_sum = hidden_sum + kernels.times_table(
            derivatives, whole_table, first, padded.num_valid, interpret=interpret
        )
        part = kernels.times_hidden(derivatives, padded, interpret=interpret)[:end]
        return hidden_sum, lax.dynamic_update_slice_in_dim(table_bar, part, first[0], axis=0)

    sums: Sums = (jnp.zeros(padded.hidden.shape, jnp.float32), jnp.zeros_like(table))
    last = num_slices - 1
    if last:
        sums = lax.fori_loop(0, last, add_slice, sums)
    hidden_sum, table_bar = add_slice(last, sums, vocab_size - last * length)
    return hidden_sum[:num_rows].astype(rows.hidden.dtype), table_bar


def _check(rows: Rows, table: Array) -> None:
    """Raise for what the kernels do not take.

    Raises:
        ValueError: jax is too old, operands are not bfloat16, or D is no multiple of 64.
    """
    target.require_jax()
    if {rows.hidden.dtype, table.dtype} != {jnp.dtype(jnp.bfloat16)}:
        raise ValueError(
            "implementation 'pallas_gpu' takes bfloat16 operands; got hidden "
            f"{rows.hidden.dtype} and unembedding {table.dtype}: use implementation 'xla'."
        )
    if table.shape[1] % STEP:
        raise ValueError(
            f"implementation 'pallas_gpu' takes a model width that {STEP} divides; got "
            f"{table.shape[1]}: use implementation 'xla'."
        )


def _whole_blocks(rows: Rows) -> PaddedRows:
    """The rows with padding behind them, up to whole tiles."""
    num_rows = len(rows.targets)
    if rows.inverse_temperature is None:
        scale = jnp.full(num_rows, LOG2_E, jnp.float32)
    else:
        scale = rows.inverse_temperature.astype(jnp.float32) * LOG2_E
    num_valid = num_rows if rows.num_valid is None else jnp.minimum(rows.num_valid, num_rows)
    return PaddedRows(
        hidden=_lengthen(rows.hidden, ROWS),
        targets=_lengthen(rows.targets, ROWS),
        scale=_lengthen(scale, ROWS),
        num_valid=jnp.reshape(jnp.asarray(num_valid, jnp.int32), (1,)),
    )


def _lengthen(array: Array, multiple: int) -> Array:
    """The array with zeros behind it, up to a multiple of this length."""
    missing = -len(array) % multiple
    return jnp.pad(array, ((0, missing), *((0, 0),) * (array.ndim - 1))) if missing else array


def _slices(num_rows: int, vocab_size: int) -> tuple[int, int]:
    """Length of a slice of the vocabulary, in whole thread blocks, and how many there are."""
    longest = max(MINIMUM_SLICE, STAGED_LOGITS // num_rows)
    shortest = pl.cdiv(vocab_size, pl.cdiv(vocab_size, longest))
    length = pl.cdiv(shortest, kernels.SLICE_UNIT) * kernels.SLICE_UNIT
    return length, pl.cdiv(vocab_size, length)


def _factors(rows: Rows, gradient: LogitGradient, counts: Bool[Array, " K"]) -> Float[Array, "4 P"]:
    """What `kernels.derivatives` takes of each row; zeros for padding make its derivative 0."""
    inverse_temperature = rows.inverse_temperature
    if inverse_temperature is None:
        inverse_temperature = jnp.ones_like(gradient.of_target)
    of_logit = 0.0 if gradient.of_logit is None else gradient.of_logit / LOG2_E
    of_raw = jnp.stack(jnp.broadcast_arrays(gradient.of_target, gradient.of_all, of_logit))
    factors = jnp.stack([gradient.log_normaliser * LOG2_E, *(of_raw * inverse_temperature[None])])
    return _lengthen(jnp.where(counts[None], factors, 0.0).T, ROWS).T
