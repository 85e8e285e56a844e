"""The table of families: `model_type` of a `config.json`, or `config.model.family`, → its file."""

from __future__ import annotations

from codjax.models import llama, qwen2, qwen3, qwen3_moe
from codjax.models.config import DecoderConfig
from codjax.models.family import Family

FAMILIES: dict[str, Family] = {
    module.FAMILY.model_type: module.FAMILY for module in (qwen3, qwen2, llama, qwen3_moe)
}


def of(config: DecoderConfig) -> Family:
    """The family of a decoder."""
    return FAMILIES[config.family]
