"""What a family of decoders says of itself; one of these stands in each of the family files.

A family differs from the others in which parameters a layer has, in what it does with queries and
keys, in its MLP, and in the fields of its `config.json`. All else is `models/decoder.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxtyping import Array, Float, Int

from codjax.models.config import DecoderConfig

Layer = Mapping[str, Array]  # parameters of one layer, in the compute dtype, by name
Rope = tuple[Float[Array, "B T half"], Float[Array, "B T half"]]  # cosines and sines


class Chosen(NamedTuple):
    """The experts of every token, likeliest first."""

    weights: Float[Array, "B T K"]
    expert_ids: Int[Array, "B T K"]


class Tables(NamedTuple):
    """The matrices of all experts of a layer."""

    gate: Float[Array, "E D F"]
    up: Float[Array, "E D F"]
    down: Float[Array, "E F D"]


RunExperts = Callable[[Float[Array, "B T D"], Chosen, Tables], Array]  # → [B T D]


class ParamSpec(NamedTuple):
    """A parameter before it has a value."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]  # logical, one a dimension; `codjax.sharding` maps them to mesh axes
    init_std: float | None  # of its first values: None: ones, 0: zeros


class Field(NamedTuple):
    """A field of a family's `config.json` that `DecoderConfig` has too."""

    hf_name: str
    name: str  # in `DecoderConfig`
    kind: type
    default: Any = None  # transformers' own; None: it must be there
    may_be_zero: bool = False  # else a number must be above


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One family.

    Attributes:
        model_type: its name, in `config.json` and in `config.model.family`.
        architecture: transformers' class.
        layer_specs: parameters of one layer by name, without the layer axis.
        attention_inputs: ``(layer, x, rope, config) -> (q, k, v)`` from the normalised input.
        mlp: ``(layer, y, config, run_experts) -> [B T D]`` from the normalised input.
        fields: what its `config.json` has besides `hf_config.COMMON`.
        only: fields of its `config.json` that must have one of these values; absent is fine.
        default_head_dim: transformers' head size where the field is absent; None for D / N.
        default_kv_heads: transformers' key-value heads where it is absent; None for N.
        default_max_positions: transformers' max_position_embeddings where it is absent.
        nullable: which of `head_dim` and `num_key_value_heads` may be null, for D / N and N;
            transformers refuses it, or fails, elsewhere.
    """

    model_type: str
    architecture: str
    layer_specs: Callable[[DecoderConfig], dict[str, ParamSpec]]
    attention_inputs: Callable[
        [Layer, Array, Rope, DecoderConfig],
        tuple[Float[Array, "B T N H"], Float[Array, "B T M H"], Float[Array, "B T M H"]],
    ]
    mlp: Callable[[Layer, Array, DecoderConfig, RunExperts], Array]
    fields: tuple[Field, ...] = ()
    only: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    default_head_dim: int | None = None
    default_kv_heads: int | None = None
    default_max_positions: int = 32768
    nullable: tuple[str, ...] = ()
