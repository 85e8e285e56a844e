"""Qwen3 with a mixture of experts in every layer, such as Qwen3-30B-A3B; attention as `qwen3.py`.

The same mathematics as transformers' `modeling_qwen3_moe`: the router's probabilities over all
experts, in float32, the largest `experts_per_token` of them, divided by their sum if
`norm_topk_prob`. No token is dropped. The auxiliary loss that balances experts in pre-training is
not part of the objective here. Layers without experts among those with (`mlp_only_layers`,
`decoder_sparse_step`), which no published model has, are refused.
"""

from __future__ import annotations

from jaxtyping import Array, Float

from codjax.models import experts, qwen3
from codjax.models.config import DecoderConfig
from codjax.models.family import Family, Field, Layer, ParamSpec, RunExperts, Tables


def layer_specs(config: DecoderConfig) -> dict[str, ParamSpec]:
    """Parameters of one layer."""
    return qwen3.attention_specs(config) | experts.specs(config)


def mlp(
    layer: Layer, y: Float[Array, "B T D"], config: DecoderConfig, run_experts: RunExperts
) -> Float[Array, "B T D"]:
    """The weighted sum of what the chosen experts say of each token."""
    chosen = experts.route(
        y, layer["router"], num_chosen=config.experts_per_token, normalise=config.norm_topk_prob
    )
    return run_experts(y, chosen, Tables(layer["gate"], layer["up"], layer["down"]))


FAMILY = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    layer_specs=layer_specs,
    attention_inputs=qwen3.attention_inputs,
    mlp=mlp,
    fields=(
        Field("attention_bias", "attention_bias", bool, False),
        Field("num_experts", "num_experts", int),
        Field("num_experts_per_tok", "experts_per_token", int),
        Field("moe_intermediate_size", "moe_intermediate_size", int),
        Field("norm_topk_prob", "norm_topk_prob", bool, False),
    ),
    only={
        "use_sliding_window": (False, None),
        "decoder_sparse_step": (1,),
        "mlp_only_layers": ([], None),
    },
    default_kv_heads=4,
)
