"""The programs that `codjax bench kernels` compiles: the vocabulary head and attention.

    forward:    (hidden, table, targets) -> (log-probs, entropies)
    training:   `Training` -> (gradient of hidden, gradient of table)
    attention:  (q, k, v) -> out, and `AttentionTraining` -> (out, gradients of q, k and v)

The training loss is PPO's clipped objective, whose derivative by a log-prob depends on that
log-prob alone. Every function is one of a module and takes what distinguishes it as keyword
arguments, so that a `functools.partial` of it can be sent to another process. Targets are picked
by comparison, not by a gather, which the simulator of the TPU compiler cannot do; hence a program
that needs the table's rows of the targets is given them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import codjax_kernels
import jax
import jax.numpy as jnp
from codjax_kernels import dispatch
from codjax_kernels.records import LogitGradient, LogprobPasses, Rows, Statistics
from codjax_kernels.tpu import blocks
from jaxtyping import Array, Float, Int

_CHUNK_SIZE = 512  # of our XLA implementation, as by default
_OURS = "pallas_tpu"
_MIB = 2**20

Scores = Callable[[Array, Array, Array], tuple[Array, Array | None]]  # a forward program


class Training(NamedTuple):
    """Arguments of a training program."""

    hidden: Float[Array, "K D"]
    table: Float[Array, "V D"]
    targets: Int[Array, " K"]
    target_rows: Float[Array, "K D"]  # table[targets]
    advantages: Float[Array, " K"]
    old_logprobs: Float[Array, " K"]


def training_shapes(num_entries: int, width: int, vocab: int) -> Training:
    """Shapes of K entries, width D and vocabulary V, in bfloat16."""
    rows = shape(num_entries, width, dtype=jnp.bfloat16)
    return Training(
        hidden=rows,
        table=shape(vocab, width, dtype=jnp.bfloat16),
        targets=shape(num_entries, dtype=jnp.int32),
        target_rows=rows,
        advantages=shape(num_entries),
        old_logprobs=shape(num_entries),
    )


def policy_loss(logprobs: Array, advantages: Array, old_logprobs: Array) -> Float[Array, ""]:
    """PPO's clipped objective, summed and negated."""
    ratio = jnp.exp(logprobs - old_logprobs)
    clipped = jnp.clip(ratio, 0.8, 1.2)
    return -jnp.sum(jnp.minimum(ratio * advantages, clipped * advantages))


def whole_logits(hidden: Array, table: Array, targets: Array) -> tuple[Array, Array]:
    """The forward pass that one would write first: all logits at once, in float32."""
    logits = jnp.einsum("kd,vd->kv", hidden, table, preferred_element_type=jnp.float32)
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    is_target = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) == targets[:, None]
    logprobs = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1) - normaliser
    probabilities = jnp.exp(logits - normaliser[:, None])
    return logprobs, normaliser - jnp.sum(probabilities * logits, axis=-1)


def rematerialised_chunks(
    hidden: Array, table: Array, targets: Array, *, chunk_size: int
) -> tuple[Array, Array]:
    """The forward pass of Tunix and MaxText: a scan over chunks, recomputed when differentiated."""

    @jax.checkpoint
    def score(chunk: tuple[Array, Array]) -> tuple[Array, Array]:
        return whole_logits(chunk[0], table, chunk[1])

    chunks = (hidden.reshape(-1, chunk_size, hidden.shape[1]), targets.reshape(-1, chunk_size))
    logprobs, entropy = jax.lax.map(score, chunks)
    return logprobs.reshape(-1), entropy.reshape(-1)


def differentiated(given: Training, *, scores: Scores) -> tuple[Array, Array]:
    """Training by automatic differentiation of a forward program."""

    def loss(hidden: Array, table: Array) -> Array:
        logprobs, _ = scores(hidden, table, given.targets)
        return policy_loss(logprobs, given.advantages, given.old_logprobs)

    return jax.grad(loss, argnums=(0, 1))(given.hidden, given.table)


def by_statistics(
    hidden: Array, table: Array, targets: Array, *, implementation: str
) -> tuple[Array, Array]:
    """The forward pass of an implementation of ours."""
    passes = _passes(implementation)
    return _results(passes.statistics(Rows(hidden, targets, None, None), table))


def recomputed_with_mean(given: Training, *, implementation: str) -> tuple[Array, Array]:
    """Training by `statistics_and_mean` and `table_gradient`: 4 matrix products."""
    passes = _passes(implementation)
    rows = Rows(given.hidden, given.targets, None, None)
    assert passes.statistics_and_mean is not None
    statistics, others = passes.statistics_and_mean(rows, given.table)
    gradient = _loss_gradient(statistics, given)
    assert passes.table_gradient is not None
    table_bar = passes.table_gradient(rows, given.table, gradient)
    of_target = gradient.of_all * jnp.expm1(_results(statistics)[0])
    hidden_bar = gradient.of_all[:, None] * others + of_target[:, None] * given.target_rows
    return hidden_bar.astype(given.hidden.dtype), table_bar


def recomputed(
    given: Training, *, implementation: str, entropy_coefficient: float = 0.0
) -> tuple[Array, Array]:
    """Training by `statistics` and `gradients`, which makes the logits again."""
    passes = _passes(implementation)
    rows = Rows(given.hidden, given.targets, None, None)
    statistics = passes.statistics(rows, given.table)
    gradient = _loss_gradient(statistics, given)
    if entropy_coefficient:
        of_logit = jnp.full_like(given.advantages, entropy_coefficient)
        gradient = gradient._replace(
            of_all=gradient.of_all - of_logit * statistics.mean_logit, of_logit=of_logit
        )
    return passes.gradients(rows, given.table, gradient)


def made_in_forward(given: Training, *, implementation: str) -> tuple[Array, Array]:
    """Training by `stored_statistics` and `stored_gradients`, a block of entries at a time."""
    passes = _passes(implementation)
    block_rows = min(passes.block_rows, given.targets.shape[0])
    store, use = passes.stored_statistics, passes.stored_gradients
    assert store is not None
    assert use is not None

    def step(total: Array, block: Training) -> tuple[Array, Array]:
        rows = Rows(block.hidden, block.targets, None, None)
        statistics, stored = store(rows, given.table)
        gradient = _loss_gradient(statistics, block)
        hidden_bar, total = use(rows, given.table, stored, gradient, total)
        return total, hidden_bar

    per_entry = given._replace(table=None)  # type: ignore[arg-type]
    per_block = jax.tree.map(lambda x: x.reshape(-1, block_rows, *x.shape[1:]), per_entry)
    zero = jnp.zeros(given.table.shape, jnp.float32)
    table_bar, hidden_bar = jax.lax.scan(step, zero, per_block)
    return hidden_bar.reshape(given.hidden.shape), table_bar.astype(given.table.dtype)


def public_scores(
    hidden: Array, table: Array, targets: Array, *, implementation: str
) -> tuple[Array, Array]:
    """The forward pass through `codjax_kernels.token_logprobs`; its gradient recomputes."""
    return codjax_kernels.token_logprobs(
        hidden, table, targets, implementation=implementation, entropy_gradient=False
    )


def public_token_loss(given: Training, *, implementation: str) -> tuple[Array, Array]:
    """Training through `codjax_kernels.token_loss`, with the gradient made in the forward pass."""

    def by_entry(logprobs: Array, _: Array, operands: tuple[Array, Array]) -> Array:
        return policy_loss(logprobs, *operands)

    def loss(hidden: Array, table: Array) -> Array:
        return codjax_kernels.token_loss(
            by_entry,
            hidden,
            table,
            targets=given.targets,
            operands=(given.advantages, given.old_logprobs),
            implementation=implementation,
            entropy_gradient=False,
        )[0]

    return jax.grad(loss, argnums=(0, 1))(given.hidden, given.table)


def public_divergence(given: Training, teacher: tuple[Array, Array]) -> tuple[Array, Array]:
    """Distillation through `codjax_kernels.token_kl`: gradients of the sum of divergences."""

    def loss(hidden: Array, table: Array) -> Array:
        return jnp.sum(
            codjax_kernels.token_kl(
                hidden,
                table,
                teacher_hidden=teacher[0],
                teacher_unembedding=teacher[1],
                implementation=_OURS,
            )
        )

    return jax.grad(loss, argnums=(0, 1))(given.hidden, given.table)


def tokamax_scores(hidden: Array, table_DV: Array, targets: Array) -> Array:
    """tokamax's fused kernel: log-probs alone, since it has no entropy; its table is `[D V]`."""
    tokamax = importlib.import_module("tokamax")
    with tokamax.config.cross_compile(True):  # else it looks for a TPU
        return -tokamax.linear_softmax_cross_entropy_loss(
            hidden, targets, table_DV, reduction="none", implementation="mosaic_tpu"
        )


def tokamax_training(given: Training) -> tuple[Array, Array]:
    """Training by tokamax's kernels; the table of `given` is `[D V]`."""

    def scores(hidden: Array, table_DV: Array, targets: Array) -> tuple[Array, None]:
        return tokamax_scores(hidden, table_DV, targets), None

    tokamax = importlib.import_module("tokamax")
    with tokamax.config.cross_compile(True):  # it holds for the backward pass too
        return differentiated(given, scores=scores)


def bounded(*arguments: Any, run: Callable[..., Any], vmem_mib: int) -> Any:
    """`run`, with kernels, ours and tokamax's, that may take no more vector memory than this."""
    chips = {
        name: dataclasses.replace(chip, vmem_bytes=min(chip.vmem_bytes, vmem_mib * _MIB))
        for name, chip in blocks.CHIPS.items()
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(blocks.CHIPS, chips))
        if importlib.util.find_spec("tokamax"):
            kernel = importlib.import_module(
                "tokamax._src.ops.linear_softmax_cross_entropy_loss.pallas_mosaic_tpu_kernel"
            )
            bound = min(kernel._get_vmem_limit_bytes(), vmem_mib * _MIB)
            stack.enter_context(
                mock.patch.object(kernel, "_get_vmem_limit_bytes", return_value=bound)
            )
        return run(*arguments)


class AttentionTraining(NamedTuple):
    """Arguments of a training program of attention."""

    q: Float[Array, "B T N H"]
    k: Float[Array, "B T M H"]
    v: Float[Array, "B T M H"]
    out_bar: Float[Array, "B T N H"]


def attention_shapes(
    num_tokens: int, num_heads: int, num_kv_heads: int, head_dim: int
) -> AttentionTraining:
    """Shapes of one row, in bfloat16."""
    of_queries = shape(1, num_tokens, num_heads, head_dim, dtype=jnp.bfloat16)
    of_keys = shape(1, num_tokens, num_kv_heads, head_dim, dtype=jnp.bfloat16)
    return AttentionTraining(q=of_queries, k=of_keys, v=of_keys, out_bar=of_queries)


def attention(q: Array, k: Array, v: Array, subtree_end: Array) -> Array:
    """The forward pass through `codjax_kernels.forest_attention`."""
    return codjax_kernels.forest_attention(q, k, v, subtree_end, implementation=_OURS)


def attention_training(given: AttentionTraining, subtree_end: Array) -> tuple[Array, ...]:
    """`attention` and its gradients."""
    attend = functools.partial(attention, subtree_end=subtree_end)
    out, backward = jax.vjp(attend, given.q, given.k, given.v)
    return out, *backward(given.out_bar)


def shape(*sizes: int, dtype: Any = jnp.float32) -> Any:
    """An argument to compile for."""
    return jax.ShapeDtypeStruct(sizes, dtype)


def _passes(implementation: str) -> LogprobPasses:
    return dispatch.choose(implementation).logprob_passes(_CHUNK_SIZE, False)


def _results(statistics: Statistics) -> tuple[Array, Array]:
    logprobs = statistics.target_logit - statistics.log_normaliser
    return logprobs, statistics.log_normaliser - statistics.mean_logit


def _loss_gradient(statistics: Statistics, given: Training) -> LogitGradient:
    logprobs, _ = _results(statistics)
    bar = jax.grad(policy_loss)(logprobs, given.advantages, given.old_logprobs)
    return LogitGradient(
        log_normaliser=statistics.log_normaliser, of_target=bar, of_all=-bar, of_logit=None
    )
