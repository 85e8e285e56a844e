"""Packs → trajectories: G runs of every pack, all at once.

A run goes through its pack in order: solve 0, update 0, solve 1, …, solve S-1. Only the hint
passes from one task to the next. A failure of an environment or of the sampler ends its own run,
which is dropped before credit, and no other one.

    groups = await run_packs(packs, group_size=8, tasksets=…, sampler=…, chat=…, …)
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence

from codjax import chat as chats
from codjax import seeds, types
from codjax.envs import protocol
from codjax.rollout import episode as episodes
from codjax.rollout import sampler as samplers
from codjax.rollout.settings import RolloutSettings

# (position, hint that the run would go on with) → hint of the solve and the update there.
HintOverride = Callable[[int, str], str]

_RALPH_MODES = frozenset({types.PackMode.RALPH_SAMPLE, types.PackMode.RALPH_FULL})
_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TasksetRules:
    """What running the tasks of a task set takes.

    Attributes:
        env_factory: makes a new environment.
        show_reward: whether the writer of the hint sees the reward.
    """

    env_factory: Callable[[], protocol.Environment]
    show_reward: bool


async def run_packs(
    packs: Sequence[types.Pack],
    *,
    group_size: int,
    tasksets: Mapping[str, TasksetRules],
    sampler: samplers.Sampler,
    chat: chats.Chat,
    settings: RolloutSettings,
    seed: int,
    hint_overrides: Sequence[HintOverride] | None = None,
    on_done: Callable[[], None] | None = None,
) -> list[list[types.Trajectory]]:
    """All runs of all packs, concurrently.

    Args:
        packs: what to run.
        group_size: G, runs of every pack.
        tasksets: rules by the name of a task set.
        sampler: the policy.
        chat: its tokenizer and template.
        settings: of the rollout.
        seed: of the step or the evaluation; two steps need different ones.
        hint_overrides: one per pack, controls of an evaluation.
        on_done: called whenever a run is over: a sign of life.

    Returns:
        One group per pack, in the order of the packs; in it the runs, in order.

    Raises:
        ExceptionGroup: a bug of ours; the other runs are cancelled.
    """
    overrides = hint_overrides if hint_overrides is not None else [None] * len(packs)
    async with asyncio.TaskGroup() as tasks:
        groups = []
        for pack, override in zip(packs, overrides, strict=True):
            rules = tasksets[pack.tasks[0].taskset]
            groups.append(
                [
                    tasks.create_task(
                        run_pack(
                            pack,
                            run,
                            env_factory=rules.env_factory,
                            show_reward=rules.show_reward,
                            sampler=sampler,
                            chat=chat,
                            settings=settings,
                            seed=seed,
                            hint_override=override,
                        )
                    )
                    for run in range(group_size)
                ]
            )
        if on_done is not None:
            for task in itertools.chain.from_iterable(groups):
                task.add_done_callback(lambda _: on_done())
    return [[task.result() for task in group] for group in groups]


async def run_pack(
    pack: types.Pack,
    run: int,
    *,
    env_factory: Callable[[], protocol.Environment],
    show_reward: bool,
    sampler: samplers.Sampler,
    chat: chats.Chat,
    settings: RolloutSettings,
    seed: int,
    hint_override: HintOverride | None = None,
) -> types.Trajectory:
    """One run through a pack.

    Args:
        pack: what to run.
        run: index of the run in its group, part of its seeds.
        env_factory: makes the environment of each task; under the Ralph modes with
            `settings.keeps_env_memory`, the one of all tries.
        show_reward: whether the writer of the hint sees the reward.
        sampler: the policy.
        chat: its tokenizer and template.
        settings: of the rollout.
        seed: of the step; with the pack's seed, the run, the position and the kind it gives
            every episode its own.
        hint_override: replaces the hint at a position before it is used there.
    """
    keeps_env = settings.keeps_env_memory and pack.mode in _RALPH_MODES
    env: protocol.Environment | None = None
    hint = settings.style.null_hint
    done: list[types.Episode] = []
    for position in range(len(pack.tasks)):
        if settings.blanks_hints:
            hint = settings.style.null_hint
        if hint_override is not None:
            hint = hint_override(position, hint)
        if env is None or not keeps_env:
            env = _make(env_factory, pack)
        if env is None:
            return _failed(pack, run, done, types.StopReason.ENVIRONMENT_FAILED)
        solved = await episodes.solve(
            pack,
            position,
            env=env,
            hint=hint,
            sampler=sampler,
            chat=chat,
            settings=settings,
            seed=_episode_seed(seed, pack, run, position, types.EpisodeKind.SOLVE_TASK),
        )
        done.append(solved.episode)
        if solved.episode.stop_reason in types.FAILURES:
            return _failed(pack, run, done, solved.episode.stop_reason)
        if position + 1 == len(pack.tasks):
            break
        update = await episodes.update(
            solved,
            show_reward=show_reward,
            sampler=sampler,
            chat=chat,
            settings=settings,
            seed=_episode_seed(seed, pack, run, position, types.EpisodeKind.UPDATE_CONTEXT),
        )
        done.append(update)
        if update.stop_reason in types.FAILURES:
            return _failed(pack, run, done, update.stop_reason)
        hint = update.hint_out
    return types.Trajectory(pack=pack, run=run, episodes=tuple(done), failure=None)


def _make(
    env_factory: Callable[[], protocol.Environment], pack: types.Pack
) -> protocol.Environment | None:
    try:
        return env_factory()
    except Exception:  # whatever an environment's own code may raise
        _logger.warning("No environment could be made for pack %d.", pack.seed, exc_info=True)
        return None


def _failed(
    pack: types.Pack, run: int, done: list[types.Episode], reason: types.StopReason
) -> types.Trajectory:
    _logger.warning(
        "Run %d of pack %d ended early after %d episodes: %s%s.",
        run,
        pack.seed,
        len(done),
        reason,
        f" ({done[-1].feedback})" if done and done[-1].feedback else "",
    )
    return types.Trajectory(pack=pack, run=run, episodes=tuple(done), failure=reason)


def _episode_seed(
    seed: int, pack: types.Pack, run: int, position: int, kind: types.EpisodeKind
) -> int:
    return seeds.derive_seed(seed, "episode", pack.seed, run, position, kind.value)
