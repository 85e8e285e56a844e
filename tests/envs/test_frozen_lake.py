"""`frozen_lake_obscure` against the golden values and the calibration table of its spec."""

import collections
import itertools
import random

import numpy as np
import pytest

from codjax import envs
from codjax.envs import frozen_lake, frozen_lake_data, grid

UP, DOWN, LEFT, RIGHT = (
    grid.Direction.UP,
    grid.Direction.DOWN,
    grid.Direction.LEFT,
    grid.Direction.RIGHT,
)
# With this mapping Direction 1..4 are Up, Down, Left, Right.
PLAIN = {"mapping_mode": "global", "mapping": ("Up", "Down", "Left", "Right")}
HARD_DATA = {"min_size": 6, "max_size": 7}


def start(desc, **settings):
    env = envs.make("frozen_lake_obscure", desc=desc, **PLAIN, **settings)
    return env, env.reset({"seed": 0}, pack_seed=None, slot=0, pack_size=1)


def press(env, *numbers):
    for number in numbers:
        step = env.step(f"<answer>Direction {number}</answer>")
    return step


# --- golden values (spec core §8) ---


def test_train_records():
    rows = envs.load_records("frozen_lake_obscure", split="train")
    assert [(row["seed"], row["size"]) for row in rows[:3]] == [(15795, 4), (860, 4), (76820, 5)]
    np.testing.assert_allclose(
        [row["p"] for row in rows[:3]], [0.67806946630, 0.66369507222, 0.60983992228], atol=1e-11
    )
    assert len({row["seed"] for row in rows}) == 39_302
    assert [row["index"] for row in rows] == list(range(50_000))
    assert len({row["uid"] for row in rows}) == 50_000


def test_hard_test_records():
    rows = envs.load_records("frozen_lake_obscure", split="test", num_records=2, data=HARD_DATA)
    assert [(row["seed"], row["size"]) for row in rows] == [(85779, 7), (70314, 7)]
    np.testing.assert_allclose(
        [row["p"] for row in rows], [0.67728073799, 0.63102896937], atol=1e-11
    )


def test_records_with_distinct_seeds_split_them():
    options = {"distinct_seeds": True}
    train = envs.load_records("frozen_lake_obscure", split="train", data=options)
    test = envs.load_records("frozen_lake_obscure", split="test", data=options)
    assert len({row["seed"] for row in (*train, *test)}) == 54_000
    assert {row["size"] for row in train} == {4, 5}


def test_board_of_the_first_train_record():
    record = envs.load_records("frozen_lake_obscure", split="train", num_records=1)[0]
    board = frozen_lake.make_board(record, frozen_lake.Settings(map_path_bound=6))
    assert board == ("GFFF", "FFFH", "SFFF", "FFFH")


def test_board_of_the_first_hard_record():
    record = envs.load_records("frozen_lake_obscure", split="test", num_records=1, data=HARD_DATA)
    board = frozen_lake.make_board(record[0], frozen_lake.Settings(map_path_bound=8))
    assert board == (
        "FHFFFHH",
        "FFFFFFF",
        "HHFHHFF",
        "FFFFHFH",
        "HSHFHFF",
        "FFFGFFF",
        "FFFFHFF",
    )
    assert frozen_lake_data.shortest_path_length(board) == 3


@pytest.mark.parametrize(
    ("seed", "mapping"),
    [
        (0, (UP, DOWN, RIGHT, LEFT)),
        (1, (LEFT, DOWN, UP, RIGHT)),
        (42, (UP, RIGHT, LEFT, DOWN)),
        (12345, (RIGHT, DOWN, UP, LEFT)),
    ],
)
def test_mapping_of_a_seed(seed, mapping):
    assert grid.draw_mapping(seed) == mapping
    assert grid.draw_mapping(np.int64(seed)) == mapping


def test_mappings_of_the_published_training_pack_seeds():
    counts = collections.Counter(
        grid.draw_mapping(hash((step, pack)) % 2**32)
        for step in range(1, 1500)
        for pack in range(8)
    )
    assert (len(counts), min(counts.values()), max(counts.values())) == (24, 457, 529)


# --- the answer ---


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("<answer> direction 3 now</answer>", 2),
        ("so <answer>Direction\n 1</answer> it is", 0),
        ("<answer>Direction 4.</answer>", 3),
        ("<answer>Direction 002</answer>", 1),
        ("<answer>Direction \u0663</answer>", 2),  # an Arabic three is a digit to the pattern
    ],
)
def test_readable_answers(text, action):
    assert frozen_lake.parse_action(text) == action


@pytest.mark.parametrize(
    "text",
    [
        "<answer>Direction 1</answer><answer>Direction 1</answer>",
        "<answer>3</answer>",
        "<answer>DIRECTION 2</answer>",
        "<answer>Up</answer>",
        "<answer>Direction2</answer>",
        "<answer>go Direction 2</answer>",
        "<answer>Direction -1</answer>",
        "Direction 2",
    ],
)
def test_unreadable_answers(text):
    assert "could not be read" in frozen_lake.parse_action(text)


@pytest.mark.parametrize("number", ["5", "0", "00", "44", "\u0665", "9" * 5000])
def test_numbers_that_are_no_action(number):
    message = frozen_lake.parse_action(f"<answer>Direction {number}</answer>")
    assert "is not an action" in message
    assert len(message) < 200


# --- dynamics and texts ---


def test_first_observation_shows_the_board():
    env, observation = start(("SFH", "FFF", "HFG"))
    assert observation == (
        "Step 1/8\n"
        "\n"
        " P \t _ \t O \t\n"
        " _ \t _ \t _ \t\n"
        " O \t _ \t G \t\n"
        "\n"
        "P has not reached the goal yet. G is at (row, column) = (2, 2), counted from (0, 0) in "
        "the upper left corner. What is your next action?"
    )
    assert "Hint" not in env.system_prompt


def test_later_observations_begin_with_what_the_last_action_did():
    env, _ = start(("SFH", "FFF", "HFG"))
    moved = press(env, 4)
    assert not moved.done
    assert moved.observation.startswith(
        "Step 2/8\n\nYour last action: Direction 4: P moved from (0, 0) to (0, 1).\n\n"
        " _ \t P \t O \t\n"
    )
    bumped = press(env, 1)
    assert bumped.observation.startswith(
        "Step 3/8\n\nYour last action: Direction 1: P did not move and is still at (0, 1); "
        "perhaps the edge of the board is in the way.\n\n _ \t P \t O \t\n"
    )


def test_reaching_the_goal():
    env, _ = start(("SFH", "FFF", "HFG"))
    step = press(env, 2, 4, 4, 2)
    assert step.done
    assert step.observation == (
        "Your last action: Direction 2: P moved from (1, 2) to (2, 2).\n\n"
        " _ \t _ \t O \t\n _ \t _ \t _ \t\n O \t _ \t √ \t"
    )
    result = env.result()
    assert (result.raw_reward, result.is_success, result.format_error) == (1.0, True, False)
    assert result.num_turns == 4
    assert result.feedback == "Success: the player reached the goal G in 4 of at most 8 steps."


def test_falling_into_a_hole():
    env, _ = start(("SFH", "FFF", "HFG"))
    step = press(env, 4, 4)
    assert step.done
    assert " _ \t _ \t X \t" in step.observation
    result = env.result()
    assert (result.raw_reward, result.is_success, result.num_turns) == (0.0, False, 2)
    assert "fell into a hole (O)" in result.feedback


def test_running_out_of_steps():
    env, _ = start(("SFH", "FFF", "HFG"), agent_max_steps=2)
    assert not press(env, 1).done
    assert env.result().feedback.startswith("Failure: the game was cut short after 1 of 2 steps")
    assert press(env, 1).done
    assert env.result().feedback.startswith("Failure: out of steps, 2 of 2 used")
    assert env.result().raw_reward == 0.0


def test_the_goal_on_the_last_step_counts():
    env, _ = start(("SG", "FF"), agent_max_steps=1)
    assert press(env, 4).done
    assert env.result().is_success


@pytest.mark.parametrize(
    ("answer", "words"), [("left", "could not be read"), ("Direction 7", "Direction 7 is not")]
)
def test_format_errors_end_the_episode(answer, words):
    env, _ = start(("SG", "FF"))
    step = env.step(f"<answer>{answer}</answer>")
    result = env.result()
    assert step.done
    assert (result.raw_reward, result.format_error, result.num_turns) == (0.0, True, 1)
    assert result.feedback.startswith("Failure: ")
    assert words in result.feedback
    assert result.feedback.endswith("The game is over.")


def test_a_new_reset_forgets_the_old_episode():
    env, first = start(("SG", "FF"))
    env.step("nonsense")
    assert env.reset({"seed": 0}, pack_seed=None, slot=1, pack_size=2) == first
    assert env.result().num_turns == 0


def test_system_prompt_holds_the_information_in_order():
    prompt = envs.make("frozen_lake_obscure").system_prompt
    words = [
        "Obscured Frozen Lake",
        "- G: the goal",
        "holes",
        "leave the board",
        "Direction 1, Direction 2, Direction 3, Direction 4",
        "Hidden clues",
        "## Reward",
        "<answer>Direction X</answer>",
        "exactly one action",
        "short path",
    ]
    places = [prompt.index(word) for word in words]
    assert places == sorted(places)
    assert "slippery" not in prompt
    assert "8" not in prompt  # the number of steps is told with the observations only


# --- mapping modes ---


def first_move(env, record, **pack):
    env.reset(record, slot=0, pack_size=4, **pack)
    return env._episode.mapping


def test_per_pack_mapping_follows_the_pack_seed_alone():
    env = envs.make("frozen_lake_obscure")
    rows = envs.sample_records("frozen_lake_obscure", 3)
    assert {first_move(env, row, pack_seed=42) for row in rows} == {(UP, RIGHT, LEFT, DOWN)}
    with pytest.raises(ValueError, match="needs a pack_seed"):
        env.reset(rows[0], pack_seed=None, slot=0, pack_size=4)


def test_per_task_mapping_is_the_first_the_record_has():
    env = envs.make("frozen_lake_obscure", mapping_mode="per_task")
    record = {"seed": 42}
    assert first_move(env, record, pack_seed=1) == (UP, RIGHT, LEFT, DOWN)
    record["mapping_seed"] = 0
    assert first_move(env, record, pack_seed=1) == (UP, DOWN, RIGHT, LEFT)
    record["mapping_index"] = 23
    assert first_move(env, record, pack_seed=1) == (LEFT, UP, RIGHT, DOWN)
    record["mapping"] = ["Left", "Down", "Right", "Up"]
    assert first_move(env, record, pack_seed=1) == (LEFT, DOWN, RIGHT, UP)


def test_global_mapping():
    def mapping_of(**settings):
        env = envs.make("frozen_lake_obscure", mapping_mode="global", **settings)
        return first_move(env, {"seed": 5}, pack_seed=None)

    assert mapping_of() == (DOWN, RIGHT, UP, LEFT)
    assert mapping_of(mapping_index=1) == (DOWN, RIGHT, LEFT, UP)
    assert mapping_of(mapping=("Left", "Down", "Right", "Up")) == (LEFT, DOWN, RIGHT, UP)
    assert len({mapping_of(mapping_index=index) for index in range(24)}) == 24


def test_a_record_may_leave_fields_out():
    env = envs.make("frozen_lake_obscure")
    full = env.reset({"seed": 42, "size": 4, "p": 0.8}, pack_seed=1, slot=0, pack_size=1)
    assert env.reset({}, pack_seed=1, slot=0, pack_size=1) == full


@pytest.mark.parametrize("record", [{"size": 1}, {"size": 101}, {"p": -0.1}, {"p": float("nan")}])
def test_records_that_cannot_be_played(record):
    with pytest.raises(ValueError, match="record needs"):
        envs.make("frozen_lake_obscure").reset(record, pack_seed=1, slot=0, pack_size=1)


# --- ice ---


def test_slippery_ice_moves_a_third_each_way():
    rng = random.Random(0)
    counts = collections.Counter(grid.slip(UP, rng=rng) for _ in range(3000))
    assert set(counts) == {LEFT, UP, RIGHT}
    assert all(abs(count - 1000) < 3 * (3000 * 2 / 9) ** 0.5 for count in counts.values())


def test_slips_are_the_same_for_all_runs_of_a_pack():
    board = ("F" * 9,) * 4 + ("FFFFSFFFF",) + ("F" * 9,) * 3 + ("FFFFFFFFG",)

    def walk(pack_seed, slot):
        env = envs.make("frozen_lake_obscure", desc=board, is_slippery=True, **PLAIN)
        env.reset({"seed": 3}, pack_seed=pack_seed, slot=slot, pack_size=4)
        return press(env, 1, 2, 1, 2, 1).observation

    assert walk(1, 0) == walk(1, 0)
    assert len({walk(seed, slot) for seed in range(3) for slot in range(3)}) > 3
    assert "slippery" in envs.make("frozen_lake_obscure", is_slippery=True).system_prompt


# --- validity searches ---


def test_reference_search_rejects_a_board_with_a_short_way():
    # The search goes up and left first and comes to the way down the middle too deep.
    board = ("FFSH", "HFFF", "FFFF", "HFFG")
    assert frozen_lake_data.shortest_path_length(board) == 4
    assert frozen_lake_data.passes_bfs(board, path_bound=4)
    assert not frozen_lake_data.passes_reference_dfs(board, path_bound=4)


def test_every_board_of_the_reference_search_has_a_way_within_the_bound():
    for seed in range(300):
        for board in itertools.islice(frozen_lake_data.candidate_boards(seed, 5, p=0.6), 2):
            if frozen_lake_data.passes_reference_dfs(board, path_bound=6):
                assert frozen_lake_data.passes_bfs(board, path_bound=6)


def test_path_bounds_allow_one_move_more():
    board = ("SFFG", "HHHH", "HHHH", "HHHH")
    for accepts in (frozen_lake_data.passes_reference_dfs, frozen_lake_data.passes_bfs):
        assert accepts(board, path_bound=2)
        assert not accepts(board, path_bound=1)
    assert frozen_lake_data.shortest_path_length(("SH", "HG")) is None


def test_validity_setting_chooses_the_search():
    rows = envs.load_records("frozen_lake_obscure", split="train", num_records=300)
    dfs, bfs = (
        [frozen_lake.make_board(row, frozen_lake.Settings(validity=validity)) for row in rows]
        for validity in ("reference_dfs", "bfs")
    )
    assert 0 < sum(a != b for a, b in zip(dfs, bfs, strict=True)) < 40


# --- calibration (spec core §2.9), within three standard errors ---

CALIBRATION = {
    # data, map_path_bound, agent_max_steps: path shares, mean path, holes, boards drawn,
    # reward and success of uniform play, reward of known play
    "train": (
        {},
        6,
        8,
        (22.0, 25.3, 21.0, 15.5, 9.9, 4.3, 2.1),
        (2.87, 0.296, 1.35),
        (0.157, 0.163),
        0.964,
    ),
    "hard": (
        HARD_DATA,
        8,
        10,
        (13.1, 16.7, 17.3, 15.3, 13.0, 9.8, 8.3, 4.1, 2.5),
        (3.96, 0.321, 1.56),
        (0.089, 0.092),
        0.960,
    ),
}
NUM_CALIBRATION = {"train": 3000, "hard": 1500}


def assert_mean(values, expected, *, rounding):
    values = np.asarray(values, dtype=float)
    error = values.std() / len(values) ** 0.5
    # The table is itself an estimate, from 20,000 (train) or 4,000 (hard) boards.
    assert abs(values.mean() - expected) < 3 * error * 1.2 + rounding, (values.mean(), expected)


@pytest.mark.parametrize("which", sorted(CALIBRATION))
def test_calibration(which):
    data, bound, limit, shares, (path, holes, drawn), (uniform, uniform_success), known = (
        CALIBRATION[which]
    )
    settings = frozen_lake.Settings(map_path_bound=bound, agent_max_steps=limit)
    rows = envs.load_records(
        "frozen_lake_obscure", split="train", num_records=NUM_CALIBRATION[which], data=data
    )
    boards = [frozen_lake.make_board(row, settings) for row in rows]
    lengths = [frozen_lake_data.shortest_path_length(board) for board in boards]
    for length, share in enumerate(shares, start=1):
        assert_mean([100 * (one == length) for one in lengths], share, rounding=0.05)
    assert max(lengths) == bound + 1
    assert_mean(lengths, path, rounding=0.005)
    fractions = [sum(line.count("H") for line in board) / len(board) ** 2 for board in boards]
    assert_mean(fractions, holes, rounding=0.0005)
    attempts = [
        1
        + next(
            index
            for index, candidate in enumerate(
                frozen_lake_data.candidate_boards(row["seed"], row["size"], p=row["p"])
            )
            if candidate == board
        )
        for row, board in zip(rows, boards, strict=True)
    ]
    assert_mean(attempts, drawn, rounding=0.005)
    assert_mean([1 - 0.1 * length / limit for length in lengths], known, rounding=0.0005)
    env = frozen_lake.FrozenLake(settings)
    rng = random.Random(0)
    results = [play_uniformly(env, row, rng) for row in rows]
    assert_mean([result.is_success for result in results], uniform_success, rounding=0.0005)
    rewards = [
        result.raw_reward - 0.1 * result.is_success * result.num_turns / limit for result in results
    ]
    assert_mean(rewards, uniform, rounding=0.0005)


def play_uniformly(env, record, rng):
    env.reset(record, pack_seed=rng.randrange(1000), slot=0, pack_size=1)
    while not press(env, rng.randint(1, 4)).done:
        pass
    return env.result()


def test_a_player_who_knows_the_mapping_always_wins_in_the_shortest_way():
    env = envs.make("frozen_lake_obscure")
    for row in envs.sample_records("frozen_lake_obscure", 200):
        env.reset(row, pack_seed=row["seed"], slot=0, pack_size=4)
        board = frozen_lake.make_board(row, frozen_lake.Settings())
        mapping = grid.draw_mapping(row["seed"])
        press(env, *(mapping.index(direction) + 1 for direction in shortest_path(board)))
        result = env.result()
        assert result.is_success
        assert result.num_turns == frozen_lake_data.shortest_path_length(board)


def shortest_path(board):
    queue = collections.deque([(frozen_lake_data.find(board, "S"), [])])
    seen = set()
    while True:
        cell, path = queue.popleft()
        if frozen_lake_data.tile_at(board, cell) == "G":
            return path
        for direction in grid.DIRECTIONS:
            after = grid.move(cell, direction, size=len(board))
            if after not in seen and frozen_lake_data.tile_at(board, after) != "H":
                seen.add(after)
                queue.append((after, [*path, direction]))
