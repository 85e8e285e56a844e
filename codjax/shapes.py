"""Sizes of published models under the keys of `config.model`, for plans without their folders.

    config.model.update(shapes.QWEN3_8B)

A run takes its sizes from the folder instead: with `model.source` set, these are not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_QWEN3: dict[str, Any] = {
    "vocab_size": 151936,
    "num_kv_heads": 8,
    "head_dim": 128,
    "rope_theta": 1e6,
    "norm_eps": 1e-6,
}
QWEN3_8B: Mapping[str, Any] = _QWEN3 | {
    "num_layers": 36,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_heads": 32,
    "tie_embeddings": False,
}
QWEN3_32B: Mapping[str, Any] = _QWEN3 | {
    "num_layers": 64,
    "hidden_size": 5120,
    "intermediate_size": 25600,
    "num_heads": 64,
    "tie_embeddings": False,
}
QWEN3_30B_A3B: Mapping[str, Any] = _QWEN3 | {
    "family": "qwen3_moe",
    "num_layers": 48,
    "hidden_size": 2048,
    "intermediate_size": 6144,  # of layers without experts, which it has not
    "num_kv_heads": 4,
    "num_heads": 32,
    "num_experts": 128,
    "experts_per_token": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "tie_embeddings": False,
}
