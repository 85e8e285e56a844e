"""The one door to the log-probabilities and entropies of sampled tokens.

    hidden = model(batch.tokens, batch.token_positions, batch.subtree_end)
    logprobs, entropy = scored_logprobs(
        hidden, model.unembedding, batch.source, batch.target, temperature=1.0
    )

Only the hidden states that predict a scored entry meet the vocabulary, each once. Which kernel
does the projection is settled in `codjax_kernels`. `scored_loss` is for losses that are a sum over
tokens, whose gradient it makes on the way; everything else differentiates `scored_logprobs`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import codjax_kernels
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from codjax import types

Temperature = float | int | Float[Array, ""]
Total = tuple[Float[Array, ""], Float[Array, "B K"], Float[Array, "B K"]]


class Entries(NamedTuple):
    """What a loss looks at: scored entries in one line, and the divisors of the whole batch."""

    sampler_logprobs: Float[Array, " N"]
    ref_logprobs: Float[Array, " N"]
    advantages: Float[Array, " N"]
    weights: Float[Array, " N"]
    sample_ids: Int[Array, " N"]  # counted over all rows
    normaliser: types.Leaf
    num_scored: types.Leaf


class Projection(NamedTuple):
    """How hidden states meet the vocabulary: which kernel, and how arrays lie on the mesh."""

    implementation: str | None = None  # None: by platform
    layout: codjax_kernels.Layout | None = None  # None: one device
    chunk_size: int = 512  # entries whose logits exist at once on a device ("xla")


ONE_DEVICE = Projection()


def entries_of(batch: types.TokenBatch) -> Entries:
    """The entries of a batch, rows one after the other."""
    num_rows, width = batch.weights.shape
    # Sample ids count from 0 in every row; each row has fewer samples than entries.
    sample_ids = batch.sample_ids + width * jnp.arange(num_rows, dtype=jnp.int32)[:, None]
    return Entries(
        sampler_logprobs=batch.sampler_logprobs.reshape(-1),
        ref_logprobs=batch.ref_logprobs.reshape(-1),
        advantages=batch.advantages.reshape(-1),
        weights=batch.weights.reshape(-1),
        sample_ids=sample_ids.reshape(-1),
        normaliser=batch.normaliser,
        num_scored=batch.num_scored,
    )


def scored_logprobs(
    hidden: Float[Array, "B T D"],
    unembedding: Float[Array, "V D"],
    source: Int[Array, "B K"],
    target: Int[Array, "B K"],
    temperature: Temperature = 1.0,
    *,
    is_valid: Bool[Array, "B K"] | None = None,
    entropy_gradient: bool = True,
    projection: Projection = ONE_DEVICE,
) -> tuple[Float[Array, "B K"], Float[Array, "B K"]]:
    """Log-probability and entropy of every scored entry.

    Args:
        hidden: final hidden states of the rows.
        unembedding: output table.
        source: index in the row of the hidden state that predicts the entry; an index outside of
            the row makes the entry padding.
        target: token id that was sampled; an id outside of the vocabulary reads as 0.
        temperature: of the distribution, above 0; a constant, without gradient.
        is_valid: False for padding, which costs nothing and reads 0; None: all count.
        entropy_gradient: False makes the entropies constants, which can be cheaper.
        projection: which kernel, on which mesh.

    Returns:
        Natural log-probabilities of the targets and entropies in nats, float32.
    """
    return codjax_kernels.scored_logprobs(
        hidden,
        unembedding,
        source=source,
        target=target,
        is_valid=is_valid,
        temperature=temperature,
        entropy_gradient=entropy_gradient,
        **projection._asdict(),
    )


def scored_loss(
    loss: Callable[[Array, Array, Entries], Float[Array, ""]],
    hidden: Float[Array, "B T D"],
    unembedding: Float[Array, "V D"],
    batch: types.TokenBatch,
    *,
    temperature: Temperature = 1.0,
    entropy_gradient: bool = True,
    projection: Projection = ONE_DEVICE,
) -> Total:
    """A sum over the entries of a batch, with its gradient made in the forward pass.

    Args:
        loss: ``(logprobs [N], entropy [N], entries) → scalar``; every term looks at one entry.
        hidden: final hidden states of the rows.
        unembedding: output table.
        batch: its entries; those of weight 0 are padding.
        temperature: of the distribution, above 0; a constant, without gradient.
        entropy_gradient: False if the loss does not depend on the entropies.
        projection: which kernel, on which mesh.

    Returns:
        The loss; log-probabilities and entropies, without gradient.
    """
    entries = entries_of(batch)
    by_row = jax.tree.map(lambda x: x.reshape(batch.weights.shape) if jnp.ndim(x) else x, entries)
    return codjax_kernels.scored_loss(
        loss,
        hidden,
        unembedding,
        source=batch.source,
        target=batch.target,
        is_valid=batch.weights != 0,
        operands=by_row,
        temperature=temperature,
        entropy_gradient=entropy_gradient,
        **projection._asdict(),
    )
