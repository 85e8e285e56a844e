"""Qwen3, dense: every query and key head has a norm of its own before it is turned.

The same mathematics as transformers' `modeling_qwen3`. `attention_bias`, which no published model
sets, gives all four attention matrices a bias.
"""

from __future__ import annotations

from jaxtyping import Array, Float

from codjax.models import blocks
from codjax.models.config import DecoderConfig
from codjax.models.family import Family, Field, Layer, ParamSpec, Rope, RunExperts


def layer_specs(config: DecoderConfig) -> dict[str, ParamSpec]:
    """Parameters of one layer."""
    return attention_specs(config) | blocks.swiglu_specs(config)


def attention_specs(config: DecoderConfig) -> dict[str, ParamSpec]:
    """Those of its attention."""
    bias = config.attention_bias
    matrices = blocks.attention_specs(config, qkv_bias=bias, output_bias=bias)
    return matrices | blocks.head_norm_specs(config)


def attention_inputs(
    layer: Layer, x: Float[Array, "B T D"], rope: Rope, config: DecoderConfig
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T M H"], Float[Array, "B T M H"]]:
    """Queries, keys and values; queries and keys normalised and turned."""
    q, k, v = blocks.projections(layer, x)
    q = blocks.rms_norm(q, layer["query_norm"], config.norm_eps)
    k = blocks.rms_norm(k, layer["key_norm"], config.norm_eps)
    return blocks.rotate(q, rope), blocks.rotate(k, rope), v


def mlp(
    layer: Layer, y: Float[Array, "B T D"], config: DecoderConfig, run_experts: RunExperts
) -> Float[Array, "B T D"]:
    """The gated MLP."""
    del config, run_experts
    return blocks.swiglu(layer, y)


FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    layer_specs=layer_specs,
    attention_inputs=attention_inputs,
    mlp=mlp,
    fields=(Field("attention_bias", "attention_bias", bool, False),),
    only={"use_sliding_window": (False, None)},
    default_head_dim=128,
    default_kv_heads=32,
    nullable=("num_key_value_heads",),
)
