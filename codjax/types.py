"""The records that pass between the parts of codjax, and the letters of their shapes.

Host records (frozen dataclasses) travel on the rollout side; `TokenBatch` (a NamedTuple, so that it
goes through jit) travels to the devices. Read them in this order and the program follows:

    Task → Pack → Trajectory [Episode [Turn]] → Sequence → TokenBatch

Dimension key, used in every shape annotation of the package:

    P packs in a step        B rows of a batch         D model width
    G trajectories of a pack T tokens in a row         N heads, M key-value heads
    S positions in a pack    K scored entries in a row H head size
    E episodes in a step     L layers                  V vocabulary
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np

# A NumPy array on the host, a JAX array in jit; and, in trees of the same shape, a sharding.
Leaf: TypeAlias = Any


class EpisodeKind(enum.StrEnum):
    """What an episode is for."""

    SOLVE_TASK = "solve_task"
    UPDATE_CONTEXT = "update_context"


class PackMode(enum.StrEnum):
    """How tasks become packs (spec/algorithm.md §2.5)."""

    COD = "cod"
    RALPH_SAMPLE = "ralph_sample"
    RALPH_FULL = "ralph_full"


class StopReason(enum.StrEnum):
    """Why a turn or an episode ended.

    A turn ends by `STOP_TOKEN` or `LENGTH`. An episode ends by the reason of the one thing that
    ended it; the three last ones are failures of the machinery, after which the whole run is
    dropped before credit.
    """

    STOP_TOKEN = "stop_token"
    LENGTH = "length"
    ENVIRONMENT = "environment"
    PROMPT_TOO_LONG = "prompt_too_long"
    ENVIRONMENT_FAILED = "environment_failed"
    SAMPLER_FAILED = "sampler_failed"
    JUDGE_FAILED = "judge_failed"


FAILURES = frozenset(
    {StopReason.ENVIRONMENT_FAILED, StopReason.SAMPLER_FAILED, StopReason.JUDGE_FAILED}
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """One problem: a row of a task set.

    Attributes:
        taskset: name of the task set in the config.
        taskset_id: position of the task set in the config, part of the pack seed.
        index: row number in the task set.
        record: what the environment's `reset` takes; plain JSON values.
    """

    taskset: str
    taskset_id: int
    index: int
    record: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pack:
    """Tasks of one task set, in order, that share one hidden environment.

    Attributes:
        tasks: one task per position.
        seed: draws the hidden facts; the same for all runs of the pack.
        mode: how the pack was made.
        env_task_indices: per position, the index an environment may use to draw facts of the
            single task; constant under the Ralph modes (spec/training_modes.md §1.4).
    """

    tasks: tuple[Task, ...]
    seed: int
    mode: PackMode
    env_task_indices: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class VersionSpan:
    """Response tokens `[start, end)`, sampled by the weights behind which are `version` updates."""

    version: int
    start: int
    end: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turn:
    """One model call: the tokens it was fed and the tokens it returned.

    Attributes:
        prompt_tokens: int32 `[n]`.
        response_tokens: int32 `[m]`, with the stop token if one was sampled.
        sampler_logprobs: float32 `[m]`, natural log, at the sampling temperature.
        policy_version: number of updates behind the oldest weights that sampled a token of it.
        version_spans: which weights sampled which tokens; in order, covering the response. One
            span, unless the sampler took new weights while it answered.
        stop_reason: `STOP_TOKEN` or `LENGTH`.
    """

    prompt_tokens: np.ndarray = dataclasses.field(repr=False)  # asyncio.run shows its result
    response_tokens: np.ndarray = dataclasses.field(repr=False)
    sampler_logprobs: np.ndarray = dataclasses.field(repr=False)
    policy_version: int
    version_spans: tuple[VersionSpan, ...]
    stop_reason: StopReason


@dataclasses.dataclass(frozen=True, kw_only=True)
class Episode:
    """One conversation with one purpose.

    Attributes:
        kind: solve the task at `position`, or update the context after it.
        position: index of the task in its pack, from 0.
        turns: its model calls, in order.
        raw_reward: what the environment gave; for an update, 1 if the hint parsed, else 0.
        reward: `raw_reward` after the length penalties: r_k of a solve, h_k of an update.
        is_success: whether the environment counts the task as solved.
        has_format_error: whether an answer, or the hint, could not be parsed.
        stop_reason: what ended the episode.
        feedback: what the environment said afterwards; empty for an update.
        hint_in: the hint that the episode was given.
        hint_out: the hint carried on; of a solve, the same as `hint_in`.
        observations: what the model was shown, one text per turn.
        actions: what it answered, one text per turn, special tokens removed.
    """

    kind: EpisodeKind
    position: int
    turns: tuple[Turn, ...]
    raw_reward: float
    reward: float
    is_success: bool
    has_format_error: bool
    stop_reason: StopReason
    feedback: str
    hint_in: str
    hint_out: str
    observations: tuple[str, ...]
    actions: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trajectory:
    """One run of the policy through a whole pack, its episodes in order of time.

    Attributes:
        pack: the pack that was run.
        run: index of the run in its group.
        episodes: solve 0, update 0, solve 1, …, solve S-1; cut short when `failure` is set.
        failure: the failure that made the run worthless, or None.
    """

    pack: Pack
    run: int
    episodes: tuple[Episode, ...]
    failure: StopReason | None

    def episodes_of(self, kind: EpisodeKind) -> tuple[Episode, ...]:
        """The episodes of one kind, by position."""
        return tuple(episode for episode in self.episodes if episode.kind is kind)


@dataclasses.dataclass(frozen=True)
class Sequence:
    """One root-to-leaf token sequence to place in a row: a sample of the train batch.

    Attributes:
        tokens: int32 `[n]`, prompt and response.
        is_scored: bool `[n]`, the tokens that the policy sampled (or that are imitated);
            never the first token, which nothing predicts.
        advantages: float32 `[n]`, read where `is_scored`.
        sampler_logprobs: float32 `[n]`, read where `is_scored`.
    """

    tokens: np.ndarray
    is_scored: np.ndarray
    advantages: np.ndarray
    sampler_logprobs: np.ndarray


class TokenBatch(NamedTuple):
    """Rows of token forests with their scored entries; the only input of the learner.

    A token `i` may look at a token `j` of its row iff ``j <= i < subtree_end[j]``. Padding tokens
    are trees of one token. Padding entries have weight 0 and whatever stands in their other
    fields changes nothing.
    """

    tokens: Leaf  # int32 [B T]
    token_positions: Leaf  # int32 [B T], depth from the sequence's own start
    subtree_end: Leaf  # int32 [B T], index one past the last descendant
    source: Leaf  # int32 [B K], index in the row of the hidden state that predicts
    target: Leaf  # int32 [B K], the token id that was sampled
    sampler_logprobs: Leaf  # float32 [B K]
    ref_logprobs: Leaf  # float32 [B K], of the reference model; zeros when there is none
    advantages: Leaf  # float32 [B K]
    weights: Leaf  # float32 [B K], the entry's share of the loss; 0 on padding
    sample_ids: Leaf  # int32 [B K], index of the entry's sample within its row
    normaliser: Leaf  # float32 [], what the sum over the whole train batch is divided by
    num_scored: Leaf  # int32 [], entries of the whole train batch
