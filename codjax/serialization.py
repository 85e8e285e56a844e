"""Trajectories ↔ JSON values, without loss: the form of waiting rollouts in a checkpoint.

`trajectories/`, which people read, holds texts and scores besides (`metrics.trajectory_json`).

Keys are the attribute names of the records of `codjax.types`; arrays are lists, enums are their
values. A float32 written as a JSON number and read back is the same float32.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

import numpy as np

from codjax import types


def to_json(record: Any) -> Any:
    """JSON values of a record of `codjax.types`, or of anything inside one."""
    if dataclasses.is_dataclass(record):
        fields = dataclasses.fields(record)
        return {field.name: to_json(getattr(record, field.name)) for field in fields}
    if isinstance(record, np.ndarray | np.generic):
        return record.tolist()
    if isinstance(record, enum.Enum):
        return record.value
    if isinstance(record, tuple | list):
        return [to_json(item) for item in record]
    if isinstance(record, dict):
        return {key: to_json(value) for key, value in record.items()}
    return record


def trajectory_from_json(values: dict[str, Any]) -> types.Trajectory:
    """The trajectory that `to_json` was given."""
    return types.Trajectory(
        pack=_pack(values["pack"]),
        run=values["run"],
        episodes=tuple(_episode(episode) for episode in values["episodes"]),
        failure=types.StopReason(values["failure"]) if values["failure"] else None,
    )


def _pack(values: dict[str, Any]) -> types.Pack:
    return types.Pack(
        tasks=tuple(types.Task(**task) for task in values["tasks"]),
        seed=values["seed"],
        mode=types.PackMode(values["mode"]),
        env_task_indices=tuple(values["env_task_indices"]),
    )


def _episode(values: dict[str, Any]) -> types.Episode:
    changed = {
        "kind": types.EpisodeKind(values["kind"]),
        "stop_reason": types.StopReason(values["stop_reason"]),
        "turns": tuple(_turn(turn) for turn in values["turns"]),
        "observations": tuple(values["observations"]),
        "actions": tuple(values["actions"]),
    }
    return types.Episode(**(values | changed))


def _turn(values: dict[str, Any]) -> types.Turn:
    changed = {
        "prompt_tokens": np.array(values["prompt_tokens"], np.int32),
        "response_tokens": np.array(values["response_tokens"], np.int32),
        "sampler_logprobs": np.array(values["sampler_logprobs"], np.float32),
        "version_spans": tuple(types.VersionSpan(**span) for span in values["version_spans"]),
        "stop_reason": types.StopReason(values["stop_reason"]),
    }
    return types.Turn(**(values | changed))
