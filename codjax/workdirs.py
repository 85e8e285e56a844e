"""The folder of a run, and whether it is the folder of *this* run.

claim(folder, config)        # training: refuses the folder of another run, writes config.json
check_same(folder, config, ("model", "tokenizer"))      # evaluation: what must agree
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Collection
from typing import Any

from ml_collections import ConfigDict

from codjax import config as config_lib
from codjax.checks import ConfigError

CONFIG_FILE = "config.json"

# Sections and keys that may change between two starts of the same run: they move no number of a
# step, but for the rounding of another mesh.
_FREE_KEYS = (
    "checkpoint",
    "evaluation",
    "metrics",
    "mesh",
    "batching.rows_per_microbatch",
    "server",  # who answers, how soon; their numbers are not repeatable anyway
    "rollout.deadline_s",
)
_LENGTH = ("num_steps",)  # moves numbers only when the learning rate decays towards the last step


def prepare(folder: pathlib.Path) -> None:
    """Make the folder and be sure that it can be written to.

    Raises:
        ConfigError: it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".codjax-probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"--workdir={folder} must be a folder that can be written to: {error.strerror}."
        ) from error


def check_resumes(folder: pathlib.Path, config: ConfigDict) -> None:
    """Raises ConfigError if the folder holds a checkpoint of a run with other values."""
    checkpoints = folder / "checkpoints"
    if not checkpoints.is_dir() or not any(p.name.isdigit() for p in checkpoints.iterdir()):
        return  # a start that failed before its first checkpoint binds nobody
    free = _FREE_KEYS + (_LENGTH if config.optimizer.schedule == "constant" else ())
    different = _differences(folder, config)
    bound = {key: values for key, values in different.items() if not _is_under(key, free)}
    if bound:
        raise ConfigError(
            f"--workdir={folder} holds a run with other values: {_listing(bound)}; go on with "
            "those, or give a new workdir."
        )


def write_config(folder: pathlib.Path, config: ConfigDict) -> None:
    """Write the resolved config to config.json, in one step."""
    temporary = folder / f"{CONFIG_FILE}.new"
    temporary.write_text(json.dumps(_resolved(config), indent=2, sort_keys=True) + "\n")
    temporary.replace(folder / CONFIG_FILE)


def check_same(folder: pathlib.Path, config: ConfigDict, sections: Collection[str]) -> None:
    """Raises ConfigError if the run in the folder had other values in these sections."""
    different = _differences(folder, config)
    bound = {key: values for key, values in different.items() if _is_under(key, sections)}
    if bound:
        raise ConfigError(
            f"--workdir={folder} was trained with other values: {_listing(bound)}; evaluate it "
            "with those."
        )


def _differences(folder: pathlib.Path, config: ConfigDict) -> dict[str, tuple[str, str]]:
    """Keys that differ → their JSON there and here; nothing if there is no config.json."""
    path = folder / CONFIG_FILE
    if not path.exists():
        return {}
    try:
        there = _flatten(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); restore or remove it.") from error
    here = _flatten(_resolved(config))
    # A key that this version added: its default is what the run did without it.
    there = {**_flatten(_resolved(config_lib.default_config())), **there}
    keys = sorted(there.keys() | here.keys())
    return {
        key: (there.get(key, "absent"), here.get(key, "absent"))
        for key in keys
        if there.get(key) != here.get(key)
    }


def _resolved(config: ConfigDict) -> dict[str, Any]:
    return json.loads(config.to_json_best_effort())


def _flatten(tree: Any, prefix: str = "") -> dict[str, str]:
    """Leaves by dotted key, as JSON."""
    if not isinstance(tree, dict):
        return {prefix: json.dumps(tree)}
    flat: dict[str, str] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}.{key}" if prefix else key)
    return flat


def _is_under(key: str, sections: Collection[str]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _listing(different: dict[str, tuple[str, str]]) -> str:
    return ", ".join(f"{key} (there {a}, here {b})" for key, (a, b) in different.items())
