"""The environment table: names, settings, records, and the messages for wrong ones."""

import doctest
import importlib

import pytest

from codjax import envs
from codjax.envs import answers, options, protocol

NAMES = sorted(envs.ENVIRONMENTS)


@pytest.mark.parametrize("name", NAMES)
def test_every_environment_plays_a_sample_record(name):
    env = envs.make(name)
    record = envs.sample_records(name, n=1)[0]
    observation = env.reset(record, pack_seed=5, slot=0, pack_size=4, env_task_idx=0)
    assert isinstance(observation, str)
    assert isinstance(env.system_prompt, str)
    assert env.max_turns >= 1
    assert env.step("no answer at all").done
    result = env.result()
    assert (result.raw_reward, result.format_error, result.num_turns) == (0.0, True, 1)
    assert result.failure is None


@pytest.mark.parametrize("name", NAMES)
def test_records_repeat_and_number_of_records_only_cuts(name):
    few = envs.load_records(name, split="train", num_records=5)
    assert few == envs.load_records(name, split="train", num_records=50)[:5]
    assert len(envs.load_records(name, split="test")) == 4000
    assert len(envs.load_records(name, split="train")) == 50_000
    assert envs.sample_records(name, 3) == envs.load_records(name, split="test", num_records=3)


@pytest.mark.parametrize("name", NAMES)
def test_train_and_test_records_differ(name):
    def key(record):
        return tuple((k, str(v)) for k, v in sorted(record.items()) if k != "index")

    train = {key(record) for record in envs.load_records(name, split="train")}
    assert not train & {key(record) for record in envs.load_records(name, split="test")}


@pytest.mark.parametrize("name", NAMES)
def test_misuse_is_a_runtime_error(name):
    env = envs.make(name)
    with pytest.raises(RuntimeError, match=r"step\(\) was called before reset"):
        env.step("a")
    with pytest.raises(RuntimeError, match=r"result\(\) was called before reset"):
        env.result()
    env.reset(envs.sample_records(name, 1)[0], pack_seed=1, slot=0, pack_size=1)
    assert env.step("nonsense").done
    with pytest.raises(RuntimeError, match="after the episode was over"):
        env.step("a")
    env.reset(envs.sample_records(name, 1)[0], pack_seed=1, slot=0, pack_size=1)
    assert env.result().num_turns == 0


LAKE, COMPACT = "frozen_lake_obscure", "frozen_lake_compact"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("frozen_lake", {}, {}, "train"), "did you mean 'frozen_lake_"),
        (("chess", {}, {}, "train"), "Valid: .*frozen_lake_compact, frozen_lake_obscure"),
        (
            (LAKE, {"agent_max_step": 3}, {}, "train"),
            "frozen_lake_obscure: settings.agent_max_step does not exist: did you mean "
            "'agent_max_steps'",
        ),
        (
            (LAKE, {"agent_max_steps": "3"}, {}, "train"),
            "settings.agent_max_steps must be an integer; got '3'",
        ),
        ((LAKE, {"agent_max_steps": True}, {}, "test"), "must be an integer"),
        ((LAKE, {"agent_max_steps": None}, {}, "test"), "must be an integer"),
        ((LAKE, {"agent_max_steps": 0}, {}, "test"), "at least 1; got 0"),
        ((LAKE, {"map_path_bound": -1}, {}, "test"), "at least 0; got -1"),
        ((LAKE, {"is_slippery": 1}, {}, "test"), "must be True or False; got 1"),
        ((LAKE, {"mapping_mode": "pack"}, {}, "test"), "one of 'per_pack'"),
        ((LAKE, {"mapping_index": 3}, {}, "test"), "only when mapping_mode is 'global'"),
        (
            (LAKE, {"mapping_mode": "global", "mapping_index": 24}, {}, "test"),
            r"mapping_index must be 0\.\.23; got 24",
        ),
        (
            (LAKE, {"mapping_mode": "global", "mapping": ["Up", "Up", "Down", "Left"]}, {}, "test"),
            "each of Down, Right, Up, Left once",
        ),
        (
            (
                LAKE,
                {
                    "mapping_mode": "global",
                    "mapping": ["Up", "Right", "Down", "Left"],
                    "mapping_index": 0,
                },
                {},
                "test",
            ),
            "set one",
        ),
        ((LAKE, {"desc": ["SF", "FF"]}, {}, "test"), "goal, once"),
        ((LAKE, {"desc": ["SFG", "FF"]}, {}, "test"), "a square of"),
        ((LAKE, {"desc": "SG"}, {}, "test"), "a list of a string or None"),
        ((LAKE, {}, {"min_p": 0.9}, "test"), "min_p <= max_p"),
        ((LAKE, {}, {"min_p": float("nan")}, "test"), "min_p <= max_p"),
        ((LAKE, {}, {"min_size": 1}, "test"), "min_size <= max_size"),
        (
            (LAKE, {}, {"distinct_seeds": True, "num_train": 99_999}, "test"),
            "at most 100000 rows",
        ),
        ((LAKE, {}, {}, "dev"), "unknown split of frozen_lake_obscure 'dev'"),
        ((LAKE, {}, {}, "test", 4001), "from 0 to 4000, .*data.num_test"),
        ((COMPACT, {}, {"size": 1}, "test"), "data.size must be from 2"),
        ((COMPACT, {}, {"max_distance": 9}, "test"), "the longest way"),
        ((COMPACT, {}, {"num_train": -1}, "test"), "at least 0"),
        ((COMPACT, {"agent_max_steps": 0}, {}, "test"), "at least 1"),
    ],
)
def test_check_names_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        envs.check(*arguments)


def test_check_accepts_what_make_and_load_records_accept():
    envs.check("frozen_lake_obscure", {"agent_max_steps": 10}, {"min_size": 4}, "test", 4000)
    # Numbers of a config file may be whole, and its tuples lists.
    envs.check("frozen_lake_obscure", {"desc": ["SF", "FG"]}, {"max_p": 1}, "train")


def test_make_and_load_records_check_as_well():
    with pytest.raises(ValueError, match="unknown environment 'frozen_lake_obscur'"):
        envs.make("frozen_lake_obscur")
    with pytest.raises(ValueError, match=r"obscure: settings\.size does not exist"):
        envs.make("frozen_lake_obscure", size=4)
    with pytest.raises(ValueError, match=r"data\.max_siz does not exist: did you mean 'max_size'"):
        envs.load_records("frozen_lake_obscure", split="test", data={"max_siz": 5})
    with pytest.raises(ValueError, match="num_records"):
        envs.sample_records("frozen_lake_obscure", 4001)


def test_unknown_without_a_near_name_only_lists():
    assert options.unknown("zzz", ["b", "a"], what="key") == "unknown key 'zzz': Valid: a, b."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x <answer> a </answer> y", " a "),
        ("<answer></answer>", ""),
        ("<answer>a", None),
        ("a</answer>", None),
        ("</answer>a<answer>", None),
        ("<answer>a</answer><answer>b</answer>", None),
        ("<answer><answer>a</answer>", None),
        ("<ANSWER>a</ANSWER>", None),
        ("I must write <answer>: <answer>a</answer>", None),
        ("", None),
    ],
)
def test_extract(text, expected):
    assert answers.extract(text) == expected


def test_extract_takes_other_delimiters():
    assert answers.extract("a [[b]] c", "[[", closing="]]") == "b"


def test_records_of_results_are_keyword_only():
    with pytest.raises(TypeError):
        protocol.StepResult("text", True)


@pytest.mark.parametrize(
    "module", ["answers", "options", "grid", "frozen_lake", "frozen_lake_compact"]
)
def test_examples_in_docstrings(module):
    results = doctest.testmod(importlib.import_module(f"codjax.envs.{module}"))
    assert results.attempted > 0
    assert results.failed == 0


def test_the_published_name_of_the_board_bound_is_read_too():
    envs.check("frozen_lake_obscure", {"env_max_steps": 8, "agent_max_steps": 10}, {}, "test")
    envs.make("frozen_lake_obscure", env_max_steps=8)
    with pytest.raises(
        ValueError, match=r"settings\.map_path_bound must be a whole number|integer"
    ):
        envs.make("frozen_lake_obscure", env_max_steps="8")
    with pytest.raises(ValueError, match="are the same: set one"):
        envs.make("frozen_lake_obscure", env_max_steps=8, map_path_bound=8)
