"""Environments: one file each, and the table that names them.

env = make("frozen_lake_obscure", agent_max_steps=10)
record = sample_records("frozen_lake_obscure", n=1)[0]
first_observation = env.reset(record, pack_seed=7, slot=0, pack_size=4)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from codjax.envs import frozen_lake, frozen_lake_compact, options
from codjax.envs.protocol import (
    Environment,
    EnvironmentSpec,
    EpisodeResult,
    Record,
    StepResult,
)

__all__ = [
    "ENVIRONMENTS",
    "SPLITS",
    "Environment",
    "EnvironmentSpec",
    "EpisodeResult",
    "Record",
    "StepResult",
    "check",
    "load_records",
    "make",
    "sample_records",
]

ENVIRONMENTS: Mapping[str, EnvironmentSpec] = {
    "frozen_lake_obscure": frozen_lake.SPEC,
    "frozen_lake_compact": frozen_lake_compact.SPEC,
}
SPLITS = ("train", "test")


def make(name: str, /, **settings: Any) -> Environment:
    """A new environment.

    Args:
        name: a key of `ENVIRONMENTS`.
        settings: overrides of its settings.

    Raises:
        ValueError: unknown name or setting (the message gives the nearest valid one and all of
            them), or a value of a wrong type or out of range.
    """
    spec = _spec(name)
    return spec.make(_build_settings(name, settings))


def load_records(
    name: str,
    *,
    split: str,
    num_records: int | None = None,
    data: Mapping[str, Any] | None = None,
) -> Sequence[Record]:
    """Task records of a split, always the same for the same arguments.

    Args:
        name: a key of `ENVIRONMENTS`.
        split: "train" or "test".
        num_records: how many, from the start of the split; None for all. Does not change which
            records they are.
        data: overrides of the environment's data options.

    Raises:
        ValueError: as `check`.
    """
    spec = _spec(name)
    data_options = _build_data(name, data or {})
    available = _check_split(name, split, data_options, num_records)
    return spec.records(data_options, split, available if num_records is None else num_records)


def sample_records(name: str, n: int) -> list[Record]:
    """The first `n` rows of the environment's default test set."""
    return list(load_records(name, split="test", num_records=n))


def check(
    name: str,
    settings: Mapping[str, Any],
    data: Mapping[str, Any],
    split: str,
    num_records: int | None = None,
) -> None:
    """Checks a task set's environment part without drawing a record or building anything.

    Raises:
        ValueError: unknown environment, setting, data option or split; a value of a wrong type
            or out of range; more records than the split has.
    """
    _build_settings(name, settings)
    _check_split(name, split, _build_data(name, data), num_records)


def _spec(name: str) -> EnvironmentSpec:
    if name not in ENVIRONMENTS:
        raise ValueError(options.unknown(name, ENVIRONMENTS, what="environment"))
    return ENVIRONMENTS[name]


def _build_settings(name: str, settings: Mapping[str, Any]) -> Any:
    spec, named = _spec(name), {}
    for key, value in dict(settings).items():
        own = spec.aliases.get(key, key)
        if own in named:
            raise ValueError(f"{name}: settings.{key} and settings.{own} are the same: set one.")
        named[own] = value
    return options.build(spec.settings, named, label=f"{name}: settings")


def _build_data(name: str, data: Mapping[str, Any]) -> Any:
    return options.build(_spec(name).data, data, label=f"{name}: data")


def _check_split(name: str, split: str, data_options: Any, num_records: int | None) -> int:
    """The number of rows in the split, after checking that it exists and has enough."""
    if split not in SPLITS:
        raise ValueError(options.unknown(split, SPLITS, what=f"split of {name}"))
    available: int = data_options.num_train if split == "train" else data_options.num_test
    if num_records is not None and not 0 <= num_records <= available:
        raise ValueError(
            f"{name}: num_records must be from 0 to {available}, the rows of its {split} split "
            f"(data.num_{split}); got {num_records}."
        )
    return available
