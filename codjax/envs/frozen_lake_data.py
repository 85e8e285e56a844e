"""Boards and records of `frozen_lake_obscure` (spec core §2.2 and §2.8).

A record names a board by `seed`, `size` and `p`; `generate_board` draws it. Both follow the
published random streams draw by draw, so seeds mean the same boards as elsewhere.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from codjax.envs import grid

START, FROZEN, HOLE, GOAL = "S", "F", "H", "G"
MIN_SIZE = 2  # a smaller board has no room for a start and a goal
MAX_SIZE = 100  # keeps a mistyped size from filling the memory

_DATA_SEED = 42  # fixed in the published generator
_NUM_SEEDS = 100_000  # record seeds are below it

Board = tuple[str, ...]  # rows of S, F, H, G


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Options of the record generator.

    Attributes:
        num_train: rows of the train split.
        num_test: rows of the test split. Both counts are part of the random stream: the test
            rows of another `num_train` are other rows.
        min_size: smallest board, inclusive.
        max_size: largest board, inclusive.
        min_p: lowest probability that a tile is frozen.
        max_p: highest.
        distinct_seeds: False, the default, is the published stream, in which seeds repeat and
            40 % of the test seeds also occur in train with another `p`, which gives nearly the
            same board if the size agrees (harmless for the hard evaluation, whose sizes differ).
            True draws seeds without replacement, so that no board seed is in both splits: set it
            for an evaluation on the sizes of training.
    """

    num_train: int = 50_000
    num_test: int = 4_000
    min_size: int = 4
    max_size: int = 5
    min_p: float = 0.6
    max_p: float = 0.7
    distinct_seeds: bool = False

    def __post_init__(self) -> None:
        if self.num_train < 0 or self.num_test < 0:
            raise ValueError(
                f"num_train and num_test must be at least 0; got {self.num_train} and "
                f"{self.num_test}."
            )
        if self.distinct_seeds and self.num_train + self.num_test > _NUM_SEEDS:
            raise ValueError(
                f"distinct_seeds allows at most {_NUM_SEEDS} rows in both splits together, one "
                f"per seed; got {self.num_train + self.num_test}."
            )
        if not MIN_SIZE <= self.min_size <= self.max_size <= MAX_SIZE:
            raise ValueError(
                f"min_size and max_size must satisfy {MIN_SIZE} <= min_size <= max_size <= "
                f"{MAX_SIZE}; got {self.min_size} and {self.max_size}."
            )
        if not 0.0 <= self.min_p <= self.max_p <= 1.0:
            raise ValueError(
                "min_p and max_p must satisfy 0 <= min_p <= max_p <= 1; got "
                f"{self.min_p} and {self.max_p}."
            )


def records(data: Data, split: str, num_records: int) -> list[dict[str, Any]]:
    """The first `num_records` rows of a split: seed, size, p, index, uid."""
    rng = np.random.RandomState(_DATA_SEED)  # legacy: the published stream
    counts = (data.num_train, data.num_test)
    if data.distinct_seeds:
        shuffled = rng.permutation(_NUM_SEEDS)
        seeds = (shuffled[: counts[0]], shuffled[counts[0] : sum(counts)])
    else:
        seeds = (
            rng.randint(0, _NUM_SEEDS, size=counts[0]),
            rng.randint(0, _NUM_SEEDS, size=counts[1]),
        )
    sizes = tuple(rng.randint(data.min_size, data.max_size + 1, size=count) for count in counts)
    ps = tuple(rng.uniform(data.min_p, data.max_p, size=count) for count in counts)
    which = ("train", "test").index(split)
    columns = (column[which][:num_records].tolist() for column in (seeds, sizes, ps))
    return [
        {"seed": seed, "size": size, "p": p, "index": index, "uid": f"{seed}_{size}_{p}"}
        for index, (seed, size, p) in enumerate(zip(*columns, strict=True))
    ]


def generate_board(seed: int, size: int, *, p: float, is_valid: Callable[[Board], bool]) -> Board:
    """The first valid board of the seed's stream."""
    return next(board for board in candidate_boards(seed, size, p=p) if is_valid(board))


def candidate_boards(seed: int, size: int, *, p: float) -> Iterator[Board]:
    """Boards drawn one after the other from one stream, valid or not."""
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))
    while True:
        tiles = np.where(rng.random((size, size)) < p, FROZEN, HOLE)
        start = goal = (0, 0)
        while start == goal:  # all four numbers again: a part of the published stream
            row, column, goal_row, goal_column = (int(rng.integers(0, size)) for _ in range(4))
            start, goal = (row, column), (goal_row, goal_column)
        tiles[start] = START
        tiles[goal] = GOAL
        yield tuple("".join(row) for row in tiles)


def passes_reference_dfs(board: Board, *, path_bound: int) -> bool:
    """The published validity search: depth-first, with a bound on the depth.

    It accepts paths of up to ``path_bound + 1`` moves, and rejects some boards that do have a
    short path, because a cell is marked at the depth where the search first meets it. Both are
    kept: they are part of the distribution of boards.
    """
    stack = [(find(board, START), 0)]
    seen = set()
    while stack:
        cell, depth = stack.pop()
        if depth > path_bound or cell in seen:
            continue
        seen.add(cell)
        for neighbour in _neighbours(board, cell):
            tile = tile_at(board, neighbour)
            if tile == GOAL:
                return True
            if tile != HOLE:
                stack.append((neighbour, depth + 1))
    return False


def passes_bfs(board: Board, *, path_bound: int) -> bool:
    """Whether the shortest path has at most ``path_bound + 1`` moves."""
    length = shortest_path_length(board)
    return length is not None and length <= path_bound + 1


def shortest_path_length(board: Board) -> int | None:
    """Moves from the start to the goal around the holes, or None if there is no way."""
    start = find(board, START)
    queue = collections.deque([(start, 0)])
    seen = {start}
    while queue:
        cell, length = queue.popleft()
        if tile_at(board, cell) == GOAL:
            return length
        for neighbour in _neighbours(board, cell):
            if neighbour not in seen and tile_at(board, neighbour) != HOLE:
                seen.add(neighbour)
                queue.append((neighbour, length + 1))
    return None


def check_board(board: tuple[str, ...]) -> None:
    """Raises ValueError if rows of text are no playable board."""
    size = len(board)
    text = "".join(board)
    if not MIN_SIZE <= size <= MAX_SIZE or any(len(row) != size for row in board):
        raise ValueError(
            f"desc must be a square of {MIN_SIZE} to {MAX_SIZE} rows, each as long as there are "
            f"rows; got {board!r:.200}."
        )
    if set(text) - {START, FROZEN, HOLE, GOAL} or text.count(START) != 1 or text.count(GOAL) != 1:
        raise ValueError(
            f"desc must be made of S (start, once), G (goal, once), F (frozen) and H (hole); "
            f"got {board!r:.200}."
        )


def tile_at(board: Board, cell: grid.Cell) -> str:
    """The letter of a cell."""
    return board[cell[0]][cell[1]]


def find(board: Board, tile: str) -> grid.Cell:
    """The cell of the only tile of its kind."""
    return next((row, line.index(tile)) for row, line in enumerate(board) if tile in line)


def _neighbours(board: Board, cell: grid.Cell) -> Iterator[grid.Cell]:
    """Cells beside a cell, in the order down, right, up, left."""
    for row_step, column_step in grid.DELTAS.values():
        row, column = cell[0] + row_step, cell[1] + column_step
        if 0 <= row < len(board) and 0 <= column < len(board):
            yield row, column
