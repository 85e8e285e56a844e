"""Sizes and numerics of a decoder, and their Hugging Face spelling.

`DecoderConfig` has the keys of `config.model` (without `source`) and the size of the vocabulary,
which the tokenizer gives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

DTYPES = ("float32", "bfloat16")
REMATS = ("none", "dots", "full")

# Fields of transformers' Qwen3Config that must have one of these values; absent is fine too.
_HF_ONLY: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "attention_dropout": (0, None),
    "hidden_act": ("silu",),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
    "use_sliding_window": (False, None),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """What a decoder of the Qwen3 family is made of.

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

    def __post_init__(self) -> None:
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
        for name, allowed in (("dtype", DTYPES), ("param_dtype", DTYPES), ("remat", REMATS)):
            if getattr(self, name) not in allowed:
                found = getattr(self, name)
                raise ValueError(f"model.{name} must be one of {allowed}; got {found!r}.")

    @property
    def axis_sizes(self) -> dict[str, int]:
        """Size of every logical axis that sharding rules may cut."""
        return {
            "vocab": self.vocab_size,
            "embed": self.hidden_size,
            "heads": self.num_heads,
            "kv_heads": self.num_kv_heads,
            "mlp": self.intermediate_size,
        }

    @classmethod
    def from_hf(
        cls, fields: Mapping[str, Any], *, dtype: str, param_dtype: str, remat: str
    ) -> DecoderConfig:
        """The decoder that a Hugging Face `config.json` describes.

        Of the fields that transformers' own Qwen3 reads, each is honoured or, where we have no
        such thing, refused by name; sizes must be there, other absent fields have transformers'
        default. Fields that its Qwen3 does not read are not read here either.

        Args:
            fields: the parsed file; `model_type` must be "qwen3".
            dtype: of activations.
            param_dtype: of parameters.
            remat: see the class.

        Raises:
            ValueError: a field that we cannot honour, with its value.
        """
        _refuse_unsupported(fields)
        missing = [name for name in _HF_SIZES if fields.get(name) is None]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}.")
        num_kv_heads = fields.get("num_key_value_heads", 32)
        std = float(fields.get("initializer_range", 0.02))
        return cls(
            **{ours: int(fields[name]) for name, ours in _HF_SIZES.items()},
            num_kv_heads=int(num_kv_heads or fields["num_attention_heads"]),
            head_dim=int(fields.get("head_dim") or 128),
            rope_theta=_rope_theta(fields),
            norm_eps=float(fields.get("rms_norm_eps", 1e-6)),
            tie_embeddings=bool(fields.get("tie_word_embeddings", False)),
            init_std=std,
            embedding_std=std,
            dtype=dtype,
            param_dtype=param_dtype,
            remat=remat,
        )

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` of this decoder, as transformers and SGLang read it.

        `max_position_embeddings` is transformers' default, 32768; it bounds no computation.
        Both spellings of the rotary base are written, for transformers before and after 5.0.
        """
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            **{name: getattr(self, ours) for name, ours in _HF_SIZES.items()},
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "rms_norm_eps": self.norm_eps,
            "tie_word_embeddings": self.tie_embeddings,
            "initializer_range": self.init_std,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "use_sliding_window": False,
            "sliding_window": None,
            "max_position_embeddings": 32768,
            "torch_dtype": self.param_dtype,
        }


_HF_SIZES = {  # their name → ours
    "vocab_size": "vocab_size",
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_attention_heads": "num_heads",
}


def _refuse_unsupported(fields: Mapping[str, Any]) -> None:
    if fields.get("model_type") != "qwen3":
        raise ValueError(
            f"config.json has model_type {fields.get('model_type')!r}; codjax has the decoder of "
            "model_type 'qwen3' only."
        )
    for name, allowed in _HF_ONLY.items():
        if name in fields and fields[name] not in allowed:
            raise ValueError(
                f"config.json has {name} = {fields[name]!r}; codjax supports {allowed[0]!r} only."
            )
    other = set(fields.get("layer_types") or ()) - {"full_attention"}
    if other:
        raise ValueError(
            f"config.json has layer_types {sorted(other)}; codjax supports 'full_attention' only."
        )


def _rope_theta(fields: Mapping[str, Any]) -> float:
    """The rotary base, under whichever name it stands; transformers' default is 10000."""
    found = {}
    if fields.get("rope_theta") is not None:
        found["rope_theta"] = float(fields["rope_theta"])
    for name in ("rope_parameters", "rope_scaling"):
        settings = dict(fields.get(name) or {})
        kinds = {settings.pop(key, None) for key in ("rope_type", "type")} - {None, "default"}
        theta = settings.pop("rope_theta", None)
        if settings.pop("partial_rotary_factor", None) not in (None, 1):
            kinds.add("partial_rotary_factor")
        if kinds or settings:
            raise ValueError(
                f"config.json has {name} = {fields[name]!r}; codjax supports rope_type 'default' "
                "with a rope_theta only."
            )
        if theta is not None:
            found[name] = float(theta)
    if len(set(found.values())) > 1:
        raise ValueError(f"config.json gives different rotary bases: {found}.")
    return next(iter(found.values()), 10000.0)
