"""Decoding with a key-value cache: what `Decoder.__call__` computes, a few tokens at a time.

    cache = init_cache(model.config, num_rows=8, num_tokens=512)
    hidden, cache = extend(model, cache, prompt, jnp.zeros(8, jnp.int32))     # prefill
    hidden, cache = extend(model, cache, next_token[:, None], lengths)        # decode

Row `r` of the cache belongs to one sequence, token `t` of it stands at index `t`, and what stands
at or after the `start` given to `extend` is never read: rows are taken back by starting lower.
Jit `extend` with the cache donated, and it is written in place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from codjax.models import blocks, decoder
from codjax.models.config import DecoderConfig

_MASKED = -1e30  # finite, so that no mask can make a nan


class KVCache(NamedTuple):
    """Keys, turned to their positions, and values of all layers; R rows of T tokens."""

    keys: jax.Array  # dtype of the model [L R T M H]
    values: jax.Array  # dtype of the model [L R T M H]


def init_cache(config: DecoderConfig, num_rows: int, num_tokens: int) -> KVCache:
    """An empty cache for `num_rows` sequences of at most `num_tokens` tokens."""
    shape = (config.num_layers, num_rows, num_tokens, config.num_kv_heads, config.head_dim)
    return KVCache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))


def extend(
    model: decoder.Decoder, cache: KVCache, tokens: Int[Array, "R C"], start: Int[Array, " R"]
) -> tuple[Float[Array, "R C D"], KVCache]:
    """Append C tokens to every row: one is decoding, several are a chunk of a prompt.

    Every token sees the cache of its own row before `start` and the appended tokens up to
    itself. No row depends on another. Scores take ``4 R N C (T + C)`` bytes, one layer at a time.

    Args:
        model: the decoder.
        cache: as made by `init_cache` for its config.
        tokens: ids to append.
        start: index of the first of them in each row. Tokens whose index is past the end of the
            cache are computed but not stored.

    Returns:
        Hidden states after the final norm, and the cache with the tokens' keys and values.
    """
    config = model.config
    positions = start[:, None] + jnp.arange(tokens.shape[1])[None, :]
    rope = blocks.rope_angles(positions, config)
    bias = _bias(start, num_cached=cache.keys.shape[2], num_new=tokens.shape[1])

    def run_layer(x: Array, inputs: tuple[Mapping[str, Array], KVCache]) -> tuple[Array, KVCache]:
        stored, cached = inputs
        layer = decoder.in_compute_dtype(stored, config)
        q, k, v = decoder.attention_inputs(layer, x, rope, config)
        attended = _attend(q, cached, KVCache(k, v), bias)
        return decoder.layer_output(layer, x, attended, config), KVCache(k, v)

    # The layers only read the cache; all of them are written at once behind the loop, which
    # can then be done in place.
    x, new = jax.lax.scan(run_layer, model.embed(tokens), (model.layer_arrays(), cache))
    rows = jnp.arange(tokens.shape[0])[:, None]
    cache = KVCache(
        *(old.at[:, rows, positions].set(x, mode="drop") for old, x in zip(cache, new, strict=True))
    )
    return model.normalise(x), cache


def _bias(start: Int[Array, " R"], *, num_cached: int, num_new: int) -> Float[Array, "R C S"]:
    """0 where an appended token may look, among the cached tokens and then the appended ones."""
    rows = start.shape[0]
    sees_cached = jnp.arange(num_cached)[None, None, :] < start[:, None, None]
    sees_cached = jnp.broadcast_to(sees_cached, (rows, num_new, num_cached))
    sees_new = jnp.broadcast_to(jnp.tri(num_new, dtype=bool)[None], (rows, num_new, num_new))
    return jnp.where(jnp.concatenate([sees_cached, sees_new], axis=-1), 0.0, _MASKED)


def _attend(
    q: Float[Array, "R C N H"],
    cached: KVCache,
    new: KVCache,
    bias: Float[Array, "R C S"],
) -> Float[Array, "R C N H"]:
    """Softmax attention over the cached and the appended tokens of the row."""
    rows, num_new, num_heads, head_dim = q.shape
    num_kv_heads, num_cached = cached.keys.shape[2], cached.keys.shape[1]
    q = q.reshape(rows, num_new, num_kv_heads, num_heads // num_kv_heads, head_dim)

    def scores(keys: Array) -> Array:
        return jnp.einsum("rcmgh,rtmh->rmgct", q, keys, preferred_element_type=jnp.float32)

    def mix(weights: Array, values: Array) -> Array:
        return jnp.einsum(
            "rmgct,rtmh->rcmgh",
            weights.astype(values.dtype),
            values,
            preferred_element_type=jnp.float32,
        )

    both = jnp.concatenate([scores(cached.keys), scores(new.keys)], axis=-1)
    weights = jax.nn.softmax(both / math.sqrt(head_dim) + bias[:, None, None], axis=-1)
    out = mix(weights[..., :num_cached], cached.values) + mix(weights[..., num_cached:], new.values)
    return out.reshape(rows, num_new, num_heads, head_dim).astype(q.dtype)
