"""Llama 3 and those built like it, such as SmolLM2: no norms of heads, no biases unless asked for.

The same mathematics as transformers' `modeling_llama`: `attention_bias` gives all four attention
matrices a bias, `mlp_bias` all three of the MLP. The rotary scaling of Llama 3.1 and later is in
`blocks.rope_frequencies`.
"""

from __future__ import annotations

from jaxtyping import Array, Float

from codjax.models import blocks
from codjax.models.config import DecoderConfig
from codjax.models.family import Family, Field, Layer, ParamSpec, Rope, RunExperts


def layer_specs(config: DecoderConfig) -> dict[str, ParamSpec]:
    """Parameters of one layer."""
    bias = config.attention_bias
    attention = blocks.attention_specs(config, qkv_bias=bias, output_bias=bias)
    return attention | blocks.swiglu_specs(config, bias=config.mlp_bias)


def attention_inputs(
    layer: Layer, x: Float[Array, "B T D"], rope: Rope, config: DecoderConfig
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T M H"], Float[Array, "B T M H"]]:
    """Queries, keys and values; queries and keys turned."""
    del config
    q, k, v = blocks.projections(layer, x)
    return blocks.rotate(q, rope), blocks.rotate(k, rope), v


def mlp(
    layer: Layer, y: Float[Array, "B T D"], config: DecoderConfig, run_experts: RunExperts
) -> Float[Array, "B T D"]:
    """The gated MLP."""
    del config, run_experts
    return blocks.swiglu(layer, y)


FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    layer_specs=layer_specs,
    attention_inputs=attention_inputs,
    mlp=mlp,
    fields=(
        Field("attention_bias", "attention_bias", bool, False),
        Field("mlp_bias", "mlp_bias", bool, False),
    ),
    only={
        "rope_interleaved": (False, None)  # SmolLM2 says so; the other pairing is not transformers'
    },
    default_max_positions=2048,
    nullable=("head_dim", "num_key_value_heads"),
)
