"""The exact reference rewards against hand calculation, simulation and the prototype's notes."""

import itertools
import time

import numpy as np
import pytest

from codjax.envs import frozen_lake_compact as compact
from codjax.envs import grid, ladder


def test_default_ladder():
    begin = time.perf_counter()
    rewards = ladder.compact_ladder(4)
    assert time.perf_counter() - begin < 5
    np.testing.assert_allclose(rewards["uniform"], [0.181] * 4, atol=5e-4)
    np.testing.assert_allclose(rewards["no_knowledge"], [0.2529] * 4, atol=5e-5)
    np.testing.assert_allclose(rewards["bayes"], [0.2529, 0.6927, 0.8902, 0.9581], atol=5e-5)
    assert rewards["known"] == [1.0] * 4
    # The prototype's figures. They look simulated: their 0.254 without knowledge is above the
    # exact optimum, and their uniform 0.183 above the count of all walks below.
    np.testing.assert_allclose(rewards["bayes"], [0.254, 0.692, 0.897, 0.953], atol=0.01)


def test_three_presses_at_distance_three():
    rewards = ladder.compact_ladder(4, {"agent_max_steps": 3}, {"max_distance": 3})
    np.testing.assert_allclose(rewards["bayes"], [0.314, 0.910, 0.973, 0.996], atol=0.01)


def test_a_longer_pack_only_continues():
    assert ladder.compact_ladder(6)["bayes"][:2] == ladder.compact_ladder(2)["bayes"]
    assert ladder.compact_ladder(12)["bayes"][-1] > 0.999


def test_a_goal_that_is_too_far_is_not_reached():
    near = len(compact.pairs(compact.Data()))
    far = len(compact.pairs(compact.Data(min_distance=3, max_distance=3)))
    rewards = ladder.compact_ladder(1, data={"max_distance": 3})
    assert rewards["known"] == [near / (near + far)]


def test_uniform_reward_equals_a_count_of_all_walks():
    solved = 0
    pairs = compact.pairs(compact.Data())
    for (start, goal), *directions in itertools.product(pairs, grid.DIRECTIONS, grid.DIRECTIONS):
        cells = [start]
        for direction in directions:
            cells.append(grid.move(cells[-1], direction, size=4))
        solved += goal in cells
    assert ladder.compact_ladder(1)["uniform"][0] == pytest.approx(solved / (16 * len(pairs)))


def test_one_press_by_hand():
    # One press, goal beside the player. Without knowledge one of four codes is right: 1/4.
    rewards = ladder.compact_ladder(2, {"agent_max_steps": 1}, {"size": 2, "max_distance": 1})
    assert rewards["no_knowledge"] == [0.25, 0.25]
    # On a 2x2 board, in a corner, two directions are open and two bump. The first press
    # moves with chance 1/2, which reveals its direction d; a bump leaves two candidates.
    # Second task, wanting w, uniform over the four directions:
    #   d known: w = d (1/4) succeeds; else one of three unpressed codes, 1/3 -> 1/4 + 3/4 / 3.
    #   d one of two blocked ones: w blocked (1/2): either way 1/2 (press it) ; w open (1/2):
    #   one of the three other codes, 1/3 -> 1/2 * 1/2 + 1/2 * 1/3.
    after_move, after_bump = 1 / 4 + 3 / 4 / 3, 1 / 2 * 1 / 2 + 1 / 2 * 1 / 3
    assert rewards["bayes"] == pytest.approx([0.25, (after_move + after_bump) / 2])


def test_renaming_codes_changes_no_belief_class():
    up_first = sum(1 << i for i, m in enumerate(ladder._PERMUTATIONS) if m[0] == grid.Direction.UP)
    up_last = sum(1 << i for i, m in enumerate(ladder._PERMUTATIONS) if m[3] == grid.Direction.UP)
    down = sum(1 << i for i, m in enumerate(ladder._PERMUTATIONS) if m[3] == grid.Direction.DOWN)
    assert ladder._canonical(up_first) == ladder._canonical(up_last) != ladder._canonical(down)


def test_pack_size_must_be_positive():
    with pytest.raises(ValueError, match="pack_size must be at least 1; got 0"):
        ladder.compact_ladder(0)


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match=r"settings\.max_steps does not exist: did you mean"):
        ladder.LADDERS["frozen_lake_compact"](4, {"max_steps": 2}, {})
