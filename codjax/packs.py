"""Tasks of a step → packs, each with a stable seed (spec/algorithm.md §2, training_modes.md §1).

In order: `step_tasks` is the data cursor, it says which tasks belong to a step; `make_packs` cuts
them into packs; `num_dropped` says how many found no place in one. All are pure functions, so a
resumed run needs nothing but its step number to go on with the same packs.

    step = step_tasks(records_by_taskset, step=7, tasks_per_step=32, seed=0)
    packs = make_packs(step.tasks, size=4, mode="cod", pad_to_full=True, epoch=step.epochs)
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from codjax import seeds
from codjax.types import Pack, PackMode, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTasks:
    """The tasks of one rollout step, in the order in which they were drawn.

    Attributes:
        tasks: the raw tasks.
        epochs: per task, how many times all rows had been drawn before this draw. A step that
            crosses the end of an epoch holds two numbers here, or more if it is longer than one.
    """

    tasks: tuple[Task, ...]
    epochs: tuple[int, ...]


def stable_seed(members: Iterable[Sequence[int]], *, epoch: int = 0) -> int:
    """The 64-bit seed of a pack: a function of who its members are, and of nothing else.

    Equal for every run, step, process and checkpoint, and for every order of the members
    (spec/training_modes.md §1.6): the first 8 bytes, big-endian, of SHA-256 over the sorted pairs
    as compact JSON. From the second epoch on, the payload is ``[pairs, epoch]``, so that rows seen
    again come with a fresh world.

    Args:
        members: (taskset id, row index) of every member, repeated members included.
        epoch: how many times the rows were all seen before; 0 in evaluation.

    >>> stable_seed([(0, 0), (0, 1), (0, 2), (0, 3)])
    15069623396018555611
    """
    if epoch < 0:
        raise ValueError(f"the epoch of a pack must be at least 0, the first one; got {epoch}.")
    pairs = sorted([operator.index(part) for part in member] for member in members)
    payload = json.dumps([pairs, epoch] if epoch else pairs, separators=(",", ":"))
    return int.from_bytes(hashlib.sha256(payload.encode()).digest()[:8], "big")


def make_packs(
    tasks: Sequence[Task],
    *,
    size: int,
    mode: PackMode | str,
    pad_to_full: bool,
    epoch: int | Sequence[int] = 0,
) -> list[Pack]:
    """Packs of `size` tasks; never across task sets, and in the order of the tasks.

    Task sets come in the order of their first task. Under ``cod`` and ``ralph_sample`` a task set
    with fewer than `size` tasks is dropped; a remainder is completed with the task set's first
    tasks, or dropped without `pad_to_full`; `num_dropped` counts both. ``ralph_sample`` then
    repeats the first task of each pack, ``ralph_full`` makes a pack of copies of every task.

    Args:
        tasks: the raw tasks of one rollout step, or of one evaluation.
        size: S, tasks in a pack.
        mode: ``cod``, ``ralph_sample`` or ``ralph_full``.
        pad_to_full: complete the last pack of a task set instead of dropping its tasks.
        epoch: of every task, or one for each of them. A pack has the epoch of its first task,
            which is never a repeated one: no two packs of a run then share a world.

    Returns:
        The packs; none if no task set has enough tasks.
    """
    mode = _checked_mode(mode, size)
    epochs = [epoch] * len(tasks) if isinstance(epoch, int) else list(epoch)
    partitions: dict[int, list[tuple[Task, int]]] = {}
    for task, task_epoch in zip(tasks, epochs, strict=True):
        partitions.setdefault(task.taskset_id, []).append((task, task_epoch))
    packs = []
    for drawn in partitions.values():
        for members, indices in _cut(drawn, size=size, mode=mode, pad_to_full=pad_to_full):
            seed = stable_seed(
                [(task.taskset_id, task.index) for task, _ in members], epoch=members[0][1]
            )
            packs.append(
                Pack(
                    tasks=tuple(task for task, _ in members),
                    seed=seed,
                    mode=mode,
                    env_task_indices=indices,
                )
            )
    return packs


def num_dropped(
    tasks: Sequence[Task], *, size: int, mode: PackMode | str, pad_to_full: bool
) -> int:
    """How many of the tasks `make_packs` leaves out for want of a full pack.

    The tasks that ``ralph_sample`` replaces by copies of a pack's first one are not counted: to
    leave them out is what that mode is.
    """
    mode = _checked_mode(mode, size)
    if mode is PackMode.RALPH_FULL:
        return 0
    counts = collections.Counter(task.taskset_id for task in tasks)
    too_few = sum(count for count in counts.values() if count < size)
    if pad_to_full:
        return too_few
    return too_few + sum(count % size for count in counts.values() if count >= size)


def step_tasks(
    records_by_taskset: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    step: int,
    tasks_per_step: int,
    seed: int,
) -> StepTasks:
    """The raw tasks of a rollout step: a pure function of the step number.

    Think of one endless list of draws, epoch after epoch; step n takes the n-th slice of it, so a
    step may cross the end of an epoch and no row is lost or drawn twice. In an epoch every task set
    is drawn as often as it has rows, in an order shuffled by (`seed`, epoch), and each task set
    gives its rows in its own order (spec/training_modes.md §1.2).

    Args:
        records_by_taskset: name → rows, in the order of `config.rollout.tasksets`; the position
            of a name is its taskset id. A row is read only when it is drawn.
        step: number of the rollout step, from 0.
        tasks_per_step: raw tasks in a step.
        seed: of the run.

    Returns:
        `tasks_per_step` tasks with the epoch of each.

    Raises:
        ValueError: there is no row at all, or a number is out of range.
    """
    if step < 0 or tasks_per_step < 1:
        raise ValueError(
            "a step takes rollout.tasks_per_step >= 1 tasks and steps count from 0; "
            f"got step {step}, tasks_per_step {tasks_per_step}."
        )
    names = tuple(records_by_taskset)
    num_rows = tuple(len(records) for records in records_by_taskset.values())
    epoch_size = sum(num_rows)
    if epoch_size == 0:
        raise ValueError(f"the task sets {list(names)} have no rows; rollout.tasksets needs some.")
    tasks, epochs = [], []
    for draw in range(step * tasks_per_step, (step + 1) * tasks_per_step):
        epoch, place = divmod(draw, epoch_size)
        taskset_ids, indices = _epoch_order(num_rows, epoch, seed)
        taskset_id, index = int(taskset_ids[place]), int(indices[place])
        name = names[taskset_id]
        record = records_by_taskset[name][index]
        tasks.append(Task(taskset=name, taskset_id=taskset_id, index=index, record=record))
        epochs.append(epoch)
    return StepTasks(tasks=tuple(tasks), epochs=tuple(epochs))


@functools.lru_cache(maxsize=4)  # a step rarely touches more than two epochs
def _epoch_order(num_rows: tuple[int, ...], epoch: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Per draw of an epoch: the taskset id, and how often it was drawn before in the epoch."""
    taskset_ids = np.repeat(np.arange(len(num_rows)), num_rows)
    epoch_seed = seeds.derive_seed(seed, "epoch_order", epoch, bits=64)
    np.random.Generator(np.random.PCG64(epoch_seed)).shuffle(taskset_ids)
    indices = np.empty_like(taskset_ids)
    by_taskset = np.argsort(taskset_ids, kind="stable")
    indices[by_taskset] = np.concatenate([np.arange(count) for count in num_rows])
    return taskset_ids, indices


def _checked_mode(mode: PackMode | str, size: int) -> PackMode:
    if size < 1:
        raise ValueError(f"packs.size must be at least 1, the tasks of a pack; got {size}.")
    if mode not in set(PackMode):
        names = ", ".join(PackMode)
        raise ValueError(f"packs.mode must be one of {names}; got {mode!r}.")
    return PackMode(mode)


def _cut(
    drawn: list[tuple[Task, int]], *, size: int, mode: PackMode, pad_to_full: bool
) -> list[tuple[list[tuple[Task, int]], tuple[int, ...]]]:
    """The packs of one task set: members with their epoch, and their env_task_indices."""
    if mode is PackMode.RALPH_FULL:
        return [([member] * size, (place % size,) * size) for place, member in enumerate(drawn)]
    if len(drawn) < size:
        return []
    if pad_to_full:
        drawn = drawn + drawn[: -len(drawn) % size]
    starts = range(0, len(drawn) - size + 1, size)
    if mode is PackMode.RALPH_SAMPLE:
        return [([drawn[start]] * size, (0,) * size) for start in starts]
    return [(drawn[start : start + size], tuple(range(size))) for start in starts]
