"""Exact reference rewards of `frozen_lake_compact`: the ladder that a trained agent climbs.

Four players, each with its expected reward at every position of a pack, by enumeration of all
tasks, all 24 maps and all beliefs that can arise; nothing is sampled.

A belief is the set of maps that everything observed so far leaves possible, as a bitmask over the
permutations; the true map is equally likely to be any of its members. By the symmetry of the codes
only one belief of each class of renamings needs to be worked out.
"""

from __future__ import annotations

import collections
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

from codjax.envs import frozen_lake_compact, grid, options

Beliefs = dict[int, float]  # belief → weight

_PERMUTATIONS = tuple(itertools.permutations(grid.DIRECTIONS))
_NUM_CODES = len(grid.DIRECTIONS)
_EVERYTHING = (1 << len(_PERMUTATIONS)) - 1
# _CONSISTENT[code][direction]: the maps in which the code goes that way.
_CONSISTENT = tuple(
    {
        direction: sum(1 << i for i, map_ in enumerate(_PERMUTATIONS) if map_[code] == direction)
        for direction in grid.DIRECTIONS
    }
    for code in range(_NUM_CODES)
)


def compact_ladder(
    pack_size: int,
    settings: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
) -> dict[str, list[float]]:
    """Expected reward per position of four reference players.

    * ``uniform`` presses codes at random.
    * ``no_knowledge`` plays as well as possible within each task and forgets it afterwards.
    * ``bayes`` carries everything that it observed to the next task. It is *myopic*: it maximises
      the chance to solve the present task (looking ahead over all presses left in it) and never
      gives up any of it to learn for later ones. Of presses that are equally good, it takes those
      that learn most, in the sense of the smallest expected number of maps left possible when the
      task ends; and of those that are equal in this as well, one at random. A player that invests
      in exploring could do better at late positions, at a price at early ones.
    * ``known`` knows the map.

    The thinking players know the rules of the game and see the cells of the player and of the
    goal. The text shows only bearings, so an agent that reads it has somewhat less to go on.

    Args:
        pack_size: S, at least 1.
        settings: overrides of the environment's settings, as in the config.
        data: overrides of its data options; they decide which tasks are drawn.

    Returns:
        player → S rewards. By default: uniform 0.181; no_knowledge 0.253; bayes 0.253, 0.693,
        0.890, 0.958 for S = 4; known 1. Takes half a second by default, about 15 on a board
        of size 6 with 4 presses; longer packs cost little more.
    """
    if pack_size < 1:
        raise ValueError(f"pack_size must be at least 1; got {pack_size}.")
    name, spec = "frozen_lake_compact", frozen_lake_compact.SPEC
    chosen = options.build(spec.data, data or {}, label=f"{name}: data")
    num_presses = options.build(
        spec.settings, settings or {}, label=f"{name}: settings"
    ).agent_max_steps
    tasks = tuple(frozen_lake_compact.pairs(chosen))
    num_near = sum(grid.distance(start, goal) <= num_presses for start, goal in tasks)
    bayes = _bayes_rewards(pack_size, tasks, size=chosen.size, num_presses=num_presses)
    return {
        "uniform": [_uniform_reward(tasks, size=chosen.size, num_presses=num_presses)] * pack_size,
        "no_knowledge": [bayes[0]] * pack_size,
        "bayes": bayes,
        "known": [num_near / len(tasks)] * pack_size,
    }


# Environments whose ladder is known: name → (pack size, settings, data) → player → rewards.
LADDERS: Mapping[str, Callable[..., dict[str, list[float]]]] = {
    "frozen_lake_compact": compact_ladder,
}


def _uniform_reward(
    tasks: tuple[tuple[grid.Cell, grid.Cell], ...], *, size: int, num_presses: int
) -> float:
    """Chance that a walk in uniformly random directions meets the goal in time."""

    @functools.cache
    def chance(cell: grid.Cell, goal: grid.Cell, presses: int) -> float:
        if cell == goal:
            return 1.0
        if presses == 0:
            return 0.0
        cells = [grid.move(cell, direction, size=size) for direction in grid.DIRECTIONS]
        return sum(chance(after, goal, presses - 1) for after in cells) / len(cells)

    return sum(chance(start, goal, num_presses) for start, goal in tasks) / len(tasks)


def _bayes_rewards(
    pack_size: int,
    tasks: tuple[tuple[grid.Cell, grid.Cell], ...],
    *,
    size: int,
    num_presses: int,
) -> list[float]:
    """The distribution over beliefs, pushed through one random task after the other."""
    work_out = functools.cache(
        functools.partial(_average_task, tasks=tasks, size=size, num_presses=num_presses)
    )
    rewards = []
    beliefs: Beliefs = {_EVERYTHING: 1.0}
    for _ in range(pack_size):
        reward = 0.0
        after: Beliefs = collections.defaultdict(float)
        for belief, weight in beliefs.items():
            belief_reward, belief_after = work_out(belief)
            reward += weight * belief_reward
            for new_belief, chance in belief_after.items():
                after[new_belief] += weight * chance
        rewards.append(reward)
        beliefs = after
    return rewards


def _average_task(
    belief: int,
    *,
    tasks: tuple[tuple[grid.Cell, grid.Cell], ...],
    size: int,
    num_presses: int,
) -> tuple[float, Beliefs]:
    """Expected reward of a uniformly drawn task, and the beliefs after it with their chances."""

    # Everything inside counts maps instead of chances, so that ties are ties of integers.
    @functools.cache
    def play(belief: int, cell: grid.Cell, goal: grid.Cell, presses: int) -> _Play:
        if cell == goal or presses == 0:
            count = belief.bit_count()
            return count * (cell == goal), count**2, {belief: float(count)}
        plays = [
            _sum_plays(
                [
                    play(left, after, goal, presses - 1)
                    for after, left in _effects(belief, code, cell, size=size).items()
                ]
            )
            for code in range(_NUM_CODES)
        ]
        best = max((solved, -uncertainty) for solved, uncertainty, _ in plays)
        ties = [one for one in plays if (one[0], -one[1]) == best]
        _, _, mixed = _sum_plays(ties)
        return best[0], -best[1], {key: value / len(ties) for key, value in mixed.items()}

    num_maps = belief.bit_count()
    solved, _, after = _sum_plays([play(belief, *task, num_presses) for task in tasks])
    share = 1.0 / (num_maps * len(tasks))
    classes: Beliefs = collections.defaultdict(float)
    for left, count in after.items():
        classes[_canonical(left)] += count * share
    return solved * share, classes


# Maps for which the task gets solved; sum of the squared sizes of the beliefs at its end, each
# counted once (over the number of maps: how many are left on average); maps per belief at its end.
_Play = tuple[int, int, Beliefs]


def _sum_plays(plays: list[_Play]) -> _Play:
    after: Beliefs = collections.defaultdict(float)
    for _, _, beliefs in plays:
        for belief, count in beliefs.items():
            after[belief] += count
    return sum(one[0] for one in plays), sum(one[1] for one in plays), after


def _effects(belief: int, code: int, cell: grid.Cell, *, size: int) -> dict[grid.Cell, int]:
    """Where a press may lead, and the maps left possible if it does (a bump may be several)."""
    after: dict[grid.Cell, int] = collections.defaultdict(int)
    for direction in grid.DIRECTIONS:
        left = belief & _CONSISTENT[code][direction]
        if left:
            after[grid.move(cell, direction, size=size)] |= left
    return after


@functools.cache
def _canonical(belief: int) -> int:
    """The smallest belief that renaming the codes can make of it."""
    members = [i for i in range(len(_PERMUTATIONS)) if belief >> i & 1]
    return min(sum(1 << row[i] for i in members) for row in _renamings())


@functools.cache
def _renamings() -> tuple[tuple[int, ...], ...]:
    """For each renaming of the codes, the number that each map gets."""
    index = {map_: i for i, map_ in enumerate(_PERMUTATIONS)}
    return tuple(
        tuple(index[tuple(map_[code] for code in order)] for map_ in _PERMUTATIONS)
        for order in itertools.permutations(range(_NUM_CODES))
    )
