"""`frozen_lake_obscure`: a walk over ice with four anonymous actions (spec core §2).

What "Direction 1" to "Direction 4" do is a hidden permutation, by default shared by the pack. The
board is different in every task, so the permutation is what is worth carrying to the next one.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import random
import re
from typing import Any, Literal

from codjax import seeds
from codjax.envs import answers, grid, protocol, templates
from codjax.envs import frozen_lake_data as boards

ACTIONS = tuple(f"Direction {number}" for number in range(1, 5))
NUM_PERMUTATIONS = math.factorial(len(grid.DIRECTIONS))

# What a record that leaves the field out stands for.
RECORD_DEFAULTS: dict[str, Any] = {"size": 4, "p": 0.8, "seed": 42}

SYMBOLS = {boards.START: "_", boards.FROZEN: "_", boards.HOLE: "O", boards.GOAL: "G"}
PLAYER, PLAYER_IN_HOLE, PLAYER_ON_GOAL = "P", "X", "√"

_ACTION_PATTERN = re.compile(r"[Dd]irection\s+(\d+)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of the environment; the defaults are those of published training.

    Attributes:
        map_path_bound: depth bound of the board generator's search (6 in training, 8 in the hard
            evaluation; published as `env_max_steps`); paths of boards have at most one move more.
        agent_max_steps: turn limit (8 in training, 10 in the hard evaluation).
        validity: which boards the generator keeps: "reference_dfs", the published search with
            its quirks, or "bfs", all whose shortest path is within the bound.
        mapping_mode: where the hidden permutation comes from. "per_pack": the pack seed.
            "per_task": the record's `mapping` (direction names), `mapping_index` or
            `mapping_seed`, the first that it has, or else its `seed`. "global": `mapping`,
            `mapping_index`, or else Down, Right, Up, Left.
        mapping: "global" only: the direction of each action, e.g. ("Up", "Down", "Left", "Right").
        mapping_index: "global" only: number of the permutation, 0..23.
        is_slippery: moves go the intended way or to one of its sides, a third each.
        desc: rows of a fixed board (S, F, H, G) to use for every record.
    """

    map_path_bound: int = 6
    agent_max_steps: int = 8
    validity: Literal["reference_dfs", "bfs"] = "reference_dfs"
    mapping_mode: Literal["per_pack", "per_task", "global"] = "per_pack"
    mapping: tuple[str, ...] | None = None
    mapping_index: int | None = None
    is_slippery: bool = False
    desc: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.map_path_bound < 0:
            raise ValueError(f"map_path_bound must be at least 0; got {self.map_path_bound}.")
        if self.agent_max_steps < 1:
            raise ValueError(f"agent_max_steps must be at least 1; got {self.agent_max_steps}.")
        for name, value in (("mapping", self.mapping), ("mapping_index", self.mapping_index)):
            if value is not None and self.mapping_mode != "global":
                raise ValueError(
                    f"{name} is read only when mapping_mode is 'global'; mapping_mode is "
                    f"{self.mapping_mode!r}."
                )
        if self.mapping is not None and self.mapping_index is not None:
            raise ValueError("mapping and mapping_index both name the permutation: set one.")
        if self.mapping is not None:
            _mapping_of_names(self.mapping)
        if self.mapping_index is not None:
            _mapping_of_index(self.mapping_index)
        if self.desc is not None:
            boards.check_board(self.desc)


class Outcome(enum.StrEnum):
    """How far the episode is."""

    RUNNING = "running"
    GOAL = "goal"
    HOLE = "hole"
    FORMAT_ERROR = "format_error"
    OUT_OF_STEPS = "out_of_steps"


@dataclasses.dataclass(kw_only=True)
class _Episode:
    """What is true of the task being played."""

    board: boards.Board
    mapping: grid.Mapping
    goal: grid.Cell
    player: grid.Cell
    slip_rng: random.Random | None
    num_turns: int = 0
    outcome: Outcome = Outcome.RUNNING
    error: str = ""


class FrozenLake:
    """The environment; holds one episode at a time."""

    def __init__(self, settings: Settings) -> None:
        self.max_turns = settings.agent_max_steps
        self.system_prompt = templates.render(
            "frozen_lake_system.jinja", actions=ACTIONS, is_slippery=settings.is_slippery
        )
        self._settings = settings
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
        """Draws the board of the record and the mapping; see `protocol.Environment.reset`."""
        del pack_size, env_task_idx  # the board is the record's, the mapping the pack's
        record = {**RECORD_DEFAULTS, **record}
        board = make_board(record, self._settings)
        slip_rng = None
        if self._settings.is_slippery:
            # All runs of a pack meet the same slips, step by step.
            seed = seeds.derive_seed("slip", record["seed"], str(pack_seed), slot)
            slip_rng = random.Random(seed)
        episode = _Episode(
            board=board,
            mapping=choose_mapping(record, self._settings, pack_seed=pack_seed),
            goal=boards.find(board, boards.GOAL),
            player=boards.find(board, boards.START),
            slip_rng=slip_rng,
        )
        self._episode = episode
        return self._observation(episode, last_action="")

    def step(self, text: str) -> protocol.StepResult:
        """Plays the one action that the text must hold."""
        episode = self._episode
        protocol.check_can_step(
            is_reset=episode is not None,
            is_done=episode is not None and episode.outcome is not Outcome.RUNNING,
        )
        assert episode is not None
        episode.num_turns += 1
        action = parse_action(text)
        if isinstance(action, str):
            episode.outcome = Outcome.FORMAT_ERROR
            episode.error = action
            return protocol.StepResult(observation=action, done=True)
        last_action = _act(episode, action)
        if episode.outcome is Outcome.RUNNING and episode.num_turns >= self.max_turns:
            episode.outcome = Outcome.OUT_OF_STEPS
        if episode.outcome is Outcome.RUNNING:
            observation = self._observation(episode, last_action=last_action)
            return protocol.StepResult(observation=observation, done=False)
        final = templates.render(
            "frozen_lake_final.jinja",
            last_action=last_action,
            board=render_board(episode.board, episode.player),
        )
        return protocol.StepResult(observation=final, done=True)

    def result(self) -> protocol.EpisodeResult:
        """Reward 1 on the goal, else 0, and the feedback of spec core §2.7."""
        protocol.check_can_report(is_reset=self._episode is not None)
        episode = self._episode
        assert episode is not None
        is_success = episode.outcome is Outcome.GOAL
        return protocol.EpisodeResult(
            raw_reward=float(is_success),
            is_success=is_success,
            feedback=templates.render(
                "frozen_lake_feedback.jinja",
                outcome=episode.outcome.value,
                error=episode.error,
                num_turns=episode.num_turns,
                max_steps=self.max_turns,
            ),
            format_error=episode.outcome is Outcome.FORMAT_ERROR,
            num_turns=episode.num_turns,
        )

    def _observation(self, episode: _Episode, *, last_action: str) -> str:
        return templates.render(
            "frozen_lake_observation.jinja",
            step=episode.num_turns + 1,
            max_steps=self.max_turns,
            last_action=last_action,
            board=render_board(episode.board, episode.player),
            goal=episode.goal,
        )


def parse_action(text: str) -> int | str:
    """The action index 0..3 that a model output names, or the message of its format error.

    The content of the single answer block must begin with "Direction" or "direction" and a
    number; whatever follows is ignored.

    >>> parse_action("left is free <answer> direction 3 now</answer>")
    2
    """
    content = answers.extract(text)
    match = _ACTION_PATTERN.match(content.strip()) if content is not None else None
    if match is None:
        return templates.render("frozen_lake_error.jinja", number=None, num_actions=len(ACTIONS))
    # The digits may be thousands, for which int() raises, or of any script, which int() reads.
    digits = match[1].lstrip("0")
    number = int(digits) if len(digits) == 1 else 0
    if 1 <= number <= len(ACTIONS):
        return number - 1
    shown = match[1] if len(match[1]) <= 10 else match[1][:10] + "..."
    return templates.render("frozen_lake_error.jinja", number=shown, num_actions=len(ACTIONS))


def render_board(board: boards.Board, player: grid.Cell) -> str:
    """The board as text: one line a row, each cell a blank, its symbol, a blank and a tab."""
    overlay = {boards.HOLE: PLAYER_IN_HOLE, boards.GOAL: PLAYER_ON_GOAL}
    lines = [[SYMBOLS[tile] for tile in row] for row in board]
    lines[player[0]][player[1]] = overlay.get(boards.tile_at(board, player), PLAYER)
    return "\n".join("".join(f" {symbol} \t" for symbol in line) for line in lines)


def make_board(record: protocol.Record, settings: Settings) -> boards.Board:
    """The board that a complete record stands for.

    Raises:
        ValueError: a field of the record is out of range.
    """
    if settings.desc is not None:
        return settings.desc
    size, p = record["size"], record["p"]
    if not boards.MIN_SIZE <= size <= boards.MAX_SIZE:
        raise ValueError(
            f"a frozen_lake_obscure record needs a size from {boards.MIN_SIZE} to "
            f"{boards.MAX_SIZE}; got {size!r}."
        )
    if not p >= 0.0:  # also catches nan; above 1 means 1
        raise ValueError(f"a frozen_lake_obscure record needs p of at least 0; got {p!r}.")
    accept = boards.passes_bfs if settings.validity == "bfs" else boards.passes_reference_dfs
    return boards.generate_board(
        record["seed"],
        size,
        p=p,
        is_valid=lambda board: accept(board, path_bound=settings.map_path_bound),
    )


def choose_mapping(
    record: protocol.Record, settings: Settings, *, pack_seed: int | None
) -> grid.Mapping:
    """The hidden permutation of a task; see `Settings.mapping_mode`.

    Raises:
        ValueError: mode "per_pack" without a pack seed, or a bad mapping in the record.
    """
    if settings.mapping_mode == "per_pack":
        if pack_seed is None:
            raise ValueError(
                "frozen_lake_obscure with mapping_mode 'per_pack' needs a pack_seed, from which "
                "the hidden mapping is drawn; got None."
            )
        return grid.draw_mapping(pack_seed)
    if settings.mapping_mode == "global":
        if settings.mapping is not None:
            return _mapping_of_names(settings.mapping)
        return _mapping_of_index(settings.mapping_index or 0)
    if "mapping" in record:
        return _mapping_of_names(tuple(record["mapping"]))
    if "mapping_index" in record:
        return _mapping_of_index(record["mapping_index"])
    return grid.draw_mapping(record["mapping_seed"] if "mapping_seed" in record else record["seed"])


def _act(episode: _Episode, action: int) -> str:
    """Moves the player, marks a hole or the goal, and says what happened."""
    direction = episode.mapping[action]
    if episode.slip_rng is not None:
        direction = grid.slip(direction, rng=episode.slip_rng)
    old = episode.player
    episode.player = grid.move(old, direction, size=len(episode.board))
    ends = {boards.HOLE: Outcome.HOLE, boards.GOAL: Outcome.GOAL}
    episode.outcome = ends.get(boards.tile_at(episode.board, episode.player), Outcome.RUNNING)
    return templates.render(
        "frozen_lake_action.jinja", action=ACTIONS[action], old=old, new=episode.player
    )


def _mapping_of_names(names: tuple[str, ...]) -> grid.Mapping:
    if sorted(names) != sorted(grid.DIRECTIONS):
        raise ValueError(
            f"mapping must hold each of {', '.join(grid.DIRECTIONS)} once; got {names!r:.200}."
        )
    return tuple(grid.Direction(name) for name in names)


def _mapping_of_index(index: int) -> grid.Mapping:
    if not 0 <= index < NUM_PERMUTATIONS:
        raise ValueError(f"mapping_index must be 0..{NUM_PERMUTATIONS - 1}; got {index!r}.")
    return grid.permutation(index)


SPEC = protocol.EnvironmentSpec(
    make=FrozenLake,
    settings=Settings,
    data=boards.Data,
    records=boards.records,
    aliases={"env_max_steps": "map_path_bound"},
)
