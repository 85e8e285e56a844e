"""The laptop task, press by press."""

import collections
import itertools

import pytest

from codjax import envs
from codjax.envs import frozen_lake_compact as compact
from codjax.envs import grid

# Pack seed 0: a up, b down, c right, d left.
RECORD = {"start": [1, 0], "goal": [0, 1], "size": 4}


def begin(record=RECORD, **settings):
    env = envs.make("frozen_lake_compact", **settings)
    return env, env.reset(record, pack_seed=0, slot=0, pack_size=4)


def test_a_task_solved():
    env, observation = begin()
    assert env.system_prompt == ""
    assert env.max_turns == 2
    assert observation == ":UR"
    step = env.step("a")
    assert (step.observation, step.done) == ("U-R", False)
    step = env.step(" c\n")
    assert (step.observation, step.done) == ("R--", True)
    assert env.result() == envs.EpisodeResult(
        raw_reward=1.0, is_success=True, feedback="", format_error=False, num_turns=2
    )


def test_a_bump_and_the_end_of_the_budget():
    env, _ = begin()
    assert env.step("d").observation == "-UR"
    step = env.step("b")
    assert (step.observation, step.done) == ("DUR", True)
    result = env.result()
    assert (result.raw_reward, result.is_success, result.num_turns) == (0.0, False, 2)
    assert not result.format_error


def test_the_goal_ends_the_task_before_the_budget():
    env, observation = begin({"start": [1, 1], "goal": [1, 0], "size": 4}, agent_max_steps=5)
    assert observation == ":-L"
    assert env.step("d").done
    assert env.result().num_turns == 1


@pytest.mark.parametrize("text", ["", "  ", "ab", "a b", "A", "e", "U", "?", "<answer>a</answer>"])
def test_anything_but_one_code_is_a_format_error(text):
    env, _ = begin()
    step = env.step(text)
    result = env.result()
    assert (step.observation, step.done) == ("?", True)
    assert (result.raw_reward, result.format_error, result.num_turns) == (0.0, True, 1)


def test_an_unreadable_second_press_ends_without_reward():
    env, _ = begin()
    env.step("a")
    assert env.step("cc").done
    assert env.result().raw_reward == 0.0


def test_everything_shown_is_in_the_alphabet():
    shown = set()
    env = envs.make("frozen_lake_compact")
    for row in envs.sample_records("frozen_lake_compact", 200):
        shown |= set(env.reset(row, pack_seed=row["seed"], slot=0, pack_size=4))
        done = False
        while not done:
            step = env.step(compact.CODES[row["seed"] % 4])
            shown |= set(step.observation)
            done = step.done
    assert shown == set(":UDLR-")
    assert shown | set(compact.CODES) | {compact.NOT_READ} < set(compact.ALPHABET)


def test_the_mapping_is_that_of_the_pack():
    assert compact.draw_codes(0) == {"a": "U", "b": "D", "c": "R", "d": "L"}
    assert {"".join(compact.draw_codes(seed).values()) for seed in range(500)} == {
        "".join(order) for order in itertools.permutations("UDLR")
    }
    with pytest.raises(ValueError, match="needs a pack_seed"):
        envs.make("frozen_lake_compact").reset(RECORD, pack_seed=None, slot=0, pack_size=4)


def test_records_are_uniform_over_the_pairs():
    pairs = compact.pairs(compact.Data())
    assert len(pairs) == 116
    assert len(compact.pairs(compact.Data(max_distance=3))) == 180
    rows = envs.load_records("frozen_lake_compact", split="train")
    counts = collections.Counter((*row["start"], *row["goal"]) for row in rows)
    assert set(counts) == {(*start, *goal) for start, goal in pairs}
    expected = 50_000 / 116
    chi2 = sum((count - expected) ** 2 / expected for count in counts.values())
    assert 70 < chi2 < 165  # 115 degrees of freedom, about three standard deviations
    test = envs.load_records("frozen_lake_compact", split="test")
    assert rows[0] == {"start": [3, 1], "goal": [3, 2], "size": 4, "seed": 0, "index": 0}
    assert (test[0]["seed"], test[0]["index"]) == (50_000, 0)


def test_other_boards():
    rows = envs.load_records(
        "frozen_lake_compact",
        split="test",
        num_records=50,
        data={"size": 6, "min_distance": 3, "max_distance": 3},
    )
    assert {grid.distance(row["start"], row["goal"]) for row in rows} == {3}
    assert {row["size"] for row in rows} == {6}


@pytest.mark.parametrize("record", [{"goal": [1, 0]}, {"goal": [4, 0]}, {"start": [-1, 0]}])
def test_records_that_cannot_be_played(record):
    with pytest.raises(ValueError, match="two different cells"):
        begin({**RECORD, **record})
