"""Tasks of a task set as an agent first sees them, or as JSON lines: `codjax data`."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from ml_collections import ConfigDict

from codjax import checks, envs, packs, types


def main(config: ConfigDict, name: str | None, *, num: int, output: str | None) -> str:
    """Samples as a text to print, or rows in a file and a line that says so.

    Args:
        config: of the run.
        name: of the task set.
        num: how many tasks, from the first.
        output: file to write; None to return the samples.

    Raises:
        ConfigError: there is no such task set, or it has no so many tasks.
    """
    if name is None:
        raise checks.ConfigError(
            f"--taskset=NAME must be given: one of {', '.join(config.tasksets)}."
        )
    checks.choice("--taskset", name, config.tasksets, "among config.tasksets:")
    if num < 1:
        raise checks.ConfigError(f"--num must be at least 1: it counts tasks; got {num}.")
    samples = _samples(config, name, num)
    if output is None:
        return "".join(map(_text, samples))
    path = pathlib.Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(sample, ensure_ascii=False, sort_keys=True) + "\n" for sample in samples]
    path.write_text("".join(lines), encoding="utf-8")
    return f"wrote {len(samples)} tasks of {name} to {path}\n"


def _samples(config: ConfigDict, name: str, num: int) -> list[dict[str, Any]]:
    """The first tasks of a task set, each as the first thing that an agent would see of it."""
    entry, data = config.tasksets[name], config.tasksets[name].data.to_dict()
    num_records = min(entry.num_records or num, max(num, config.packs.size))
    try:
        envs.check(entry.env, entry.settings.to_dict(), data, entry.split, num_records)
    except ValueError as error:
        raise checks.ConfigError(f"--num={num} asks for too many: {error}") from error
    records = envs.load_records(entry.env, split=entry.split, num_records=num_records, data=data)
    taskset_id = list(config.tasksets).index(name)
    tasks = [
        types.Task(taskset=name, taskset_id=taskset_id, index=index, record=record)
        for index, record in enumerate(records)
    ]
    size = min(config.packs.size, len(tasks))
    samples = []
    for pack in packs.make_packs(tasks, size=size, mode="cod", pad_to_full=True):
        for slot, (task, env_task_idx) in enumerate(
            zip(pack.tasks, pack.env_task_indices, strict=True)
        ):
            env = envs.make(entry.env, **entry.settings.to_dict())
            observation = env.reset(
                task.record,
                pack_seed=pack.seed,
                slot=slot,
                pack_size=size,
                env_task_idx=env_task_idx,
            )
            samples.append(
                {
                    "taskset": name,
                    "index": task.index,
                    "pack_seed": pack.seed,
                    "position": slot,
                    "record": dict(task.record),
                    "system_prompt": env.system_prompt,
                    "observation": observation,
                }
            )
    return samples[: min(num, len(tasks))]


def _text(sample: dict[str, Any]) -> str:
    heading = "{taskset}, row {index}: position {position} of the pack with seed {pack_seed}"
    return (
        f"━━ {heading.format(**sample)} ━━\n"
        f"record: {json.dumps(sample['record'], ensure_ascii=False)}\n"
        f"── system prompt\n{sample['system_prompt']}\n"
        f"── first observation\n{sample['observation']}\n\n"
    )
