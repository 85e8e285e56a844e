"""`config.json` of a Hugging Face folder ↔ `DecoderConfig`: every setting honoured, or refused.

"Setting" is what transformers' own class of the family reads. What it does not read, such as
`architectures` or `transformers_version`, is not read here either; of what it does read, only what
changes no number (caches, special tokens, auxiliary losses of pre-training) is passed over.
"""

from __future__ import annotations

import sys
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
    Field("initializer_range", "init_std", float, 0.02, may_be_zero=True),
)
# Fields that must have one of these values, in every family; absent is fine too.
_ONLY: dict[str, tuple[Any, ...]] = {
    "attention_dropout": (0, None),
    "dual_chunk_attention_config": (None,),  # of Qwen2.5-1M; transformers does not read it
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
_KINDS: dict[type, tuple[tuple[type, ...], str]] = {  # of ours: types in JSON, in words
    int: ((int,), "a whole number"),
    float: ((int, float), "a finite number"),
    bool: ((bool,), "true or false"),
}


def read(fields: Mapping[str, Any], *, dtype: str, param_dtype: str, remat: str) -> DecoderConfig:
    """The decoder that a `config.json` describes.

    Sizes must be there; other absent fields have transformers' default. Values must be of the kind
    that transformers asks for; null is none, but where transformers takes it.

    Args:
        fields: the parsed file.
        dtype: of activations.
        param_dtype: of parameters.
        remat: see `DecoderConfig`.

    Raises:
        ValueError: a field that we cannot honour, with its value.
    """
    family = _family(fields)
    fields = _with_one_name_each(fields)
    _refuse_unsupported(fields, family)
    read = _fields(family)
    missing = [f.hf_name for f in read if f.default is None and f.hf_name not in fields]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}.")
    ours: dict[str, Any] = {field.name: _value(fields, field) for field in read}
    num_heads = ours["num_heads"]
    head_dim = _head_size(fields, family, "head_dim", family.default_head_dim)
    num_kv_heads = _head_size(fields, family, "num_key_value_heads", family.default_kv_heads)
    rope_theta, rope_scaling = _rope(fields, ours["max_positions"])
    try:
        return DecoderConfig(
            **ours,
            family=family.model_type,
            num_kv_heads=num_kv_heads or num_heads,
            head_dim=head_dim or ours["hidden_size"] // num_heads,
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            embedding_std=ours["init_std"],
            dtype=dtype,
            param_dtype=param_dtype,
            remat=remat,
        )
    except ValueError as error:
        raise ValueError(f"config.json describes no decoder of ours: {error}") from error


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
        **{field.hf_name: getattr(config, field.name) for field in _fields(family)},
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
    "dual_chunk_attention_config",
    "partial_rotary_factor",
    "quantization_config",
    "rope_interleaved",
)


def _family(fields: Mapping[str, Any]) -> Family:
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in families.FAMILIES:
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
    layer_types = fields.get("layer_types") or []
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise ValueError(
            f"config.json has layer_types = {layer_types!r}; codjax supports a list of "
            "'full_attention' only."
        )


def _with_one_name_each(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields, with those that have two names under the first that was published."""
    named = dict(fields)
    for alias, name in _ALIASES.items():
        if alias not in fields:
            continue
        if name in fields and fields[name] != fields[alias]:
            raise ValueError(
                f"config.json has {alias} = {fields[alias]!r} and {name} = {fields[name]!r}, "
                "which are the same setting; make them equal."
            )
        named[name] = named.pop(alias)
    return named


def _fields(family: Family) -> tuple[Field, ...]:
    """What is read of a config.json as it stands."""
    max_positions = Field(
        "max_position_embeddings", "max_positions", int, family.default_max_positions
    )
    return (*COMMON, max_positions, *family.fields)


def _value(fields: Mapping[str, Any], field: Field) -> Any:
    if field.hf_name not in fields:
        return field.default
    value = fields[field.hf_name]
    return _checked(value, field.hf_name, field.kind, may_be_zero=field.may_be_zero)


def _checked(value: Any, name: str, kind: type, *, may_be_zero: bool = False) -> Any:
    """A value of the kind, not another that Python would take for one; numbers above 0."""
    types, words = _KINDS[kind]
    ok = isinstance(value, types) and isinstance(value, bool) == (kind is bool)
    if ok and kind is float:
        ok = abs(value) <= sys.float_info.max  # neither infinite nor nan
    if not ok:
        raise ValueError(f"config.json has {name} = {value!r}; it must be {words}.")
    if kind is not bool and (value < 0 or (value == 0 and not may_be_zero)):
        least = "at least 0" if may_be_zero else "above 0"
        raise ValueError(f"config.json has {name} = {value!r}; it must be {least}.")
    return kind(value)


def _head_size(
    fields: Mapping[str, Any], family: Family, name: str, default: int | None
) -> int | None:
    """A size that has a default in some families; None where the other sizes give it."""
    if name not in fields:
        return default
    if fields[name] is None and name in family.nullable:
        return None
    return _checked(fields[name], name, int)


def _rope(fields: Mapping[str, Any], max_positions: int) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary frequencies, under whichever names they stand.

    transformers' default base is 10000.
    """
    bases: dict[str, float] = {}
    scalings: dict[str, RopeScaling | None] = {}
    if fields.get("rope_theta") is not None:
        bases["rope_theta"] = _checked(fields["rope_theta"], "rope_theta", float)
    for name in ("rope_parameters", "rope_scaling"):
        settings = fields.get(name)
        if settings is not None and not isinstance(settings, Mapping):
            raise ValueError(f"config.json has {name} = {settings!r}; it must be an object.")
        if not settings:
            continue
        settings = dict(settings)
        theta = settings.pop("rope_theta", None)
        if theta is not None:
            bases[name] = _checked(theta, f"{name}.rope_theta", float)
        scalings[name] = _scaling(name, settings, fields[name], max_positions)
    if (
        not bases and "rope_theta" in fields
    ):  # null, and no other: transformers fails at its first use
        _checked(fields["rope_theta"], "rope_theta", float)
    for what, found in (("bases", bases), ("scalings", scalings)):
        if len(set(found.values())) > 1:
            raise ValueError(f"config.json gives different rotary {what}: {found}.")
    return next(iter(bases.values()), 10000.0), next(iter(scalings.values()), None)


def _scaling(
    name: str, settings: dict[str, Any], written: Any, max_positions: int
) -> RopeScaling | None:
    """The scaling that one of the two spellings asks for; None for none.

    Args:
        name: of the spelling.
        settings: its fields, but the base; used up.
        written: the whole of it, for messages.
        max_positions: tokens of pre-training where the settings do not say them.
    """
    kinds = [settings.pop(key, None) for key in ("rope_type", "type")]
    kinds = [kind for kind in kinds if kind is not None] or ["default"]
    is_known = all(kind == kinds[0] for kind in kinds) and kinds[0] in ("default", *ROPE_SCALINGS)
    is_whole = settings.pop("partial_rotary_factor", None) in (None, 1)
    if kinds[0] == "llama3":
        settings.setdefault("original_max_position_embeddings", max_positions)
    needed = _SCALING_NAMES.get(kinds[0], ()) if is_known else ()
    if not is_known or not is_whole or set(settings) != set(needed):
        raise ValueError(
            f"config.json has {name} = {written!r}; codjax supports rope_type 'default', "
            f"'linear' with a factor, and 'llama3' with {', '.join(_SCALING)}."
        )
    if kinds[0] == "default":
        return None
    values = {
        _SCALING[key]: _checked(value, f"{name}.{key}", int if "max" in key else float)
        for key, value in settings.items()
    }
    try:
        return RopeScaling(kind=kinds[0], **values)
    except ValueError as error:
        raise ValueError(f"config.json has {name} = {written!r}: {error}") from error
