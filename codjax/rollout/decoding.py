"""The device side of the in-process engine: feed prompts, decode tokens, draw from logits.

Pure functions of arrays, jitted by `codjax.rollout.engine`, which owns the state between calls.
What a sequence gets depends on its own tokens, seed and sampling parameters only: every operation
works row by row, and the random key of a token is folded from its request's seed and its index.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt


@dataclasses.dataclass(frozen=True, kw_only=True)
class CachedModel:
    """A language model with a key-value cache, as plain functions.

    Attributes:
        init_cache: ``(num_rows, num_tokens) -> cache``, a tree of arrays with rows on axis 1.
        extend: ``(weights, cache, tokens [R C], start [R]) -> (hidden [R C D], cache)``; appends
            tokens to the rows at indices ``start, start + 1, …`` and drops those past the end.
        unembedding: ``weights -> [V D]``.
        score: ``(weights, tokens [B T]) -> log-probability of each next token [B T-1]``.
    """

    init_cache: Callable[[int, int], Any]
    extend: Callable[[Any, Any, jax.Array, jax.Array], tuple[jax.Array, Any]]
    unembedding: Callable[[Any], jax.Array]
    score: Callable[[Any, jax.Array], jax.Array]


class Slots(NamedTuple):
    """What the slots are decoding; S slots, Z stop tokens."""

    token: Int[Any, " S"]  # last token, not yet in the cache
    position: Int[Any, " S"]  # its index in the sequence
    num_sampled: Int[Any, " S"]  # tokens sampled so far for this request
    is_active: Bool[Any, " S"]
    seed: UInt[Any, " S"]
    max_tokens: Int[Any, " S"]
    temperature: Float[Any, " S"]
    top_p: Float[Any, " S"]
    top_k: Int[Any, " S"]
    stop_tokens: Int[Any, "S Z"]  # padded with -1


class Decoded(NamedTuple):
    """What a call of `decode` sampled; n steps, of which the slot took part where `is_valid`."""

    tokens: Int[Array, "n S"]
    logprobs: Float[Array, "n S"]
    is_valid: Bool[Array, "n S"]


def prefill(  # noqa: PLR0917 - jitted with positions for donation
    model: CachedModel,
    weights: Any,
    cache: Any,
    tokens: Int[Array, "R C"],
    start: Int[Array, " R"],
    source: Int[Array, " R"],
    slot: Int[Array, " R"],
) -> Any:
    """The cache after rows copied from `source` were extended by `tokens` and stored at `slot`.

    Args:
        model: the language model.
        weights: its weights.
        cache: of all slots.
        tokens: to append; what exceeds a row's own tokens is overwritten later.
        start: index of the first of them; at the cache's length, nothing is appended.
        source: slots that hold the tokens before `start`.
        slot: where the result goes; past the last slot, nowhere.
    """
    rows = jax.tree.map(lambda x: x[:, source], cache)
    _, rows = model.extend(weights, rows, tokens, start)
    return jax.tree.map(lambda x, row: x.at[:, slot].set(row, mode="drop"), cache, rows)


def decode(
    model: CachedModel,
    weights: Any,
    cache: Any,
    slots: Slots,
    *,
    num_steps: int,
    use_filter: bool,
) -> tuple[Any, Slots, Decoded]:
    """Up to `num_steps` tokens for every active slot; stops when no slot is active.

    Args:
        model: the language model.
        weights: its weights.
        cache: of all slots.
        slots: what they are decoding.
        num_steps: tokens at most.
        use_filter: whether any request has a top-p or top-k, which costs a sort of the logits.

    Returns:
        cache, slots and what was sampled.
    """
    num_slots = slots.token.shape[0]
    length = jax.tree.leaves(cache)[0].shape[2]
    unembedding = model.unembedding(weights)
    out = Decoded(
        tokens=jnp.zeros((num_steps, num_slots), jnp.int32),
        logprobs=jnp.zeros((num_steps, num_slots), jnp.float32),
        is_valid=jnp.zeros((num_steps, num_slots), bool),
    )

    def is_running(carry: tuple) -> jax.Array:
        step, _, slots, _ = carry
        return (step < num_steps) & jnp.any(slots.is_active)

    def one_step(carry: tuple) -> tuple:
        step, cache, slots, out = carry
        # An idle slot keeps what it holds for later prefix reuse: its write falls off the end.
        start = jnp.where(slots.is_active, slots.position, length)
        hidden, cache = model.extend(weights, cache, slots.token[:, None], start)
        logits = jnp.einsum(
            "rd,vd->rv", hidden[:, 0], unembedding, preferred_element_type=jnp.float32
        )
        token, logprob = sample(logits, slots, use_filter=use_filter)
        out = Decoded(
            tokens=out.tokens.at[step].set(token),
            logprobs=out.logprobs.at[step].set(logprob),
            is_valid=out.is_valid.at[step].set(slots.is_active),
        )
        return step + 1, cache, _advance(slots, token), out

    _, cache, slots, out = jax.lax.while_loop(
        is_running, one_step, (jnp.int32(0), cache, slots, out)
    )
    return cache, slots, out


def sample(
    logits: Float[Array, "S V"], slots: Slots, *, use_filter: bool
) -> tuple[Int[Array, " S"], Float[Array, " S"]]:
    """A token per slot and its log-probability.

    The log-probability is that of the whole vocabulary at the slot's temperature (at temperature
    1 for a greedy slot), before top-k and top-p.
    """
    is_greedy = slots.temperature == 0
    scaled = logits / jnp.where(is_greedy, 1.0, slots.temperature)[:, None]
    logprobs = jax.nn.log_softmax(scaled, axis=-1)
    allowed = _keep_top(logprobs, slots) if use_filter else logprobs

    def noise(seed: jax.Array, index: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), index)
        return jax.random.gumbel(key, (logits.shape[1],), jnp.float32)

    gumbel = jax.vmap(noise)(slots.seed, slots.num_sampled)
    token = jnp.argmax(allowed + jnp.where(is_greedy[:, None], 0.0, gumbel), axis=-1)
    token = token.astype(jnp.int32)
    return token, jnp.take_along_axis(logprobs, token[:, None], axis=1)[:, 0]


def _keep_top(logprobs: Float[Array, "S V"], slots: Slots) -> Float[Array, "S V"]:
    """Log-probabilities with -inf outside the top-k and the top-p sets of each slot."""
    vocabulary = logprobs.shape[1]
    order = jnp.argsort(-logprobs, axis=-1, stable=True)
    ranked = jnp.take_along_axis(logprobs, order, axis=-1)
    mass_before = jnp.cumsum(jnp.exp(ranked), axis=-1) - jnp.exp(ranked)
    top_k = jnp.where(slots.top_k == 0, vocabulary, slots.top_k)
    in_top_k = jnp.arange(vocabulary)[None] < top_k[:, None]
    # Rounding may put the mass before the last tokens at 1, which must not drop them at top_p 1.
    in_top_p = (mass_before < slots.top_p[:, None]) | (slots.top_p[:, None] >= 1)
    is_kept = (in_top_k & in_top_p).at[:, 0].set(True)
    rank = jnp.argsort(order, axis=-1)
    return jnp.where(jnp.take_along_axis(is_kept, rank, axis=-1), logprobs, -jnp.inf)


def _advance(slots: Slots, token: Int[Array, " S"]) -> Slots:
    """The slots after each active one took its sampled token."""
    num_sampled = slots.num_sampled + slots.is_active
    is_stop = jnp.any(token[:, None] == slots.stop_tokens, axis=-1)
    return slots._replace(
        token=jnp.where(slots.is_active, token, slots.token),
        position=slots.position + slots.is_active,
        num_sampled=num_sampled,
        is_active=slots.is_active & ~is_stop & (num_sampled < slots.max_tokens),
    )
