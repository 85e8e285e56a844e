"""The shared dynamics of the grid walks: a square board, clipped moves, a hidden mapping.

Cells are (row, column), 0-based, row 0 at the top. Actions are anonymous and numbered from 0; a
mapping gives the direction that each stands for.
"""

from __future__ import annotations

import enum
import itertools
import operator
import random

Cell = tuple[int, int]


class Direction(enum.StrEnum):
    """Where a move goes; in an order in which neighbours, cyclically, are perpendicular."""

    DOWN = "Down"
    RIGHT = "Right"
    UP = "Up"
    LEFT = "Left"


Mapping = tuple[Direction, ...]  # item k is what action k does

DELTAS = {
    Direction.DOWN: (1, 0),
    Direction.RIGHT: (0, 1),
    Direction.UP: (-1, 0),
    Direction.LEFT: (0, -1),
}
# The order is part of the published random stream: shuffles and permutation indices start from it.
DIRECTIONS: Mapping = tuple(Direction)


def move(cell: Cell, direction: Direction, *, size: int) -> Cell:
    """The cell after a move; the edge of the board stops it.

    >>> move((0, 1), Direction.UP, size=4), move((0, 1), Direction.LEFT, size=4)
    ((0, 1), (0, 0))
    """
    row, column = cell[0] + DELTAS[direction][0], cell[1] + DELTAS[direction][1]
    return min(max(row, 0), size - 1), min(max(column, 0), size - 1)


def slip(direction: Direction, *, rng: random.Random) -> Direction:
    """Where a move on ice really goes: the intended way or one to its side, a third each."""
    index = DIRECTIONS.index(direction)
    return DIRECTIONS[(index + rng.choice((-1, 0, 1))) % len(DIRECTIONS)]


def draw_mapping(seed: int) -> Mapping:
    """The hidden mapping that a seed stands for (spec core §2.1); the same in both grid walks.

    >>> [str(direction) for direction in draw_mapping(0)]
    ['Up', 'Down', 'Right', 'Left']
    """
    # A private shuffle by CPython's Mersenne Twister; NumPy integers are made plain first.
    directions = list(DIRECTIONS)
    random.Random(operator.index(seed)).shuffle(directions)
    return tuple(directions)


def permutation(index: int) -> Mapping:
    """The mapping number `index` of the 24, in lexicographic order of the direction list."""
    return next(itertools.islice(itertools.permutations(DIRECTIONS), index, None))


def distance(first: Cell, second: Cell) -> int:
    """Manhattan distance: moves from one cell to the other on an empty board."""
    return abs(first[0] - second[0]) + abs(first[1] - second[1])
