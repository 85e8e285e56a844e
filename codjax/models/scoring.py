"""Log-probabilities of given tokens under a model: plain rows through the training path."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import codjax_kernels
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from codjax import logprobs
from codjax.models.decoder import Decoder


def score(
    model: Decoder,
    token_ids: Int[Array | np.ndarray, "B T"] | Sequence[Sequence[int]],
    *,
    implementation: str | None = None,
) -> Float[Array, "B T-1"]:
    """Natural log-probability of each next token, at temperature 1, float32.

    Every row is one sequence from its first token on. Whole logits never exist, however long
    the rows. Compiles once per shape.

    Args:
        model: the decoder.
        token_ids: ids in `[0, V)`; NumPy, JAX or nested lists.
        implementation: of the kernels; None: by platform. "xla" runs every model everywhere.

    Returns:
        ``out[b, t] = log p(token_ids[b, t + 1] | token_ids[b, : t + 1])``.

    Raises:
        ValueError: not rows of equal length, at least one token each, or an id out of range.
    """
    tokens = np.asarray(token_ids)
    if tokens.ndim != 2 or not tokens.shape[1] or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            "score takes whole numbers [B T] with T at least 1; got "
            f"{tokens.dtype} of shape {tokens.shape}."
        )
    vocab_size = model.config.vocab_size
    if tokens.size and not (tokens.min() >= 0 and tokens.max() < vocab_size):
        raise ValueError(
            f"token ids must lie in [0, {vocab_size}), the vocabulary of the model; got ids from "
            f"{tokens.min()} to {tokens.max()}."
        )
    graphdef, params = nnx.split(model)
    return score_rows(graphdef, params, tokens.astype(np.int32), implementation=implementation)


@functools.partial(jax.jit, static_argnums=0, static_argnames="implementation")
def score_rows(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    tokens: jax.Array,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """`score` of a split model, without the checks; may be called inside jit."""
    model = nnx.merge(graphdef, params)
    num_rows, num_tokens = tokens.shape
    shape = (num_rows, num_tokens)
    index = jnp.broadcast_to(jnp.arange(num_tokens, dtype=jnp.int32)[None, :], shape)
    attend = functools.partial(codjax_kernels.forest_attention, implementation=implementation)
    hidden = model(tokens, index, jnp.full(shape, num_tokens, jnp.int32), attend=attend)
    projection = logprobs.Projection(implementation=implementation)
    scores, _ = logprobs.scored_logprobs(
        hidden, model.unembedding, index[:, :-1], tokens[:, 1:], projection=projection
    )
    return scores
