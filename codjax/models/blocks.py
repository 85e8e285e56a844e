"""Pieces that the families are put together from: parameters, projections, norms, rotation, MLP.

`*_specs` name the parameters of a piece, the function of the same name computes with them. `F` is
the width of the MLP; other letters are those of `codjax.types`.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from codjax.models.config import DecoderConfig
from codjax.models.family import Layer, ParamSpec, Rope

_VECTOR = ("norm",)  # logical axis of what is as wide as the activations


def attention_specs(
    config: DecoderConfig, *, qkv_bias: bool, output_bias: bool
) -> dict[str, ParamSpec]:
    """The norm before attention and its four matrices, with biases or without."""
    width, head, std = config.hidden_size, config.head_dim, config.init_std
    heads, kv_heads = config.num_heads, config.num_kv_heads
    to_kv = ParamSpec((width, kv_heads, head), ("embed", "kv_heads", "head_dim"), std)
    specs = {
        "attention_norm": ParamSpec((width,), _VECTOR, None),
        "query": ParamSpec((width, heads, head), ("embed", "heads", "head_dim"), std),
        "key": to_kv,
        "value": to_kv,
        "attention_output": ParamSpec((heads, head, width), ("heads", "head_dim", "embed"), std),
    }
    if qkv_bias:
        kv_bias = ParamSpec((kv_heads, head), ("kv_heads", "head_dim"), 0.0)
        specs["query_bias"] = ParamSpec((heads, head), ("heads", "head_dim"), 0.0)
        specs |= {"key_bias": kv_bias, "value_bias": kv_bias}
    if output_bias:
        specs["attention_output_bias"] = ParamSpec((width,), _VECTOR, 0.0)
    return specs


def head_norm_specs(config: DecoderConfig) -> dict[str, ParamSpec]:
    """Norms of every query and key head."""
    scale = ParamSpec((config.head_dim,), ("head_dim",), None)
    return {"query_norm": scale, "key_norm": scale}


def swiglu_specs(config: DecoderConfig, *, bias: bool = False) -> dict[str, ParamSpec]:
    """The norm before the MLP and its three matrices, with biases or without."""
    width, mlp, std = config.hidden_size, config.intermediate_size, config.init_std
    specs = {
        "mlp_norm": ParamSpec((width,), _VECTOR, None),
        "gate": ParamSpec((width, mlp), ("embed", "mlp"), std),
        "up": ParamSpec((width, mlp), ("embed", "mlp"), std),
        "down": ParamSpec((mlp, width), ("mlp", "embed"), std),
    }
    if bias:
        inner = ParamSpec((mlp,), ("mlp",), 0.0)
        specs |= {"gate_bias": inner, "up_bias": inner}
        specs["down_bias"] = ParamSpec((width,), _VECTOR, 0.0)
    return specs


def projections(
    layer: Layer, x: Float[Array, "B T D"]
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T M H"], Float[Array, "B T M H"]]:
    """Queries, keys and values of normalised activations, with the biases that the layer has."""
    q, k, v = (
        _with_bias(layer, f"{name}_bias", jnp.einsum("btd,dnh->btnh", x, layer[name]))
        for name in ("query", "key", "value")
    )
    return q, k, v


def attention_output(layer: Layer, attended: Float[Array, "B T N H"]) -> Float[Array, "B T D"]:
    """What the heads found, back at the width of the activations."""
    out = jnp.einsum("btnh,nhd->btd", attended, layer["attention_output"])
    return _with_bias(layer, "attention_output_bias", out)


def swiglu(layer: Layer, y: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """The gated MLP, ``(silu(y gate) * (y up)) down``, with the biases that the layer has."""
    gate = _with_bias(layer, "gate_bias", jnp.einsum("btd,df->btf", y, layer["gate"]))
    up = _with_bias(layer, "up_bias", jnp.einsum("btd,df->btf", y, layer["up"]))
    out = jnp.einsum("btf,fd->btd", jax.nn.silu(gate) * up, layer["down"])
    return _with_bias(layer, "down_bias", out)


def rms_norm(x: Float[Array, "... D"], scale: Float[Array, " D"], eps: float) -> Array:
    """``x / rms(x) * scale``; statistics in float32, rounded before the scale as transformers."""
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * inverse).astype(x.dtype) * jnp.expand_dims(scale, range(x.ndim - 1))


def rope_angles(token_positions: Int[Array, "B T"], config: DecoderConfig) -> Rope:
    """Cosine and sine of ``position * frequency``, float32; see `rope_frequencies`."""
    frequencies = rope_frequencies(config)
    angles = token_positions.astype(jnp.float32)[..., None] * frequencies[None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rope_frequencies(config: DecoderConfig) -> Float[Array, " half"]:
    """``theta ** (-2 i / H)`` for i below H / 2, scaled as the config says, float32.

    "linear" divides all of them by the factor. "llama3" (Llama 3.1) divides those that turn less
    than `low_freq_factor` times within `original_tokens`, keeps those that turn more than
    `high_freq_factor` times, and goes over from one to the other linearly in the turns.
    """
    exponents = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    slow = frequencies / scaling.factor
    if scaling.kind == "linear":
        return slow
    turns = scaling.original_tokens * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = jnp.clip(kept, 0.0, 1.0)
    return (1 - kept) * slow + kept * frequencies


def rotate(x: Float[Array, "B T N H"], rope: Rope) -> Float[Array, "B T N H"]:
    """Rotary embedding, channel `i` paired with `i + H / 2` (Hugging Face convention), float32."""
    cos, sin = (angle[:, :, None, :] for angle in rope)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def _with_bias(layer: Layer, name: str, x: Array) -> Array:
    if name not in layer:
        return x
    bias = layer[name]
    return x + jnp.expand_dims(bias, range(x.ndim - bias.ndim))
