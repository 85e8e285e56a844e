"""The trajectories of a rollout step → one score per episode.

    rules = make_rules(config.credit)                        # names are looked up here, once
    scored_groups, metrics = score_trajectories(groups, rules)

The mathematics is in `codjax.credit`; this page knows about runs that were dropped, episodes in
order of time, and over which samples RED looks for its temperature.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from codjax import credit
from codjax.types import EpisodeKind, Pack, Trajectory


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoredTrajectory:
    """A run that was kept, with the credit of its episodes.

    Attributes:
        trajectory: the run.
        scores: per episode of the trajectory, after RED: the advantage of its response tokens.
        returns: per episode, what the score was made from; for display.
    """

    trajectory: Trajectory
    scores: tuple[float, ...]
    returns: tuple[float, ...]


class GroupCredit(NamedTuple):
    """What RED needs to know of the kept runs of one group, and what is shown of them."""

    returns: np.ndarray  # [G E], per episode of a run, in order of time
    scores: np.ndarray  # [G E], before RED
    tokens: np.ndarray  # [G E], response tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """The functions that a credit config stands for; made by `make_rules`.

    Attributes:
        score_group: task rewards `[G S]`, update rewards `[G S-1]` → returns, scores.
        reweight: scores, token counts of one RED group → weighted scores, temperature.
        red_group: index of the group in the step, its pack → which RED group it belongs to.
    """

    score_group: Callable[
        [np.ndarray, np.ndarray], tuple[credit.EpisodeValues, credit.EpisodeValues]
    ]
    reweight: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, float | None]]
    red_group: Callable[[int, Pack], Hashable]


def make_rules(settings: ConfigDict) -> Rules:
    """The rules of `config.credit`: every name in it is looked up here, and its values checked.

    Raises:
        ValueError: a name that is in no table, or a value that the chosen style or mode forbids.
    """
    schemes = {
        "episodes": functools.partial(
            credit.score_by_episode,
            style=settings.style,
            window=settings.window,
            gamma=settings.gamma,
            baseline=credit.lookup(credit.BASELINES, settings.baseline, key="credit.baseline"),
        ),
        "coarse": functools.partial(
            credit.score_by_run,
            decay=settings.coarse_decay,
            divide_by_std=settings.coarse_divide_by_std,
        ),
    }
    rules = Rules(
        score_group=credit.lookup(schemes, settings.scheme, key="credit.scheme"),
        reweight=functools.partial(
            credit.reweight, mode=settings.reweight, temperature=settings.reweight_temperature
        ),
        red_group=credit.lookup(RED_GROUPS, settings.reweight_group, key="credit.reweight_group"),
    )
    # On no data: a wrong value is better reported before the first rollout than after it.
    rules.score_group(np.zeros((1, 1)), np.zeros((1, 0)))
    rules.reweight(np.zeros(1), np.ones(1))
    return rules


def score_trajectories(
    groups: Sequence[Sequence[Trajectory]], rules: Rules
) -> tuple[list[list[ScoredTrajectory]], dict[str, float]]:
    """Score of every episode of a rollout step.

    A run with a `failure` is left out before returns are taken, since all its returns would share
    the damage, and counted under ``credit/dropped_runs``. RED speaks of samples, one per turn; the
    samples of an episode have one score, so an episode with the sum of their tokens is the same.

    Args:
        groups: the runs of each pack.
        rules: see `make_rules`.

    Returns:
        The kept runs, group by group in the order given (a group may be empty), and metrics:
        token means of the scores before and after RED, the share of RED groups that it changed,
        its mean temperature where one was used, and the share of (pack, kind, position) keys in
        which all scores are 0, that is, which have nothing to teach. Metrics of nothing (no token,
        no temperature) are absent.
    """
    kept = [[run for run in group if run.failure is None] for group in groups]
    filled = [index for index, runs in enumerate(kept) if runs]
    of_groups = [_credit_of(kept[index], rules) for index in filled]
    names = [rules.red_group(index, kept[index][0].pack) for index in filled]
    after, red_metrics = _reweight_groups(of_groups, names, rules)
    scored: list[list[ScoredTrajectory]] = [[] for _ in groups]
    for index, of_group, scores in zip(filled, of_groups, after, strict=True):
        scored[index] = [
            ScoredTrajectory(trajectory=run, scores=tuple(run_scores), returns=tuple(run_returns))
            for run, run_scores, run_returns in zip(
                kept[index], scores.tolist(), of_group.returns.tolist(), strict=True
            )
        ]
    num_dropped = sum(map(len, groups)) - sum(map(len, kept))
    metrics = {"credit/dropped_runs": float(num_dropped), **red_metrics}
    if of_groups:
        is_zero = [np.abs(one.scores).max(axis=0) < credit.NEGLIGIBLE for one in of_groups]
        metrics["credit/zero_variance_frac"] = float(np.mean(np.concatenate(is_zero)))
    return scored, metrics


def _credit_of(runs: Sequence[Trajectory], rules: Rules) -> GroupCredit:
    """Returns, scores and token counts of the episodes of a group, each `[G E]`."""
    task_rewards = np.array([_rewards(run, EpisodeKind.SOLVE_TASK) for run in runs])
    update_rewards = np.array([_rewards(run, EpisodeKind.UPDATE_CONTEXT) for run in runs])
    if not (np.isfinite(task_rewards).all() and np.isfinite(update_rewards).all()):
        raise ValueError(
            "a run without a failure has a reward that is not finite; an environment must give "
            "finite rewards, or end the run with a StopReason in codjax.types.FAILURES."
        )
    run_returns, scores = rules.score_group(task_rewards, update_rewards)
    return GroupCredit(
        returns=_by_episode(runs, run_returns),
        scores=_by_episode(runs, scores),
        tokens=np.array(
            [[sum(len(t.response_tokens) for t in e.turns) for e in run.episodes] for run in runs]
        ),
    )


def _by_episode(runs: Sequence[Trajectory], values: credit.EpisodeValues) -> np.ndarray:
    """Values of solve and update episodes, put in the order of each run's episodes `[G E]`."""
    by_kind = {EpisodeKind.SOLVE_TASK: values[0], EpisodeKind.UPDATE_CONTEXT: values[1]}
    return np.array(
        [[by_kind[e.kind][g, e.position] for e in run.episodes] for g, run in enumerate(runs)]
    )


def _rewards(run: Trajectory, kind: EpisodeKind) -> np.ndarray:
    """Rewards of the run's episodes of one kind, by position."""
    episodes = sorted(run.episodes_of(kind), key=lambda episode: episode.position)
    return np.array([episode.reward for episode in episodes], np.float64)


def _reweight_groups(
    of_groups: Sequence[GroupCredit], names: Sequence[Hashable], rules: Rules
) -> tuple[list[np.ndarray], dict[str, float]]:
    """Scores of each group after RED over all groups of one name, and what RED did."""
    if not of_groups:
        return [], {}
    sizes = [one.scores.size for one in of_groups]
    before = np.concatenate([one.scores.ravel() for one in of_groups])
    tokens = np.concatenate([one.tokens.ravel() for one in of_groups])
    after, is_active, temperatures = before.copy(), [], []
    for name in dict.fromkeys(names):
        inside = np.repeat([name == other for other in names], sizes)
        after[inside], temperature = rules.reweight(before[inside], tokens[inside])
        is_active.append(not np.array_equal(after[inside], before[inside]))
        temperatures += [] if temperature is None else [temperature]
    metrics = {"credit/reweight_active_frac": float(np.mean(is_active))}
    if temperatures:
        metrics["credit/reweight_temperature"] = float(np.mean(temperatures))
    if tokens.any():
        metrics["credit/token_mean_score_before"] = float(np.average(before, weights=tokens))
        metrics["credit/token_mean_score_after"] = float(np.average(after, weights=tokens))
    parts = np.split(after, np.cumsum(sizes)[:-1])
    return [p.reshape(c.scores.shape) for p, c in zip(parts, of_groups, strict=True)], metrics


# What `credit.reweight_group` may be: over which episodes RED seeks one temperature.
RED_GROUPS: dict[str, Callable[[int, Pack], Hashable]] = {
    "pack": lambda index, _: index,
    "taskset": lambda _, pack: pack.tasks[0].taskset,
    "batch": lambda *_: "batch",
}
