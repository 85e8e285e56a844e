"""Outcome rewards → the rewards that are credited: length and format penalties.

`task_reward` is r_k and `update_reward` is h_k of spec/algorithm.md §5.
"""

from __future__ import annotations

from collections.abc import Sequence


def task_reward(
    raw_reward: float,
    *,
    num_turns: int,
    max_turns: int,
    response_lengths: Sequence[int],
    coef: float,
    zero_tokens: int,
    full_tokens: int,
) -> float:
    """Reward of a solve episode: the outcome, less what it cost in turns and tokens.

    Only a positive outcome is reduced, and never below 0, so failing gets neither shorter nor
    longer by it (spec/algorithm.md §5.1).

    Args:
        raw_reward: outcome reward R of the environment.
        num_turns: model calls that were made.
        max_turns: limit of the environment, at least 1.
        response_lengths: tokens of every response.
        coef: c; 0 switches both penalties off.
        zero_tokens: a response up to this length costs nothing.
        full_tokens: a response from this length on costs `coef`; greater than `zero_tokens`.

    Returns:
        ``max(0, R - coef * (mean token share + num_turns / max_turns))``, or R if R <= 0.

    >>> task_reward(1.0, num_turns=4, max_turns=8, response_lengths=[9] * 4, coef=0.1,
    ...             zero_tokens=1_000_000, full_tokens=2_000_000)
    0.95
    """
    if raw_reward <= 0 or coef == 0:
        return raw_reward
    shares = [_ramp(length, zero_tokens, full_tokens) for length in response_lengths]
    token_share = sum(shares) / max(len(shares), 1)
    return max(0.0, raw_reward - coef * (token_share + num_turns / max_turns))


def update_reward(
    *,
    parsed: bool,
    num_tokens: int,
    coef: float,
    min_tokens: int | None,
    zero_tokens: int | None,
    full_tokens: int | None,
) -> float:
    """Reward of an update episode: 0, or a penalty of at most `coef` (spec/algorithm.md §5.2).

    Args:
        parsed: whether the response held a hint; if not, the penalty is full.
        num_tokens: tokens of the response.
        coef: largest penalty.
        min_tokens: a shorter response costs `coef`; None for no such limit.
        zero_tokens: a response up to this length costs nothing; None switches length off.
        full_tokens: a response from this length on costs `coef`; None switches length off.

    >>> update_reward(parsed=False, num_tokens=9, coef=0.1, min_tokens=None, zero_tokens=None,
    ...               full_tokens=None)
    -0.1
    """
    if not parsed:
        share = 1.0
    elif zero_tokens is None or full_tokens is None:
        share = 0.0
    elif min_tokens is not None and num_tokens < min_tokens:
        share = 1.0
    else:
        share = _ramp(num_tokens, zero_tokens, full_tokens)
    return 0.0 - coef * share  # and not -0.0


def _ramp(length: int, zero_tokens: int, full_tokens: int) -> float:
    return min(max((length - zero_tokens) / (full_tokens - zero_tokens), 0.0), 1.0)
