"""`config.json` of a Hugging Face folder ↔ `DecoderConfig`: every setting honoured, or refused.

"Setting" is what transformers' own class of the family reads. What it does not read, such as
`architectures` or `transformers_version`, is not read here either; of what it does read, only what
changes no number (caches, special tokens, auxiliary losses of pre-training) is passed over.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from codjax.models import families
from codjax.models.config import ROPE_SCALINGS, DecoderConfig, RopeScaling
from codjax.models.family import Family, Field

COMMON = (
    Field("vocab_size", "vocab_size", int),
    Field("num_hidden_layers", "num_layers", int),
    Field("hidden_size", "hidden_size", int),
    Field("intermediate_size", "intermediate_size", int),
    Field("num_attention_heads", "num_heads", int),
    Field("rms_norm_eps", "norm_eps", float, 1e-6),
    Field("tie_word_embeddings", "tie_embeddings", bool, False),
    Field("initializer_range", "init_std", float, 0.02),
    Field("max_position_embeddings", "max_positions", int, 32768),
)
# Fields that must have one of these values, in every family; absent is fine too.
_ONLY: dict[str, tuple[Any, ...]] = {
    "attention_dropout": (0, None),
    "hidden_act": ("silu",),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
}
_ALIASES = {"num_local_experts": "num_experts"}  # transformers' own of Qwen3Moe
_SCALING = {  # name in `rope_parameters` → ours
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_tokens",
}
_SCALING_NAMES = {"linear": ("factor",), "llama3": tuple(_SCALING)}


def read(fields: Mapping[str, Any], *, dtype: str, param_dtype: str, remat: str) -> DecoderConfig:
    """The decoder that a `config.json` describes.

    Sizes must be there; other absent fields have transformers' default.

    Args:
        fields: the parsed file.
        dtype: of activations.
        param_dtype: of parameters.
        remat: see `DecoderConfig`.

    Raises:
        ValueError: a field that we cannot honour, with its value.
    """
    family = _family(fields)
    fields = {_ALIASES.get(name, name): value for name, value in fields.items()}
    _refuse_unsupported(fields, family)
    ours: dict[str, Any] = {}
    missing = []
    for field in (*COMMON, *family.fields):
        value = fields.get(field.hf_name)
        value = field.default if value is None else value
        if value is None:
            missing.append(field.hf_name)
        else:
            ours[field.name] = field.kind(value)
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}.")
    num_heads = ours["num_heads"]
    head_dim = fields.get("head_dim") or family.default_head_dim
    rope_theta, rope_scaling = _rope(fields)
    return DecoderConfig(
        **ours,
        family=family.model_type,
        num_kv_heads=_num_kv_heads(fields, family, num_heads),
        head_dim=int(head_dim or ours["hidden_size"] // num_heads),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        embedding_std=ours["init_std"],
        dtype=dtype,
        param_dtype=param_dtype,
        remat=remat,
    )


def write(config: DecoderConfig) -> dict[str, Any]:
    """The `config.json` of a decoder, as transformers and SGLang read it.

    Both spellings of the rotary settings are written, for transformers before and after 5.0.
    """
    family = families.of(config)
    settings: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling is not None:
        kind = config.rope_scaling.kind
        settings = {"rope_type": kind} | {
            name: getattr(config.rope_scaling, _SCALING[name]) for name in _SCALING_NAMES[kind]
        }
    fixed = {**_ONLY, **family.only}
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **{field.hf_name: getattr(config, field.name) for field in (*COMMON, *family.fields)},
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rope_theta": config.rope_theta,
        "rope_parameters": settings | {"rope_theta": config.rope_theta},
        **({} if config.rope_scaling is None else {"rope_scaling": settings}),
        **{name: fixed[name][0] for name in fixed if name not in _UNWRITTEN},
        "attention_dropout": 0.0,
        "torch_dtype": config.param_dtype,
    }


# Absent is what they are in most published files.
_UNWRITTEN = (
    "attention_dropout",
    "partial_rotary_factor",
    "quantization_config",
    "rope_interleaved",
)


def _family(fields: Mapping[str, Any]) -> Family:
    model_type = fields.get("model_type")
    if model_type not in families.FAMILIES:
        names = ", ".join(repr(name) for name in families.FAMILIES)
        raise ValueError(
            f"config.json has model_type {model_type!r}; codjax has the decoders of {names} only."
        )
    return families.FAMILIES[model_type]


def _refuse_unsupported(fields: Mapping[str, Any], family: Family) -> None:
    for name, allowed in ({**_ONLY, **family.only}).items():
        if name in fields and fields[name] not in allowed:
            raise ValueError(
                f"config.json has {name} = {fields[name]!r}; codjax supports {allowed[0]!r} only."
            )
    other = set(fields.get("layer_types") or ()) - {"full_attention"}
    if other:
        raise ValueError(
            f"config.json has layer_types {sorted(other)}; codjax supports 'full_attention' only."
        )


def _num_kv_heads(fields: Mapping[str, Any], family: Family, num_heads: int) -> int:
    """An absent field is the family's default, null is as many as there are heads."""
    if "num_key_value_heads" in fields:
        return int(fields["num_key_value_heads"] or num_heads)
    return family.default_kv_heads or num_heads


def _rope(fields: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary frequencies, under whichever names they stand.

    transformers' default base is 10000.
    """
    bases: dict[str, float] = {}
    scalings: dict[str, RopeScaling | None] = {}
    if fields.get("rope_theta") is not None:
        bases["rope_theta"] = float(fields["rope_theta"])
    for name in ("rope_parameters", "rope_scaling"):
        settings = dict(fields.get(name) or {})
        if not settings:
            continue
        theta = settings.pop("rope_theta", None)
        if theta is not None:
            bases[name] = float(theta)
        scalings[name] = _scaling(name, settings, fields)
    for what, found in (("bases", bases), ("scalings", scalings)):
        if len(set(found.values())) > 1:
            raise ValueError(f"config.json gives different rotary {what}: {found}.")
    return next(iter(bases.values()), 10000.0), next(iter(scalings.values()), None)


def _scaling(name: str, settings: dict[str, Any], fields: Mapping[str, Any]) -> RopeScaling | None:
    """The scaling that one of the two spellings asks for; None for none."""
    kinds = {settings.pop(key, None) for key in ("rope_type", "type")} - {None}
    kind = kinds.pop() if len(kinds) == 1 else "default" if not kinds else None
    if settings.pop("partial_rotary_factor", None) not in (None, 1):
        kind = None
    needed = _SCALING_NAMES.get(kind, ()) if kind else ()
    if kind == "llama3" and fields.get("max_position_embeddings"):
        settings.setdefault("original_max_position_embeddings", fields["max_position_embeddings"])
    if kind not in ("default", *ROPE_SCALINGS) or set(settings) != set(needed):
        raise ValueError(
            f"config.json has {name} = {fields[name]!r}; codjax supports rope_type 'default', "
            f"'linear' with a factor, and 'llama3' with {', '.join(_SCALING)}."
        )
    if kind == "default":
        return None
    values = {_SCALING[key]: value for key, value in settings.items()}
    return RopeScaling(kind=kind, **values)
