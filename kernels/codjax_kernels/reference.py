"""The operations as one would write them on a blackboard.

Full logits, dense masks, no care for time or memory; gradients by automatic differentiation.
They compute in the precision of what they are given, so that tests get float64 oracles under
``jax.enable_x64(True)``, and benchmarks the naive program to beat.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def token_logprobs(
    hidden: Float[Array, "K D"],
    unembedding: Float[Array, "V D"],
    targets: Int[Array, " K"],
    temperature: float | int | Float[Array, " K"] = 1.0,
) -> tuple[Float[Array, " K"], Float[Array, " K"]]:
    """Log-probability of the targets, which are in range, and entropy, in nats."""
    logits = hidden @ unembedding.T / jnp.broadcast_to(temperature, targets.shape)[:, None]
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    entropy = -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)
    return jnp.take_along_axis(logprobs, targets[:, None], axis=-1)[:, 0], entropy


def token_kl(
    hidden: Float[Array, "K D"],
    unembedding: Float[Array, "V D"],
    teacher_hidden: Float[Array, "K E"],
    teacher_unembedding: Float[Array, "V E"],
    temperature: float | int | Float[Array, "..."] = 1.0,
) -> Float[Array, " K"]:
    """KL(student || teacher) in nats."""
    scale = jnp.broadcast_to(temperature, hidden.shape[:1])[:, None]
    student = jax.nn.log_softmax(hidden @ unembedding.T / scale, axis=-1)
    teacher = jax.nn.log_softmax(teacher_hidden @ teacher_unembedding.T / scale, axis=-1)
    return jnp.sum(jnp.exp(student) * (student - teacher), axis=-1)


def forest_mask(subtree_end: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """Whether token `i` (second axis) sees token `j` (last axis): ``j <= i < subtree_end[j]``."""
    index = jnp.arange(subtree_end.shape[1])
    query, key = index[None, :, None], index[None, None, :]
    return (key <= query) & (query < subtree_end[:, None, :])


def forest_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T M H"],
    v: Float[Array, "B T M H"],
    subtree_end: Int[Array, "B T"],
) -> Float[Array, "B T N H"]:
    """Attention under the dense mask, every key-value head repeated for its query heads."""
    group = q.shape[2] // k.shape[2]
    keys, values = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
    scores = jnp.einsum("binh,bjnh->bnij", q, keys) / q.shape[-1] ** 0.5
    scores = jnp.where(forest_mask(subtree_end)[:, None], scores, -jnp.inf)
    return jnp.einsum("bnij,bjnh->binh", jax.nn.softmax(scores, axis=-1), values)
