"""The rollouts of a run, sampled ahead by all of its processes, and their place in a checkpoint.

    with open_pipeline(source, stop=…, position=…) as ahead:
        drawn = ahead.take(update)
        groups = of_all(drawn.item.payload)
    loop = position_to_json(ahead.position())

Every process samples its share of a step's packs. Before an update all hold the trajectories of
all: credit, RED and rows are of the whole step, whatever the number of processes.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from codjax import (
    build,
    distributed,
    packs,
    pipeline,
    replay,
    seeds,
    serialization,
    serving,
    types,
    waits,
)
from codjax import chat as chats
from codjax.rollout import runner
from codjax.rollout import settings as rollout_settings
from codjax.rollout.sampler import SamplerError

_CLOSE_S, _HURRY_S = 30.0, 2.0
Groups = list[list[types.Trajectory]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """What sampling a rollout step takes.

    Attributes:
        config: of the run.
        chat: tokenizer and template.
        tasksets: by name.
        settings: of the rollout.
        serving: who samples.
        stalls: told of signs of life.
    """

    config: ConfigDict
    chat: chats.Chat
    tasksets: Mapping[str, build.TaskSet]
    settings: rollout_settings.RolloutSettings
    serving: serving.Serving
    stalls: waits.Waits

    async def sample(self, step: int) -> tuple[Groups, int | None]:
        """This process's trajectories of a step, group by group, and the version of the newest.

        With all processes', a function of the step and the weights, if the sampler is.
        """
        mine = distributed.share(draw_packs(self.config, self.tasksets, step)[0])
        num_runs, num_done = len(mine) * self.config.rollout.group_size, itertools.count(1)
        groups = await runner.run_packs(
            mine,
            group_size=self.config.rollout.group_size,
            tasksets={name: taskset.rules() for name, taskset in self.tasksets.items()},
            sampler=self.serving.sampler,
            chat=self.chat,
            settings=self.settings,
            seed=seeds.derive_seed(self.config.seed, "rollout", step),
            on_done=lambda: self.stalls.note(
                "rollouts", f"{next(num_done)} of {num_runs} runs of step {step} were over"
            ),
        )
        versions = [
            turn.policy_version
            for group in groups
            for trajectory in group
            for episode in trajectory.episodes
            for turn in episode.turns
        ]
        return groups, max(versions, default=None)


def check_any_answered(step: int, groups: Groups) -> None:
    """Raises if not one run of a step, of all processes, got its answers.

    On such steps a run would go through its tasks and learn nothing.

    Raises:
        SamplerError: with what the last of them was told.
    """
    runs = [run for group in groups for run in group]
    if runs and all(run.failure is types.StopReason.SAMPLER_FAILED for run in runs):
        last = runs[-1].episodes[-1].feedback
        raise SamplerError(f"all {len(runs)} runs of rollout step {step} failed; the last: {last}")


def draw_packs(
    config: ConfigDict, tasksets: Mapping[str, build.TaskSet], step: int
) -> tuple[list[types.Pack], int]:
    """The packs of a rollout step, and how many of its tasks are in none of them."""
    drawn = packs.step_tasks(
        {name: taskset.records for name, taskset in tasksets.items()},
        step=step,
        tasks_per_step=config.rollout.tasks_per_step,
        seed=config.seed,
    )
    # The id in the config, not in `rollout.tasksets`: no pack of a test set gets a training seed.
    tasks = [
        dataclasses.replace(task, taskset_id=tasksets[task.taskset].taskset_id)
        for task in drawn.tasks
    ]
    rules = {
        "size": config.packs.size,
        "mode": config.packs.mode,
        "pad_to_full": config.packs.pad_to_full,
    }
    made = packs.make_packs(tasks, **rules, epoch=drawn.epochs)
    return made, packs.num_dropped(tasks, **rules)


def open_pipeline(
    source: Source,
    *,
    stop: distributed.StopRequest,
    position: pipeline.Position,
) -> pipeline.Pipeline:
    """The pipeline of `config.rollout`.

    Args:
        source: of the trajectories.
        stop: looked at while a step is awaited.
        position: to go on from.
    """
    rollout = source.config.rollout
    server = source.config.server
    # A push lets a server go on before it ends; a local server is given its time, and its guard's.
    close_s = _CLOSE_S + server.control_timeout_s + server.local.stop_timeout_s
    settings = pipeline.Settings(
        num_steps=source.config.num_steps,
        max_staleness=rollout.max_staleness,
        in_flight_updates=rollout.in_flight_updates,
        max_concurrent=rollout.steps_at_once,
        sync_every=rollout.sync_every,
        is_repeatable=rollout.sampler == "engine"
        and not rollout.in_flight_updates
        and rollout.max_staleness <= 1
        and rollout.sync_every == 1,
        deadline_s=rollout.deadline_s,
        deadline_key="rollout.deadline_s",
        close_s=close_s,
        # The others wait for this process inside a collective; the end of the process ends all.
        close_failed_s=close_s if distributed.num_processes() == 1 else _HURRY_S,
    )
    rules = replay.Rules(
        # More never wait: `Pipeline` begins no step that would.
        capacity=rollout.max_staleness + 1,
        max_staleness=rollout.max_staleness,
        max_uses=rollout.replay.max_uses,
        decay=rollout.replay.decay,
        noise=rollout.replay.noise,
        seed=seeds.derive_seed(source.config.seed, "replay"),
        in_order=not rollout.in_flight_updates,
    )

    def agree(mine: Mapping[int, int]) -> Mapping[int, int] | None:
        asking = waits.Wait(
            who="rollouts",
            what="the other processes to say which rollout steps they have",
            deadline_s=rollout.deadline_s,
            key="rollout.deadline_s",
        )
        with source.stalls.guarded(asking):
            found = distributed.gather((dict(mine), stop.is_noted))
        return None if any(noted for _, noted in found) else common([own for own, _ in found])

    return pipeline.Pipeline(
        settings,
        sample=source.sample,
        load=source.serving.load,
        rules=rules,
        stalls=source.stalls,
        position=position,
        agree=agree,
        around=source.serving.opened(),
    )


def common(waiting: list[dict[int, int]]) -> dict[int, int]:
    """Steps that wait in all processes → version of the newest sample in any of them.

    >>> common([{3: 2, 4: 3}, {4: 2, 5: 2}])
    {4: 3}
    """
    steps = set(waiting[0]).intersection(*waiting[1:])
    return {step: max(one[step] for one in waiting) for step in sorted(steps)}


def of_all(groups: Groups) -> Groups:
    """The groups of all processes, in the order of the step's packs."""
    return distributed.merge(distributed.gather(groups))


def position_to_json(position: pipeline.Position) -> dict[str, Any]:
    """The position of all processes, for a checkpoint; all of them must call it.

    A step that waits in some of them only is begun again by all.
    """
    found = distributed.gather(position)
    shared = common([{item.step: item.version for item in one.items} for one in found])
    items = []
    for step, version in shared.items():
        parts = [next(item for item in one.items if item.step == step) for one in found]
        items.append(
            {
                "step": step,
                "version": version,
                "uses": parts[0].uses,
                "groups": serialization.to_json(distributed.merge([p.payload for p in parts])),
            }
        )
    begun = {step for one in found for step in one.unfinished}
    begun |= {item.step for one in found for item in one.items}
    return {
        "next_step": max(one.next_step for one in found),
        "unfinished": sorted(begun - shared.keys()),
        "items": items,
    }


def position_from_json(step: int, values: Mapping[str, Any]) -> pipeline.Position:
    """This process's part of what `position_to_json` gave; their number may have changed.

    Args:
        step: updates so far.
        values: of a checkpoint.
    """
    items = []
    for item in values["items"]:
        groups = [
            [serialization.trajectory_from_json(one) for one in group] for group in item["groups"]
        ]
        payload = distributed.share(groups)
        items.append(
            replay.Item(
                step=item["step"], version=item["version"], uses=item["uses"], payload=payload
            )
        )
    return pipeline.Position(
        num_trained=step,
        next_step=values["next_step"],
        unfinished=tuple(values["unfinished"]),
        items=tuple(items),
    )
