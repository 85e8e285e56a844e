"""Sizes and numerics of a decoder.

`DecoderConfig` has the keys of `config.model` (without `source`) and the size of the vocabulary,
which the tokenizer gives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

DTYPES = ("float32", "bfloat16")
REMATS = ("none", "dots", "full")

FAMILIES = ("qwen3", "qwen2", "llama", "qwen3_moe")  # each has a file; see models/families.py
ROPE_SCALINGS = ("linear", "llama3")
_OF_EXPERTS = ("num_experts", "experts_per_token", "moe_intermediate_size")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are lowered for texts longer than those of pre-training.

    Attributes:
        kind: "linear" | "llama3"; see `blocks.rope_frequencies`.
        factor: by which a frequency is divided, at least 1.
        low_freq_factor: "llama3": turns below which a frequency is divided.
        high_freq_factor: "llama3": turns above which it is kept.
        original_tokens: "llama3": the tokens in which turns are counted.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_tokens: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ROPE_SCALINGS:
            raise ValueError(f"rope scaling must be one of {ROPE_SCALINGS}; got {self.kind!r}.")
        if not self.factor >= 1:
            raise ValueError(f"the factor of rope scaling must be at least 1; got {self.factor}.")
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                "rope scaling needs 0 < low_freq_factor < high_freq_factor; got "
                f"{self.low_freq_factor} and {self.high_freq_factor}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """What a decoder is made of.

    The fields with a default are those that some families do not have.

    Attributes:
        vocab_size: V.
        num_layers: L.
        hidden_size: D.
        intermediate_size: width of the MLP.
        num_heads: N.
        num_kv_heads: M, divides N.
        head_dim: H, even.
        rope_theta: base of the rotary wavelengths, in tokens.
        norm_eps: added to the mean square in every RMSNorm.
        tie_embeddings: the token table is the output table too.
        init_std: standard deviation of fresh matrices.
        embedding_std: standard deviation of a fresh token table.
        dtype: "float32" | "bfloat16", of activations and matrix products.
        param_dtype: the same, of parameters.
        remat: what the backward pass computes again: "none", "dots" (all but matrix products
            without batch dimensions), "full" (all but the input of each layer).
        family: one of `FAMILIES`.
        attention_bias: whether the attention matrices have biases ("qwen2" has its own anyway).
        mlp_bias: whether those of the MLP have ("llama").
        rope_scaling: None for the plain frequencies.
        max_positions: as published, for whoever serves an export; bounds no computation here.
        num_experts: E of "qwen3_moe".
        experts_per_token: K of them for each token.
        moe_intermediate_size: width of an expert.
        norm_topk_prob: whether the weights of a token's experts sum to 1.
    """

    vocab_size: int
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    norm_eps: float
    tie_embeddings: bool
    init_std: float
    embedding_std: float
    dtype: str
    param_dtype: str
    remat: str
    family: str = "qwen3"
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_scaling: RopeScaling | None = None
    max_positions: int = 32768
    num_experts: int = 0
    experts_per_token: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.rope_scaling, Mapping):  # of a config that was written as JSON
            object.__setattr__(self, "rope_scaling", RopeScaling(**self.rope_scaling))
        sizes = ("num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads")
        for name in ("vocab_size", *sizes, "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} must be at least 1; got {getattr(self, name)}.")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads must be a multiple of model.num_kv_heads = {self.num_kv_heads}: "
                f"each key-value head serves equally many heads; got {self.num_heads}."
            )
        if self.head_dim % 2:
            raise ValueError(
                "model.head_dim must be even: rotary embedding turns pairs of channels; got "
                f"{self.head_dim}."
            )
        names = {"dtype": DTYPES, "param_dtype": DTYPES, "remat": REMATS, "family": FAMILIES}
        for name, allowed in names.items():
            if getattr(self, name) not in allowed:
                found = getattr(self, name)
                raise ValueError(f"model.{name} must be one of {allowed}; got {found!r}.")
        self._check_experts()

    def _check_experts(self) -> None:
        for name in _OF_EXPERTS:
            found = getattr(self, name)
            if self.family == "qwen3_moe" and found < 1:
                raise ValueError(
                    f"model.{name} must be at least 1 with model.family qwen3_moe; got {found}."
                )
            if self.family != "qwen3_moe" and found:
                raise ValueError(
                    f"model.{name} must be 0 with model.family {self.family}, which has no "
                    f"experts; got {found}."
                )
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"model.experts_per_token must be at most model.num_experts = {self.num_experts}; "
                f"got {self.experts_per_token}."
            )

    @property
    def axis_sizes(self) -> dict[str, int]:
        """Size of every logical axis that sharding rules may cut."""
        sizes = {
            "vocab": self.vocab_size,
            "embed": self.hidden_size,
            "heads": self.num_heads,
            "kv_heads": self.num_kv_heads,
            "mlp": self.moe_intermediate_size or self.intermediate_size,
        }
        return sizes | ({"experts": self.num_experts} if self.num_experts else {})

    @classmethod
    def from_hf(
        cls, fields: Mapping[str, Any], *, dtype: str, param_dtype: str, remat: str
    ) -> DecoderConfig:
        """The decoder that a Hugging Face `config.json` describes; see `hf_config.read`."""
        from codjax.models import hf_config  # it and the families know this class

        return hf_config.read(fields, dtype=dtype, param_dtype=param_dtype, remat=remat)

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` of this decoder; see `hf_config.write`."""
        from codjax.models import hf_config

        return hf_config.write(self)
