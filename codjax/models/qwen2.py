"""Qwen2 and Qwen2.5: no norms of heads; queries, keys and values always have a bias.

The same mathematics as transformers' `modeling_qwen2`; but for the biases, that of `llama.py`.
"""

from __future__ import annotations

from codjax.models import blocks, llama
from codjax.models.config import DecoderConfig
from codjax.models.family import Family, ParamSpec


def layer_specs(config: DecoderConfig) -> dict[str, ParamSpec]:
    """Parameters of one layer."""
    attention = blocks.attention_specs(config, qkv_bias=True, output_bias=False)
    return attention | blocks.swiglu_specs(config)


FAMILY = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    layer_specs=layer_specs,
    attention_inputs=llama.attention_inputs,
    mlp=llama.mlp,
    only={"use_sliding_window": (False, None)},
    default_kv_heads=32,
    nullable=("num_key_value_heads",),
)
