"""The public operations.

Shapes, in the letters of codjax: `B` rows, `T` tokens in a row, `K` scored entries (of a row, or
in all), `D` model width, `V` vocabulary, `N` query heads, `M` key-value heads, `H` head size.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from codjax_kernels import in_forward, kl, logprobs
from codjax_kernels.checks import (
    AnyArray,
    Temperature,
    check_entries,
    check_in_forward,
    check_loss_operands,
    check_operands,
    check_temperature,
)
from codjax_kernels.dispatch import Interpret, choose
from codjax_kernels.in_forward import Loss
from codjax_kernels.mesh import Scored, check_layout, on_mesh
from codjax_kernels.records import Layout, Rows, Teacher


def token_logprobs(  # noqa: PLR0917 - the order is public
    hidden: Float[AnyArray, "K D"],
    unembedding: Float[AnyArray, "V D"],
    targets: Int[AnyArray, "..."],
    temperature: Temperature = 1.0,
    implementation: str | None = None,
    interpret: Interpret = False,
    *,
    num_valid: int | Int[AnyArray, ""] | None = None,
    entropy_gradient: bool = True,
    chunk_size: int = 512,
    layout: Layout | None = None,
) -> tuple[Float[Array, "..."], Float[Array, " K"]]:
    """Log-probability of each target and entropy of the distribution that it was drawn from.

    Logits are ``hidden @ unembedding.T / temperature``; they never exist beyond a block, forward
    or backward: the backward pass computes them again. Gradients flow to `hidden` and
    `unembedding`, from the log-prob and from the entropy; products accumulate in float32 and the
    gradient of a bfloat16 `unembedding` is rounded after all entries of a device are summed.

    Args:
        hidden: hidden states that predict, float32 or bfloat16.
        unembedding: output table, one row a token id, of the same dtype as `hidden`.
        targets: token ids `[K]`, or `[K J]` for several of each hidden state, which cost one
            projection together; an id outside of `[0, V)` is read as 0, so padding is harmless.
        temperature: what the logits are divided by, one for all or one an entry; above 0.
            It is a constant: no gradient flows to it.
        implementation: None (by platform), "xla", "pallas_tpu" or "pallas_gpu".
        interpret: run a Pallas kernel in an interpreter: True, or its parameters.
        num_valid: entries from this index on are padding: they cost nothing, their results are 0
            and no gradient flows from them. None: all count.
        entropy_gradient: False makes the entropy a constant, which saves the Pallas TPU kernels a
            product in the backward pass.
        chunk_size: entries whose logits exist at once on a device ("xla"); at least 1. Without
            gradients in the forward pass, small problems (xla.logprobs.SINGLE_CHUNK_LOGITS) are
            done in one chunk.
        layout: how K (`tokens`) and the table (`vocab`, `width`) lie on a mesh; None: one device.

    Returns:
        Natural log-probabilities, never above 0, and entropies in nats, never below 0; float32.

    Raises:
        ValueError: unknown implementation, or shapes that do not fit together.
    """
    hidden, unembedding, targets = map(jnp.asarray, (hidden, unembedding, targets))
    check_operands("token_logprobs", "[K D]", hidden, unembedding)
    fits = targets.ndim in {1, 2} and targets.shape[:1] == hidden.shape[:1]
    if not fits or 0 in targets.shape[1:]:
        raise ValueError(
            "token_logprobs takes targets [K] or [K J] for hidden [K D], J at least 1; got "
            f"{targets.shape} and {hidden.shape}."
        )
    check_temperature("token_logprobs", temperature, targets.shape[:1])
    if layout is not None and layout.rows:
        raise ValueError(
            "token_logprobs knows no rows: name the mesh axes that cut K in layout.tokens; got "
            f"layout.rows = {layout.rows}."
        )
    setting = _setting(implementation, interpret, chunk_size, layout, entropy_gradient)
    if not targets.size:
        return jnp.zeros(targets.shape, jnp.float32), jnp.zeros(0, jnp.float32)
    scored = _one_line(hidden, unembedding, targets, temperature, num_valid, layout)
    found, entropy = logprobs.scored_logprobs(setting, hidden[None], unembedding, scored)
    per_source = targets.shape[1] if targets.ndim == 2 else 1
    return found.reshape(targets.shape), entropy.reshape(-1)[::per_source]


def scored_logprobs(
    hidden: Float[AnyArray, "B T D"],
    unembedding: Float[AnyArray, "V D"],
    *,
    source: Int[AnyArray, "B K"],
    target: Int[AnyArray, "B K"],
    is_valid: Bool[AnyArray, "B K"] | None = None,
    temperature: Temperature = 1.0,
    implementation: str | None = None,
    interpret: Interpret = False,
    entropy_gradient: bool = True,
    chunk_size: int = 512,
    layout: Layout | None = None,
) -> tuple[Float[Array, "B K"], Float[Array, "B K"]]:
    """`token_logprobs` of the entries of rows: entry k of a row is predicted by token `source[k]`.

    Every distinct source is projected once, however many entries have it, and entries that are
    not valid cost nothing.

    Args:
        hidden: hidden states of the rows.
        unembedding: output table, of the same dtype.
        source: index in the row of the hidden state that predicts the entry; one outside of the row
            makes the entry padding.
        target: token id; one outside of `[0, V)` is read as 0.
        is_valid: False for padding, whose results are 0; None: all count.
        temperature: one for all, or `[B K]`; entries of one source have the same.
        implementation: as in `token_logprobs`.
        interpret: as in `token_logprobs`.
        entropy_gradient: as in `token_logprobs`.
        chunk_size: as in `token_logprobs`.
        layout: how rows, tokens and the table lie on a mesh; None: one device.

    Returns:
        Log-probabilities and entropies in nats, float32.

    Raises:
        ValueError: unknown implementation, or shapes that do not fit together.
    """
    setting = _setting(implementation, interpret, chunk_size, layout, entropy_gradient)
    hidden, unembedding = jnp.asarray(hidden), jnp.asarray(unembedding)
    check_entries("scored_logprobs", hidden, unembedding, source, target, is_valid, temperature)
    if not target.size:
        return jnp.zeros(target.shape, jnp.float32), jnp.zeros(target.shape, jnp.float32)
    scored = _scored(unembedding, source, target, is_valid, temperature)
    return logprobs.scored_logprobs(setting, hidden, unembedding, scored)


def scored_loss(
    loss: Loss,
    hidden: Float[AnyArray, "B T D"],
    unembedding: Float[AnyArray, "V D"],
    *,
    source: Int[AnyArray, "B K"],
    target: Int[AnyArray, "B K"],
    operands: Any,
    is_valid: Bool[AnyArray, "B K"] | None = None,
    temperature: Temperature = 1.0,
    implementation: str | None = None,
    interpret: Interpret = False,
    entropy_gradient: bool = True,
    chunk_size: int = 512,
    layout: Layout | None = None,
) -> tuple[Float[Array, ""], Float[Array, "B K"], Float[Array, "B K"]]:
    """A per-token loss with its gradient made in the forward pass: 6 K D V operations in all.

    Args:
        loss: ``(logprobs [n], entropy [n], operands) → scalar``, a sum of terms each of which looks
            at one entry only (`in_forward` says why). It is called for the entries of one device,
            so what it divides by (a number of tokens) must come in `operands`, and it must not
            close over anything that is differentiated. A loss that looks at several entries at
            once, as a mean of those it sees does, gets wrong gradients.
        hidden: as in `scored_logprobs`.
        unembedding: as in `scored_logprobs`.
        source: as in `scored_logprobs`.
        target: as in `scored_logprobs`.
        operands: tree of what else the loss looks at: arrays `[B K]`, which it gets flat, and
            numbers. No gradient flows to it.
        is_valid: as in `scored_logprobs`.
        temperature: as in `scored_logprobs`.
        implementation: as in `scored_logprobs`; "pallas_gpu" has none of this yet.
        interpret: as in `scored_logprobs`.
        entropy_gradient: False if the loss does not depend on the entropy.
        chunk_size: as in `scored_logprobs`.
        layout: as in `scored_logprobs`.

    Returns:
        The loss; log-probabilities and entropies as constants, for metrics.

    Raises:
        ValueError: the implementation does not make gradients in the forward pass, or shapes that
            do not fit together.
    """
    setting = _setting(implementation, interpret, chunk_size, layout, entropy_gradient)
    check_in_forward(setting.passes, implementation, instead="scored_logprobs")
    hidden, unembedding = jnp.asarray(hidden), jnp.asarray(unembedding)
    check_entries("scored_loss", hidden, unembedding, source, target, is_valid, temperature)
    scored = _scored(unembedding, source, target, is_valid, temperature)
    operands = jax.tree.map(jnp.asarray, operands)
    check_loss_operands("scored_loss", operands, scored.target.shape)
    if not target.size:
        return _loss_of_nothing(loss, operands, target.shape)
    return in_forward.scored_loss(setting, loss, hidden, unembedding, scored, operands)


def token_loss(
    loss: Loss,
    hidden: Float[AnyArray, "K D"],
    unembedding: Float[AnyArray, "V D"],
    *,
    targets: Int[AnyArray, " K"],
    operands: Any,
    temperature: Temperature = 1.0,
    implementation: str | None = None,
    interpret: Interpret = False,
    num_valid: int | Int[AnyArray, ""] | None = None,
    entropy_gradient: bool = True,
    chunk_size: int = 512,
) -> tuple[Float[Array, ""], Float[Array, " K"], Float[Array, " K"]]:
    """`scored_loss` of entries with one hidden state each; arguments as there and above.

    `operands` are arrays `[K]` and numbers. For entries from `num_valid` on, results are 0 and what
    the loss says has no gradient.
    """
    setting = _setting(implementation, interpret, chunk_size, None, entropy_gradient)
    check_in_forward(setting.passes, implementation, instead="token_logprobs")
    hidden, unembedding, targets = map(jnp.asarray, (hidden, unembedding, targets))
    check_operands("token_loss", "[K D]", hidden, unembedding)
    if targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"token_loss takes targets [K] for hidden [K D]; got {targets.shape} and "
            f"{hidden.shape}."
        )
    check_temperature("token_loss", temperature, targets.shape)
    operands = jax.tree.map(jnp.asarray, operands)
    check_loss_operands("token_loss", operands, targets.shape)
    if not targets.size:
        return _loss_of_nothing(loss, operands, targets.shape)
    scored = _one_line(hidden, unembedding, targets, temperature, num_valid, None)
    operands = jax.tree.map(lambda x: x[None] if x.ndim else x, operands)
    total, found, entropy = in_forward.scored_loss(
        setting, loss, hidden[None], unembedding, scored, operands
    )
    return total, found[0], entropy[0]


def token_kl(
    hidden: Float[AnyArray, "K D"],
    unembedding: Float[AnyArray, "V D"],
    *,
    teacher_hidden: Float[AnyArray, "K E"],
    teacher_unembedding: Float[AnyArray, "V E"],
    temperature: Temperature = 1.0,
    implementation: str | None = None,
    interpret: Interpret = False,
    num_valid: int | Int[AnyArray, ""] | None = None,
    chunk_size: int = 512,
) -> Float[Array, " K"]:
    """KL(student || teacher) of the next token at every entry, over the whole vocabulary, in nats.

    Gradients flow to `hidden` and `unembedding`; the teacher is a constant. Runs on one device.

    Args:
        hidden: hidden states of the student, float32 or bfloat16.
        unembedding: its output table, of the same dtype.
        teacher_hidden: hidden states of the teacher, of the same dtype and of any width.
        teacher_unembedding: its output table over the same vocabulary.
        temperature: of both distributions, one for all or one an entry.
        implementation: None (by platform), "xla" or "pallas_tpu".
        interpret: as in `token_logprobs`.
        num_valid: as in `token_logprobs`.
        chunk_size: as in `token_logprobs`.

    Returns:
        Divergences, never below 0, float32.

    Raises:
        ValueError: shapes that do not fit together, or an implementation without divergences.
    """
    made = (hidden, unembedding, teacher_hidden, teacher_unembedding)
    hidden, unembedding, teacher_hidden, teacher_unembedding = map(jnp.asarray, made)
    check_operands("token_kl", "[K D]", hidden, unembedding)
    check_operands("token_kl, of the teacher,", "[K D]", teacher_hidden, teacher_unembedding)
    pairs = (hidden, teacher_hidden), (unembedding, teacher_unembedding)
    if any(ours.shape[0] != other.shape[0] or ours.dtype != other.dtype for ours, other in pairs):
        raise ValueError(
            "token_kl takes hidden [K D], unembedding [V D], teacher_hidden [K E] and "
            f"teacher_unembedding [V E] of one dtype; got {[x.shape for x in made]} of "
            f"{[str(x.dtype) for x in made]}."
        )
    check_temperature("token_kl", temperature, hidden.shape[:1])
    passes = _setting(implementation, interpret, chunk_size, None, False).passes
    if passes.kl_statistics is None:
        raise ValueError(
            f"implementation {implementation!r} has no divergences; use implementation 'xla'."
        )
    if not hidden.size:
        return jnp.zeros(hidden.shape[0], jnp.float32)
    targets = jnp.zeros(hidden.shape[0], jnp.int32)
    scored = _one_line(hidden, unembedding, targets, temperature, num_valid, None)
    inverse = scored.inverse_temperature
    rows = Rows(hidden, targets, None if inverse is None else inverse[0], scored.num_valid)
    return kl.divergence(passes, rows, unembedding, Teacher(teacher_hidden, teacher_unembedding))


def forest_attention(  # noqa: PLR0917 - the order is public
    q: Float[AnyArray, "B T N H"],
    k: Float[AnyArray, "B T M H"],
    v: Float[AnyArray, "B T M H"],
    subtree_end: Int[AnyArray, "B T"],
    implementation: str | None = None,
    interpret: Interpret = False,
    *,
    layout: Layout | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention of every token over itself and its ancestors in the row's forest.

    Tokens of a row stand in depth-first order, so that token `i` sees token `j` iff
    ``j <= i < subtree_end[j]``. Query head `n` reads key-value head ``n // (N // M)``. Scores are
    scaled by ``1 / sqrt(H)``; the softmax is float32.

    Args:
        q: queries, float32 or bfloat16; M divides N.
        k: keys, of the same dtype.
        v: values, of the same dtype.
        subtree_end: index one past the last descendant, above the token's own index; a token
            that sees nothing, which no forest has, gets finite nonsense.
        implementation: None (by platform), "xla", "pallas_tpu" or "pallas_gpu".
        interpret: run a Pallas kernel in an interpreter: True, or its parameters.
        layout: how rows, tokens and heads lie on a mesh; None: one device. Where tokens are cut,
            every device gathers the keys and values of its rows (docs/kernels.md says why).

    Returns:
        One weighted mean of values per query, in the dtype of `q`.

    Raises:
        ValueError: unknown implementation, or shapes that do not fit together.
    """
    attend = choose(implementation, interpret=interpret).attention(interpret)
    rows, num_tokens, num_heads, head_dim = q.shape
    fits = k.shape == v.shape == (rows, num_tokens, k.shape[2], head_dim)
    if not fits or num_heads % k.shape[2] or subtree_end.shape != (rows, num_tokens):
        raise ValueError(
            "forest_attention takes q [B T N H], k and v [B T M H] with M dividing N, and "
            f"subtree_end [B T]; got {q.shape}, {k.shape}, {v.shape} and {subtree_end.shape}."
        )
    q, k, v, subtree_end = map(jnp.asarray, (q, k, v, subtree_end))
    if not q.size:
        return q
    if layout is None:
        return attend(q, k, v, subtree_end)
    check_layout(layout)

    def on_device(q, k, v, ends):  # type: ignore[no-untyped-def]
        start = 0
        if layout.tokens:
            start = jax.lax.axis_index(layout.tokens).astype(jnp.int32) * q.shape[1]
            k, v = (jax.lax.all_gather(x, layout.tokens, axis=1, tiled=True) for x in (k, v))
        return attend(q, k, v, ends, query_start=start)

    heads = PartitionSpec(layout.rows or None, layout.tokens or None, layout.heads or None)
    ends_spec = PartitionSpec(layout.rows or None)  # whole rows: small, and every query needs them
    run = on_mesh(layout, on_device, (heads, heads, heads, ends_spec), heads)
    return run(q, k, v, subtree_end)


def _setting(
    implementation: str | None,
    interpret: Interpret,
    chunk_size: int,
    layout: Layout | None,
    entropy_gradient: bool,
) -> logprobs.Setting:
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1; got {chunk_size}.")
    if layout is not None:
        check_layout(layout)
    passes = choose(implementation, interpret=interpret).logprob_passes(chunk_size, interpret)
    return logprobs.Setting(passes, layout, entropy_gradient)


def _loss_of_nothing(
    loss: Loss, operands: Any, shape: tuple[int, ...]
) -> tuple[Array, Array, Array]:
    nothing = jnp.zeros(shape, jnp.float32)
    return in_forward.total_of(loss, nothing, nothing, operands), nothing, nothing


def _one_line(  # noqa: PLR0917 - the arguments of the callers, in their order
    hidden: Array,
    unembedding: Array,
    targets: Array,
    temperature: Temperature,
    num_valid: int | Array | np.ndarray | None,
    layout: Layout | None,
) -> Scored:
    """Entries with a hidden state each, as one row."""
    num_sources = hidden.shape[0]
    if num_valid is not None:
        num_valid = jnp.clip(jnp.asarray(num_valid, jnp.int32), 0, num_sources)
    if targets.ndim == 1 and layout is None:
        scored = _scored(unembedding, None, targets[None], None, _per_entry(temperature, 1))
        return scored._replace(num_valid=num_valid)
    per_source = targets.shape[1] if targets.ndim == 2 else 1
    source = jnp.repeat(jnp.arange(num_sources, dtype=jnp.int32), per_source)[None]
    is_valid = None if num_valid is None else source < num_valid
    target, temperature = targets.reshape(1, -1), _per_entry(temperature, per_source)
    return _scored(unembedding, source, target, is_valid, temperature)


def _per_entry(temperature: Temperature, per_source: int) -> Temperature:
    """A temperature a hidden state `[K]` as one an entry `[1 K]`."""
    if np.ndim(temperature) == 0:
        return temperature
    return jnp.repeat(jnp.asarray(temperature), per_source)[None]


def _scored(
    unembedding: Array,
    source: AnyArray | None,
    target: AnyArray,
    is_valid: AnyArray | None,
    temperature: Temperature,
) -> Scored:
    target = jnp.asarray(target, jnp.int32)
    in_range = (target >= 0) & (target < unembedding.shape[0])
    inverse = None
    if not isinstance(temperature, int | float) or temperature != 1:
        inverse = 1.0 / jnp.asarray(temperature, jnp.float32)
        inverse = jax.lax.stop_gradient(jnp.broadcast_to(inverse, target.shape))
    return Scored(
        source=None if source is None else jnp.asarray(source, jnp.int32),
        target=jnp.where(in_range, target, 0),
        is_valid=None if is_valid is None else jnp.asarray(is_valid),
        inverse_temperature=inverse,
    )
