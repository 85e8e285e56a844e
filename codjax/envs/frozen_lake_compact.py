"""`frozen_lake_compact`: the laptop task, in which one character is one token.

A board without holes; four codes a, b, c, d that stand for the four directions by a permutation
that the pack shares. The player presses codes and is told what each did:

    :UR     first observation: the goal is further up and further to the right
    c       the model presses c
    U-R     c moved up; the goal is now straight to the right
    a       the model presses a
    R--     a moved right, onto the goal

An observation after a press is its effect (U, D, L, R, or - for a bump into the edge) followed by
the two bearing characters: vertical U, D or -, horizontal L, R or -. Positions are never shown.
With a budget of two presses and goals at distance 1 or 2, a player who does not know the map
reaches the goal one time in four, one who does, always (`codjax.envs.ladder`).
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np

from codjax.envs import grid, protocol

CODES = "abcd"
LETTERS = {
    grid.Direction.UP: "U",
    grid.Direction.DOWN: "D",
    grid.Direction.LEFT: "L",
    grid.Direction.RIGHT: "R",
}
NONE = "-"  # no movement, or level with the goal
NOT_READ = "?"  # final observation after an answer that is no code

# Every character that the environment can show or read, that a note about the codes may hold
# (one of U, D, L, R, ? per code), or that opens a text or a note (^, #).
ALPHABET = "^abcdUDLR?-:#"

_DATA_SEED = 42
_MAX_SIZE = 12  # the pairs of cells are listed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of the environment.

    Attributes:
        agent_max_steps: presses that a task allows.
    """

    agent_max_steps: int = 2

    def __post_init__(self) -> None:
        if self.agent_max_steps < 1:
            raise ValueError(f"agent_max_steps must be at least 1; got {self.agent_max_steps}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Options of the record generator.

    Attributes:
        num_train: rows of the train split.
        num_test: rows of the test split.
        size: rows and columns of the board.
        min_distance: smallest Manhattan distance from start to goal.
        max_distance: largest.
    """

    num_train: int = 50_000
    num_test: int = 4_000
    size: int = 4
    min_distance: int = 1
    max_distance: int = 2

    def __post_init__(self) -> None:
        if self.num_train < 0 or self.num_test < 0:
            raise ValueError(
                f"num_train and num_test must be at least 0; got {self.num_train} and "
                f"{self.num_test}."
            )
        if not 2 <= self.size <= _MAX_SIZE:
            raise ValueError(f"size must be from 2 to {_MAX_SIZE}; got {self.size}.")
        if not 1 <= self.min_distance <= self.max_distance <= 2 * (self.size - 1):
            raise ValueError(
                "min_distance and max_distance must satisfy 1 <= min_distance <= max_distance <= "
                f"{2 * (self.size - 1)}, the longest way on a board of size {self.size}; got "
                f"{self.min_distance} and {self.max_distance}."
            )


def pairs(data: Data) -> list[tuple[grid.Cell, grid.Cell]]:
    """All (start, goal) that the data allow; 116 by default. A row is one, drawn uniformly."""
    cells = list(itertools.product(range(data.size), range(data.size)))
    return [
        (start, goal)
        for start, goal in itertools.product(cells, cells)
        if data.min_distance <= grid.distance(start, goal) <= data.max_distance
    ]


def records(data: Data, split: str, num_records: int) -> list[dict[str, Any]]:
    """The first `num_records` rows of a split: start, goal, size, seed, index.

    Random stream: NumPy's legacy generator seeded with 42 draws the pair numbers of the train
    rows, then those of the test rows. There are fewer pairs than rows, so both splits hold the
    same pairs; what differs between packs is the hidden mapping, which follows from the pack's
    seed. `seed` numbers the rows of both splits without a gap and names a row of neither twice.
    """
    rng = np.random.RandomState(_DATA_SEED)  # legacy: its stream never changes
    choices = pairs(data)
    train, test = (rng.randint(0, len(choices), size=n) for n in (data.num_train, data.num_test))
    drawn, offset = {"train": (train, 0), "test": (test, data.num_train)}[split]
    return [
        {
            "start": list(choices[number][0]),
            "goal": list(choices[number][1]),
            "size": data.size,
            "seed": offset + index,
            "index": index,
        }
        for index, number in enumerate(drawn[:num_records].tolist())
    ]


@dataclasses.dataclass(kw_only=True)
class _Episode:
    """What is true of the task being played."""

    size: int
    mapping: grid.Mapping
    goal: grid.Cell
    player: grid.Cell
    num_turns: int = 0
    is_done: bool = False
    has_format_error: bool = False


class FrozenLakeCompact:
    """The environment; holds one episode at a time."""

    def __init__(self, settings: Settings) -> None:
        self.max_turns = settings.agent_max_steps
        self.system_prompt = ""  # the model of this task learns the format, it cannot be told
        self._episode: _Episode | None = None

    def reset(
        self,
        record: protocol.Record,
        *,
        pack_seed: int | None,
        slot: int,
        pack_size: int,
        env_task_idx: int | None = None,
    ) -> str:
        """Begins the walk of the record; see `protocol.Environment.reset`."""
        del slot, pack_size, env_task_idx  # the walk is the record's, the mapping the pack's
        if pack_seed is None:
            raise ValueError(
                "frozen_lake_compact needs a pack_seed, from which the hidden mapping is drawn; "
                "got None."
            )
        (start_row, start_column), (goal_row, goal_column) = record["start"], record["goal"]
        start, goal, size = (start_row, start_column), (goal_row, goal_column), record["size"]
        if start == goal or not all(0 <= number < size for number in (*start, *goal)):
            raise ValueError(
                "a frozen_lake_compact record needs two different cells on a board of size "
                f"{size}; got start {start} and goal {goal}."
            )
        self._episode = _Episode(
            size=size, mapping=grid.draw_mapping(pack_seed), goal=goal, player=start
        )
        return ":" + bearing(start, goal)

    def step(self, text: str) -> protocol.StepResult:
        """Presses the code that the text, without surrounding blanks, must be."""
        episode = self._episode
        protocol.check_can_step(
            is_reset=episode is not None, is_done=episode is not None and episode.is_done
        )
        assert episode is not None
        episode.num_turns += 1
        answer = text.strip()
        if len(answer) != 1 or answer not in CODES:
            episode.has_format_error = episode.is_done = True
            return protocol.StepResult(observation=NOT_READ, done=True)
        direction = episode.mapping[CODES.index(answer)]
        old = episode.player
        episode.player = grid.move(old, direction, size=episode.size)
        effect = LETTERS[direction] if episode.player != old else NONE
        episode.is_done = episode.player == episode.goal or episode.num_turns >= self.max_turns
        return protocol.StepResult(
            observation=effect + bearing(episode.player, episode.goal), done=episode.is_done
        )

    def result(self) -> protocol.EpisodeResult:
        """Reward 1 on the goal, else 0. No feedback: the reward line already says it all."""
        protocol.check_can_report(is_reset=self._episode is not None)
        episode = self._episode
        assert episode is not None
        is_success = episode.player == episode.goal
        return protocol.EpisodeResult(
            raw_reward=float(is_success),
            is_success=is_success,
            feedback="",
            format_error=episode.has_format_error,
            num_turns=episode.num_turns,
        )


def bearing(player: grid.Cell, goal: grid.Cell) -> str:
    """Where the goal lies: vertical U, D or -, then horizontal L, R or -.

    >>> bearing((0, 2), (1, 2)), bearing((3, 0), (2, 1))
    ('D-', 'UR')
    """
    vertical = _sign_letter(goal[0] - player[0], "UD")
    return vertical + _sign_letter(goal[1] - player[1], "LR")


def draw_codes(pack_seed: int) -> dict[str, str]:
    """The hidden permutation of a pack as code → letter: what a perfect note would hold.

    >>> draw_codes(0)
    {'a': 'U', 'b': 'D', 'c': 'R', 'd': 'L'}
    """
    return {
        code: LETTERS[direction]
        for code, direction in zip(CODES, grid.draw_mapping(pack_seed), strict=True)
    }


def _sign_letter(number: int, letters: str) -> str:
    """The first letter for a negative number, the second for a positive one."""
    return NONE if number == 0 else letters[number > 0]


SPEC = protocol.EnvironmentSpec(
    make=FrozenLakeCompact, settings=Settings, data=Data, records=records
)
