"""The one door to the log-probabilities and entropies of sampled tokens.

    hidden = model(batch.tokens, batch.token_positions, batch.subtree_end)
    logprobs, entropy = scored_logprobs(
        hidden, model.unembedding, batch.source, batch.target, temperature=1.0
    )

Only the hidden states that predict a scored entry meet the vocabulary; which kernel does the
projection is settled in `codjax_kernels`.
"""

from __future__ import annotations

import jax.numpy as jnp
from codjax_kernels import token_logprobs
from jaxtyping import Array, Float, Int


def scored_logprobs(
    hidden: Float[Array, "B T D"],
    unembedding: Float[Array, "V D"],
    source: Int[Array, "B K"],
    target: Int[Array, "B K"],
    temperature: float | int | Float[Array, ""] = 1.0,
    *,
    chunk_size: int = 512,
) -> tuple[Float[Array, "B K"], Float[Array, "B K"]]:
    """Log-probability and entropy of every scored entry.

    Args:
        hidden: final hidden states of the rows.
        unembedding: output table.
        source: index in the row of the hidden state that predicts the entry; an index outside of
            the row, on padding, reads some state of the row.
        target: token id that was sampled; an id outside of the vocabulary reads as 0.
        temperature: of the distribution, above 0; a constant, without gradient.
        chunk_size: entries whose logits exist at once, over all devices.

    Returns:
        Natural log-probabilities of the targets and entropies in nats, float32.
    """
    num_rows, num_scored = source.shape
    gathered = jnp.take_along_axis(hidden, source[:, :, None], axis=1, mode="clip")
    logprobs, entropy = token_logprobs(
        gathered.reshape(num_rows * num_scored, hidden.shape[-1]),
        unembedding,
        target.reshape(num_rows * num_scored),
        temperature,
        chunk_size=chunk_size,
    )
    shape = (num_rows, num_scored)
    return logprobs.reshape(shape), entropy.reshape(shape)
