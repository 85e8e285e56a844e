"""Rewards → returns → scores: the mathematics of credit (spec/algorithm.md §6 to §9).

The way of a number: rewards of a group `[G S]` → `returns`, what an episode can still influence
→ minus a baseline over the runs, `group_scores` → `reweight` over many episodes, so that long
failures do not drown the rest. Every response token of an episode then has the episode's score as
its advantage. `codjax.scoring` goes the whole way for the trajectories of a rollout step.

A run that was dropped is a row of nan: it comes out as nan and is no part of any baseline. All
arithmetic is float64; arrays come in as NumPy, JAX or nested lists.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from jaxtyping import Float

# One number for every solve and for every update episode of a group.
EpisodeValues = tuple[Float[np.ndarray, "G S"], Float[np.ndarray, "G S-1"]]
Number = float | int
Baseline = Callable[[np.ndarray], np.ndarray]  # returns of the runs [G ...] -> baseline [G ...]
Entry = TypeVar("Entry")

# §8.1: the bracket in which RED's temperature is sought, and when the search ends.
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.8, 100.0
BRACKET_WIDTH, MAX_HALVINGS = 0.05, 20
NEGLIGIBLE = 1e-9  # a mean or spread of scores below this is rounding


def returns(
    task_rewards: npt.ArrayLike,
    update_rewards: npt.ArrayLike,
    style: str = "mean",
    window: int | None = None,
    gamma: Number = 1.0,
) -> EpisodeValues:
    """Return ρ of every episode: what came of it and after it (§6).

    Solve k collects ``[r_k, …, r_{S-1}]``; update k, which follows task k, collects its own reward
    in place of r_k: ``[h_k, r_{k+1}, …, r_{S-1}]``. The style says how a list becomes a number:
    its mean, the mean of its first `window` entries, or the sum of ``gamma^i`` times entry i.

    Args:
        task_rewards: r, `[G S]`; a row of nan for a dropped run.
        update_rewards: h, `[G S-1]`.
        style: ``mean``, ``window_mean`` or ``discounted``.
        window: of ``window_mean``, at least 1.
        gamma: of ``discounted``, from 0 to 1.

    Returns:
        ρ of the solve episodes `[G S]` and of the update episodes `[G S-1]`.

    >>> solve, update = returns([[0.0, 1.0, 0.5]], [[-0.1, 0.0]])
    >>> solve.round(3).tolist(), update.round(3).tolist()
    ([[0.5, 0.75, 0.5]], [[0.467, 0.25]])
    """
    tasks, updates = _reward_arrays(task_rewards, update_rewards)
    positions = np.arange(tasks.shape[1])
    offsets = positions[None, :] - positions[:, None]
    weights = lookup(STYLES, style, key="credit.style")(offsets, window, gamma)
    # The own reward, and those of the later tasks; a matrix product could round equal runs
    # differently, and then a group of equal rewards would not score exactly 0.
    later = (tasks[:, None, :] * np.triu(weights, k=1)).sum(axis=-1)
    own = np.diagonal(weights)
    return later + own * tasks, later[:, :-1] + own[:-1] * updates


def group_scores(
    task_rewards: npt.ArrayLike,
    update_rewards: npt.ArrayLike,
    style: str = "mean",
    window: int | None = None,
    gamma: Number = 1.0,
    *,
    baseline: Baseline | None = None,
) -> EpisodeValues:
    """Scores of one group: returns minus a baseline over the runs of the same episode (§7).

    No division by a standard deviation; a run alone in its group has score 0.

    Args:
        task_rewards: `[G S]`; a row of nan for a dropped run, which stays nan.
        update_rewards: `[G S-1]`.
        style: as in `returns`, and so are `window` and `gamma`.
        baseline: returns of the runs present `[G ...]` → one for each; None: `group_mean`.

    Returns:
        Scores of the solve episodes `[G S]` and of the update episodes `[G S-1]`.

    >>> group_scores([[0.0, 1.0], [0.0, 0.0]], [[0.0], [0.0]])[0].tolist()
    [[0.25, 0.5], [-0.25, -0.5]]
    """
    solve, update = returns(task_rewards, update_rewards, style, window, gamma)
    return _minus_baseline(solve, baseline), _minus_baseline(update, baseline)


def group_mean(run_returns: Float[np.ndarray, " G *rest"]) -> Float[np.ndarray, " G *rest"]:
    """Baseline: the mean over the runs, the same for each (§7, the published choice)."""
    first = run_returns[:1]  # means are taken of differences, so that equal returns give exactly 0
    mean = first + np.mean(run_returns - first, axis=0, keepdims=True)
    return np.broadcast_to(mean, run_returns.shape)


def leave_one_out(run_returns: Float[np.ndarray, " G *rest"]) -> Float[np.ndarray, " G *rest"]:
    """Baseline: the mean over the other runs; a run alone is its own (RLOO, arXiv:2402.14740).

    It depends on nothing the run did itself, so the gradient is unbiased for any G; its scores are
    G / (G - 1) times those of `group_mean`.
    """
    num_others = run_returns.shape[0] - 1
    if num_others < 1:
        return run_returns.copy()
    shifted = run_returns - run_returns[:1]
    others = shifted.sum(axis=0, keepdims=True) - shifted
    return run_returns[:1] + others / num_others


def coarse_scores(
    task_rewards: npt.ArrayLike, decay: Number = 1.0, divide_by_std: bool = False
) -> Float[np.ndarray, " G"]:
    """One score per run, for the ablation in which the pack is a single outcome (§9).

    Args:
        task_rewards: `[G S]`; a row of nan for a dropped run, which stays nan.
        decay: task k counts ``decay^(S-1-k)``, so later tasks are heavier below 1.
        divide_by_std: divide by the standard deviation (of the population) of the runs present.

    Returns:
        Decayed sum of the rewards minus its group mean; 0 for runs that differ by rounding only.

    >>> coarse_scores([[1.0, 1.0], [0.0, 1.0]]).tolist()
    [0.5, -0.5]
    """
    totals = _coarse_returns(np.asarray(task_rewards, np.float64), decay)
    scores = _minus_baseline(totals)
    if divide_by_std:
        present = scores[~np.isnan(scores)]
        std = float(np.sqrt(np.mean(np.square(present)))) if present.size else 0.0
        scores = scores / std if std > NEGLIGIBLE else scores * 0.0
    return scores


def reweight(
    scores: npt.ArrayLike,
    num_tokens: npt.ArrayLike,
    mode: str = "adaptive",
    temperature: Number | None = None,
) -> tuple[Float[np.ndarray, " N"], float | None]:
    """Scores of one RED group, weighted so that negative tokens do not outweigh positive ones (§8).

    Failures run long, so the token-weighted mean of the scores is below 0 although the scores of
    a key sum to 0 over runs. ``adaptive`` multiplies each score by ``exp(score / T)`` when that
    mean is negative, with T near the root of F(T) = Σ n s exp(s / T); ``fixed`` does so always,
    with the T given; ``shift`` subtracts a negative mean from every score; ``off`` does nothing.

    Args:
        scores: of samples, or of episodes; nan entries stay nan and have no part.
        num_tokens: response tokens of each.
        mode: ``off``, ``fixed``, ``adaptive`` or ``shift``.
        temperature: of ``fixed``, above 0.

    Returns:
        The weighted scores, and the temperature used, None if no weight was applied.

    >>> weighted, temperature = reweight([0.5, -0.5], [100, 120])
    >>> weighted.round(6).tolist(), temperature
    ([0.547599, -0.456539], 5.4984375)
    """
    scores = np.asarray(scores, np.float64)
    tokens = np.asarray(num_tokens, np.float64)
    if scores.ndim != 1 or scores.shape != tokens.shape:
        raise ValueError(
            "scores and num_tokens must be vectors of one length; "
            f"got shapes {scores.shape} and {tokens.shape}."
        )
    function = lookup(REWEIGHT_MODES, mode, key="credit.reweight")
    present = ~np.isnan(scores)
    weighted = scores.copy()
    weighted[present], used = function(scores[present], tokens[present], temperature)
    return weighted, used


def _window_weights(offsets: np.ndarray, window: int | None) -> np.ndarray:
    if window is None or window < 1:
        raise ValueError(
            "credit.window must be at least 1 with credit.style 'window_mean': it counts the "
            f"rewards in the mean; got {window}."
        )
    inside = (offsets >= 0) & (offsets < window)
    return inside / inside.sum(axis=1, keepdims=True)


def _discounted_weights(offsets: np.ndarray, gamma: Number) -> np.ndarray:
    if not 0 <= gamma <= 1:
        raise ValueError(f"credit.gamma must be from 0 to 1; got {gamma}.")
    return np.where(offsets >= 0, float(gamma) ** np.maximum(offsets, 0), 0.0)


def _fixed(scores: np.ndarray, temperature: Number | None) -> tuple[np.ndarray, float]:
    if temperature is None or not temperature > 0:
        raise ValueError(
            "credit.reweight_temperature must be above 0 with credit.reweight 'fixed'; "
            f"got {temperature}."
        )
    return _weigh(scores, float(temperature)), float(temperature)


def _adaptive(scores: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, float | None]:
    if np.sum(tokens * scores) >= -NEGLIGIBLE * np.sum(tokens):
        return scores, None
    low, high = LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE
    temperature = high
    for _ in range(MAX_HALVINGS):
        temperature = (low + high) / 2
        if np.sum(tokens * _weigh(scores, temperature)) < 0:
            high = temperature
        else:
            low = temperature
        if high - low < BRACKET_WIDTH:
            break
    return _weigh(scores, temperature), temperature


def _shift(scores: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    total, num_tokens = np.sum(tokens * scores), np.sum(tokens)
    return scores if total >= -NEGLIGIBLE * num_tokens else scores - total / num_tokens


def _weigh(scores: np.ndarray, temperature: float) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        weighted = scores * np.exp(scores / temperature)
    if not np.all(np.isfinite(weighted)):
        raise ValueError(
            f"exp(score / T) overflows for a score of {np.max(scores):g} at T = {temperature:g}; "
            "use a larger credit.reweight_temperature, or credit.style 'mean', whose scores stay "
            "in the range of the rewards."
        )
    return weighted


# Every name of the credit config, and the function it stands for. A style gives the weight that
# the return at position k (row) gives to the reward at j (column), from the offsets j - k.
STYLES: dict[str, Callable[[np.ndarray, int | None, Number], np.ndarray]] = {
    "mean": lambda offsets, window, gamma: _window_weights(offsets, len(offsets)),
    "window_mean": lambda offsets, window, gamma: _window_weights(offsets, window),
    "discounted": lambda offsets, window, gamma: _discounted_weights(offsets, gamma),
}
BASELINES: dict[str, Baseline] = {"group_mean": group_mean, "leave_one_out": leave_one_out}
REWEIGHT_MODES: dict[str, Callable[..., tuple[np.ndarray, float | None]]] = {
    "off": lambda scores, tokens, temperature: (scores, None),
    "fixed": lambda scores, tokens, temperature: _fixed(scores, temperature),
    "adaptive": lambda scores, tokens, temperature: _adaptive(scores, tokens),
    "shift": lambda scores, tokens, temperature: (_shift(scores, tokens), None),
}


def lookup(table: Mapping[str, Entry], name: str, *, key: str) -> Entry:
    """The entry of a table of this page.

    Raises:
        ValueError: there is none of this name; says which there are, under the config key.
    """
    if name not in table:
        raise ValueError(f"{key} must be one of {', '.join(table)}; got {name!r}.")
    return table[name]


def score_by_episode(
    task_rewards: np.ndarray,
    update_rewards: np.ndarray,
    *,
    style: str,
    window: int | None,
    gamma: Number,
    baseline: Baseline,
) -> tuple[EpisodeValues, EpisodeValues]:
    """Returns and scores of one group, each episode with its own return (§6, §7)."""
    solve, update = returns(task_rewards, update_rewards, style, window, gamma)
    scores = _minus_baseline(solve, baseline), _minus_baseline(update, baseline)
    return (solve, update), scores


def score_by_run(
    task_rewards: np.ndarray, update_rewards: np.ndarray, *, decay: Number, divide_by_std: bool
) -> tuple[EpisodeValues, EpisodeValues]:
    """Every episode of a run gets the number of the run."""
    solve, update = np.ones_like(task_rewards), np.ones_like(update_rewards)
    totals = _coarse_returns(task_rewards, decay)[:, None]
    scores = coarse_scores(task_rewards, decay, divide_by_std)[:, None]
    return (totals * solve, totals * update), (scores * solve, scores * update)


def _coarse_returns(task_rewards: np.ndarray, decay: Number) -> np.ndarray:
    num_later = np.arange(task_rewards.shape[1])[::-1]
    return (task_rewards * float(decay) ** num_later).sum(axis=1)


def _minus_baseline(run_returns: np.ndarray, baseline: Baseline | None = None) -> np.ndarray:
    """Returns minus the baseline over the runs present; nan where they are nan."""
    baseline = baseline or group_mean
    scores = np.full_like(run_returns, np.nan)
    present = ~np.isnan(run_returns).reshape(len(run_returns), -1).any(axis=1)
    if present.any():
        scores[present] = run_returns[present] - baseline(run_returns[present])
    return scores


def _reward_arrays(
    task_rewards: npt.ArrayLike, update_rewards: npt.ArrayLike
) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64; a run with a nan anywhere becomes nan everywhere."""
    tasks = np.array(task_rewards, np.float64)
    updates = np.array(update_rewards, np.float64)
    if tasks.ndim != 2 or tasks.shape[1] < 1 or updates.shape != (len(tasks), tasks.shape[1] - 1):
        raise ValueError(
            "task_rewards must be [runs, tasks] and update_rewards [runs, tasks - 1], one update "
            f"after every task but the last; got shapes {tasks.shape} and {updates.shape}."
        )
    if np.isinf(tasks).any() or np.isinf(updates).any():
        raise ValueError("rewards must be finite, or nan for a dropped run; got an infinite one.")
    dropped = np.isnan(tasks).any(axis=1) | np.isnan(updates).any(axis=1)
    tasks[dropped] = updates[dropped] = np.nan
    return tasks, updates
