"""What every environment is to the rest of codjax: a Protocol, its records, its table entry.

An episode goes

    first_observation = env.reset(record, pack_seed=…, slot=…, pack_size=…)
    while not done: result = env.step(model_output); done = result.done
    outcome = env.result()

The hidden facts follow from `pack_seed` alone (or from the record, in environments without a
shared world), so the G runs of a pack meet the same world.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from codjax import types

Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepResult:
    """What the environment answers to one model output.

    Attributes:
        observation: what the model is shown next. With `done` it is the final observation, what
            the last action did; the policy never sees it, the hint writer only if
            `rollout.include_final_observation` is set.
        done: whether the episode is over, by the goal, a failure, an unreadable answer or the
            turn limit.
    """

    observation: str
    done: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpisodeResult:
    """How the episode went, read once at its end.

    Attributes:
        raw_reward: outcome reward, before the length penalties that the rollout subtracts.
        is_success: whether the task counts as solved.
        feedback: what the hint writer is told about the task.
        format_error: whether an answer could not be read.
        num_turns: model outputs that were stepped.
        failure: `JUDGE_FAILED` or `ENVIRONMENT_FAILED` when the outcome means nothing and the
            run must be dropped; else None.
    """

    raw_reward: float
    is_success: bool
    feedback: str
    format_error: bool
    num_turns: int
    failure: types.StopReason | None = None


class Environment(Protocol):
    """One task at a time; an instance may be reset any number of times.

    No model output may make `step` raise, hang, touch the host, or take more than linear time.
    A caller's mistake does raise: `step` before `reset` or after `done`, `result` before `reset`.
    """

    @property
    def system_prompt(self) -> str:
        """The environment's own text, without the hint and length sections; read after `reset`."""

    @property
    def max_turns(self) -> int:
        """Turn limit; the step that reaches it returns `done`."""

    def reset(
        self,
        record: Record,
        *,
        pack_seed: int | None,
        slot: int,
        pack_size: int,
        env_task_idx: int | None = None,
    ) -> str:
        """Begins a task.

        Args:
            record: a row of the environment's data.
            pack_seed: draws the hidden facts that the pack shares.
            slot: position in the pack, from 0.
            pack_size: S.
            env_task_idx: index for facts of the single task; None means `slot`. Under the Ralph
                modes it stays while `slot` moves.

        Returns:
            The first observation.

        Raises:
            ValueError: the record cannot be played, or the environment needs a pack seed.
        """

    def step(self, text: str) -> StepResult:
        """Plays one whole model output."""

    def result(self) -> EpisodeResult:
        """The outcome so far: of an episode cut short from outside, what it has earned."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnvironmentSpec:
    """One entry of the environment table.

    Attributes:
        make: a checked settings object → an environment.
        settings: frozen dataclass of the settings. `__post_init__` checks ranges and raises
            ValueError with a message that begins with the field's name.
        data: the same for the options of the record generator; its fields `num_train` and
            `num_test` are the sizes of the splits.
        records: (checked data object, "train" | "test", n) → the first n rows of the split.
        aliases: other names under which a setting is published → its name here.
    """

    make: Callable[[Any], Environment]
    settings: type[Any]
    data: type[Any]
    records: Callable[[Any, str, int], Sequence[Record]]
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)


def check_can_step(*, is_reset: bool, is_done: bool) -> None:
    """Raises RuntimeError if the caller steps an episode that has not begun or is over."""
    if not is_reset:
        raise RuntimeError("step() was called before reset(): there is no task to act in.")
    if is_done:
        raise RuntimeError(
            "step() was called after the episode was over (done=True): call reset() first."
        )


def check_can_report(*, is_reset: bool) -> None:
    """Raises RuntimeError if the caller asks for the result of an episode that never began."""
    if not is_reset:
        raise RuntimeError("result() was called before reset(): there is no episode to report on.")
