"""What to change in a config that does not fit, each suggestion compiled before it is made.

Single changes first, in the order of `STEPS`: from those that cost nothing but time to those that
change the numbers. If none is enough, they are added up in that order. A change after which the
state alone is too large is passed over without compiling it.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from codjax import checks, sharding, validation

_LOG = logging.getLogger(__name__)
_MAX_COMPILES = 10

Changes = dict[str, Any]  # config key → value
Mesh = Mapping[str, int]


def _row_parts(mesh: Mesh) -> int:
    return math.prod(mesh[axis] for axis in sharding.RULES["batch"])


def _remat(config: ConfigDict, mesh: Mesh) -> Changes:
    return {"model.remat": "full"} if config.model.remat != "full" else {}


def _fewer_rows(config: ConfigDict, mesh: Mesh) -> Changes:
    rows, least = config.batching.rows_per_microbatch, _row_parts(mesh)
    if rows <= least:
        return {}
    return {"batching.rows_per_microbatch": max(least, rows // 2 // least * least)}


def _fewest_rows(config: ConfigDict, mesh: Mesh) -> Changes:
    rows, least = config.batching.rows_per_microbatch, _row_parts(mesh)
    return {"batching.rows_per_microbatch": least} if rows > least else {}


def _fewer_scored(config: ConfigDict, mesh: Mesh) -> Changes:
    scored = config.batching.scored_per_row or config.batching.row_length
    least = config.rollout.max_response_tokens
    if config.warmup.num_steps > 0:  # which scores every token of a conversation
        least += config.rollout.max_prompt_tokens
    return {"batching.scored_per_row": max(least, scored // 2)} if scored > least else {}


def _shorter_rows(config: ConfigDict, mesh: Mesh) -> Changes:
    length = config.batching.row_length // 2 // mesh["context"] * mesh["context"]
    needed = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    return {"batching.row_length": length} if length >= needed else {}


def _cut_parameters(config: ConfigDict, mesh: Mesh) -> Changes:
    if mesh["data"] == 1:
        return {}
    return {"mesh.data": 1, "mesh.fsdp": mesh["data"] * mesh["fsdp"]}


def _trade_rows_for(axis: str) -> Callable[[ConfigDict, Mesh], Changes]:
    """Half as many devices along the rows, twice as many along an axis that cuts each row."""

    def change(config: ConfigDict, mesh: Mesh) -> Changes:
        source = "data" if mesh["data"] % 2 == 0 else "fsdp"
        rows = config.batching.rows_per_microbatch
        if mesh[source] % 2 or rows % 2:
            return {}
        halved = {f"mesh.{source}": mesh[source] // 2, f"mesh.{axis}": 2 * mesh[axis]}
        return halved | {"batching.rows_per_microbatch": rows // 2}

    return change


def _momentum(config: ConfigDict, mesh: Mesh) -> Changes:
    key = "optimizer.momentum_dtype"
    return {key: "bfloat16"} if config.optimizer.momentum_dtype != "bfloat16" else {}


def _second_moment(config: ConfigDict, mesh: Mesh) -> Changes:
    key = "optimizer.second_moment"
    return {key: "factored"} if config.optimizer.second_moment != "factored" else {}


STEPS: tuple[Callable[[ConfigDict, Mesh], Changes], ...] = (
    _remat,
    _fewer_rows,
    _fewest_rows,
    _fewer_scored,
    _cut_parameters,
    _trade_rows_for("tensor"),
    _trade_rows_for("context"),
    _shorter_rows,
    _momentum,
    _second_moment,
)


def search(
    config: ConfigDict,
    plan: Mapping[str, Any],
    make_plan: Callable[[ConfigDict], Mapping[str, Any]],
    state_bytes: Callable[[ConfigDict], int],
) -> dict[str, Any]:
    """The first change that makes a config fit.

    Args:
        config: that does not fit.
        plan: of it.
        make_plan: plans another config; raises `ConfigError` where sizes do not divide.
        state_bytes: what lives through an update on a device, under another config.

    Returns:
        "overrides", the changed keys with their values, or None if nothing was found;
        "total_bytes" under them; "tried", one entry a change: its overrides, and "total_bytes"
        or why there is none ("why").
    """
    tried: list[dict[str, Any]] = []
    limit, num_compiles = plan["chip"]["usable_bytes"], 0
    for changes in _proposals(config, plan["mesh"]):
        entry: dict[str, Any] = {"overrides": changes, "total_bytes": None, "why": None}
        tried.append(entry)
        try:
            changed = _with(config, changes)
            validation.validate(changed)
            least = state_bytes(changed)
            if least > limit:
                entry["why"] = f"state alone takes {least} bytes"
                continue
            _LOG.info("trying %s", as_typed(changes))
            found = make_plan(changed)
        except checks.ConfigError as error:
            entry["why"] = str(error)
            continue
        num_compiles += 1
        totals = [program["total_bytes"] for program in found["programs"].values()]
        if None in totals:
            refused = [program["refused"] for program in found["programs"].values()]
            entry["why"] = next(filter(None, refused))
        else:
            entry["total_bytes"] = max(totals)
        if found["fits"]:
            return {"overrides": changes, "total_bytes": entry["total_bytes"], "tried": tried}
        if num_compiles == _MAX_COMPILES:
            break
    return {"overrides": None, "total_bytes": None, "tried": tried}


def as_typed(changes: Changes) -> str:
    """The changes as flags of the command line.

    >>> as_typed({"model.remat": "full", "mesh.data": 1})
    '--config.model.remat=full --config.mesh.data=1'
    """
    return " ".join(f"--config.{key}={value}" for key, value in changes.items())


def _proposals(config: ConfigDict, mesh: Mesh) -> Iterator[Changes]:
    """Each change alone, then one after the other added to those before, until none is left."""
    # The mesh with its -1 resolved, so that changes of one axis mean what they say.
    start = _with(config, {f"mesh.{axis}": size for axis, size in mesh.items()})
    seen = []
    for step in STEPS:
        changes = step(start, mesh)
        if changes and changes not in seen:
            seen.append(changes)
            yield changes
    total: Changes = {}
    current, shape, is_going = start, dict(mesh), True
    while is_going:
        is_going = False
        for step in STEPS:
            if not (changes := step(current, shape)):
                continue
            is_going = True
            total = total | changes
            current = _with(start, total)
            shape = {axis: current.mesh[axis] for axis in mesh}
            if total not in seen:
                seen.append(total)
                yield total


def _with(config: ConfigDict, changes: Changes) -> ConfigDict:
    changed = copy.deepcopy(config)
    for key, value in changes.items():
        section, name = key.rsplit(".", 1)
        changed[section][name] = value
    return changed
