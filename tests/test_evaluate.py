"""Evaluation: what it writes, what its controls do to hints, and which checkpoints it finds."""

import asyncio
import json
import pathlib
import random
import re

import numpy as np
import pytest
from flax import nnx

from codjax import (
    build,
    checkpoints,
    checks,
    cli,
    config_files,
    evaluate,
    models,
    policies,
    train,
    types,
    waits,
)
from codjax import chat as chats
from codjax import config as config_lib
from codjax.envs import frozen_lake_compact as lake
from codjax.envs import ladder
from codjax.rollout import sampler as samplers
from codjax.rollout import scripted
from codjax.warmup import SloppyPlayer
from tests.rollout.fake_endpoint import FakeEndpoint, served

TESTS = pathlib.Path(__file__).parent
TINY = TESTS / "tiny.py"
NULL_HINT = "?"
ENTRIES = ["lake", "ralph_full", "ralph_sample", "hint_blanked", "hint_swapped"]


def tiny(**changes):
    config = config_files.load(str(TINY))
    config.update_from_flattened_dict({"num_steps": 2} | changes)
    return config


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Of a run of two steps."""
    folder = tmp_path_factory.mktemp("run")
    train.main(tiny(), str(folder))
    return folder


@pytest.fixture(scope="module")
def report(workdir):
    """Of its newest checkpoint."""
    return evaluate.main(tiny(), "latest", str(workdir))


# What it writes.


def documented_keys():
    """Names in the example of eval.json in docs/file_formats.md, by the object that has them."""
    text = (TESTS.parent / "docs" / "file_formats.md").read_text()
    example = text.partition("## eval.json")[2].partition("NAME is an entry")[0]
    keys = re.findall(r'"(\w+)":', example)
    return set(keys), set(re.findall(r'"(\w+)":', example.partition('"positions": [{')[2]))


def test_the_report_has_the_documented_form(report, workdir):
    assert json.loads((workdir / "eval.json").read_text()) == report
    assert list(report) == ["checkpoint", "tasksets", "base", "ladder"]
    assert (report["checkpoint"], report["base"]["checkpoint"]) == ("step 2", "step 0")
    _, of_positions = documented_keys()
    for source in (report, report["base"]):
        assert list(source["tasksets"]) == ENTRIES
        for name, entry in source["tasksets"].items():
            assert entry["taskset"] == "lake_test"
            assert entry["mode"] == (name if name.startswith("ralph") else "cod")
            assert entry["condition"] == (name if name.startswith("hint") else "none")
            assert (entry["num_packs"], entry["dropped_packs"]) == (6, 0)
            assert len(entry["positions"]) == 3
            for position in entry["positions"]:
                assert set(position) <= of_positions
                assert all(type(value) is float for value in position.values())
                assert 0 <= position["reward"] <= 1
                assert position["reward"] == position["success"]  # there are no penalties
                assert position["reward_ci95"] == position["success_ci95"]
                assert 1 <= position["turns"] <= 2


def test_every_key_of_the_report_is_documented(report):
    documented, _ = documented_keys()

    def keys(tree):
        if isinstance(tree, dict):
            yield from tree
        children = tree.values() if isinstance(tree, dict) else tree
        for child in children if isinstance(tree, dict | list) else ():
            yield from keys(child)

    assert set(keys(report)) - set(ENTRIES) - set(report["ladder"]["lake"]) == documented


def test_the_exact_ladder_stands_beside_the_undisturbed_entry(report):
    assert report["ladder"] == {"lake": ladder.compact_ladder(3, {}, {"num_test": 8192})}


def test_the_other_files(report, workdir):
    text = (workdir / "eval_packs.txt").read_text()
    assert text.startswith("## step 2, lake\n\npack seed ")
    assert "## step 0, ralph_full\n" in text
    assert text.count("pack seed ") == 2 * len(ENTRIES) * 3
    assert (workdir / "reward_by_position.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_base_or_a_ladder(workdir, tmp_path, capsys):
    config = tiny(**{"evaluation.compare_base": False})
    with config.evaluation.matrix.unlocked():
        del config.evaluation.matrix["lake"]
    found = evaluate.main(config, str(workdir / "checkpoints" / "2"), str(tmp_path / "new"))
    assert list(found) == ["checkpoint", "tasksets", "ladder"]
    assert found["ladder"] == {}
    assert json.loads((tmp_path / "new" / "eval.json").read_text()) == found
    out = capsys.readouterr().out
    assert "step 2: hint_blanked" in " ".join(out.split())
    assert "exact" not in out


# The same numbers, wherever the parameters come from.


def params_of_step(workdir, step):
    config = tiny()
    model = build.make_model(config, chats.load_chat(config.tokenizer.source))
    like = build.abstract_params(model, build.make_mesh(config, model))
    store = checkpoints.Checkpoints(workdir, keep=3, read_only=True)
    try:
        return model, store.restore_params(step, like)
    finally:
        store.close()


def test_two_calls_give_the_same_numbers(report, workdir):
    assert evaluate.main(tiny(), 2, str(workdir)) == report


def test_base_is_step_0(report, workdir, tmp_path):
    found = evaluate.main(tiny(), "base", str(workdir))
    assert (found["checkpoint"], "base" in found) == ("step 0", False)
    assert found["tasksets"] == report["base"]["tasksets"]
    assert found["tasksets"] != report["tasksets"]


def test_the_folder_of_another_run(report, workdir, tmp_path):
    assert evaluate.main(tiny(), str(workdir), str(tmp_path)) == report


def test_the_folder_of_an_orbax_step(report, workdir, tmp_path):
    folder = workdir / "checkpoints" / "2"
    assert evaluate.main(tiny(), str(folder), str(tmp_path)) == report
    assert not (tmp_path / "checkpoints").exists()


def test_a_hugging_face_folder(report, workdir, tmp_path):
    model, params = params_of_step(workdir, 2)
    graphdef, _ = nnx.split(model)
    folder = tmp_path / "exported"
    models.save_pretrained(nnx.merge(graphdef, params), folder)
    found = evaluate.main(tiny(), str(folder), str(tmp_path / "out"))
    assert found["checkpoint"] == str(folder)
    assert found["tasksets"] == report["tasksets"]
    assert found["ladder"] == report["ladder"]


def test_a_hugging_face_folder_of_another_model_is_refused(workdir, tmp_path):
    other = tiny(**{"model.rope_theta": 2e4})
    abstract = build.make_model(other, chats.load_chat(other.tokenizer.source))
    models.save_pretrained(models.init(abstract.config, seed=0), tmp_path / "other")
    with pytest.raises(checkpoints.CheckpointError, match=r"other .*model.* rope_theta"):
        evaluate.main(tiny(), str(tmp_path / "other"), str(tmp_path / "out"))


def test_another_mesh_gives_the_same_rewards(report, workdir):
    """Sums run in another order there, which may turn a close draw in one of the six packs."""
    found = evaluate.main(tiny(**{"mesh.fsdp": 4}), 2, str(workdir))
    for name in ENTRIES:
        for one, other in zip(
            found["tasksets"][name]["positions"],
            report["tasksets"][name]["positions"],
            strict=True,
        ):
            assert one["reward"] == pytest.approx(other["reward"], abs=0.2)


# Checkpoints that are not there.


def test_what_cannot_be_found_is_said_in_one_line(workdir, tmp_path, capsys):
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    cases = [
        (["--checkpoint=7"], workdir, "holds no step 7; there are [0, 1, 2]."),
        ([], tmp_path / "nowhere", "holds no checkpoints; train first: codjax train --workdir="),
        ([], tmp_path / "empty", "holds no finished checkpoint; train first: codjax train --work"),
        (["--checkpoint=newest"], workdir, "a step, the folder of a run, of a step (DIR/"),
        ([f"--checkpoint={tmp_path}"], workdir, "--checkpoint must be latest, base, a step, the"),
    ]
    for flags, folder, message in cases:
        args = ["eval", f"--config={TINY}", f"--workdir={folder}", *flags]
        assert cli.main(args) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert error.startswith("codjax eval: ")
        assert message in error


# What the entries of the matrix do, with a player of which one knows what it does.


def evaluator(script, **changes):
    config = tiny(**changes)
    chat = chats.load_chat(config.tokenizer.source)
    sampler = scripted.ScriptedSampler(scripted.speaks(script, chat))
    return evaluate.Evaluator(
        config=config,
        chat=chat,
        tasksets=build.load_tasksets(config, ["lake_test"]),
        policy=policies.InProcess(sampler, num_at_once=config.engine.num_slots),
        stalls=waits.Waits(pathlib.Path()),
    )


def runs_of(made):
    """Trajectories of the one candidate, a script, by entry."""
    return made.run({"script": None})["script"]


def with_packs(num_packs, pack_size=3):
    sizes = {"num_packs": num_packs, "pack_size": pack_size}
    return {
        f"evaluation.matrix.{name}.{key}": value for name in ENTRIES for key, value in sizes.items()
    }


@pytest.fixture(scope="module")
def runs():
    """Trajectories of a player that acts on its hints and notes what is true."""
    return runs_of(evaluator(SloppyPlayer(follows=True, writes_truth=True), **with_packs(60)))


def solves(trajectory):
    return trajectory.episodes_of(types.EpisodeKind.SOLVE_TASK)


def hints(trajectory):
    return [episode.hint_in for episode in solves(trajectory)]


def mean_rewards(trajectories):
    rewards = [[episode.reward for episode in solves(one)] for one in trajectories]
    return np.mean(rewards, axis=0)


def test_undisturbed_entries_come_before_controls(runs):
    assert list(runs) == ENTRIES
    assert all(len(trajectories) == 60 for trajectories in runs.values())


def test_an_undisturbed_pack_carries_its_hints_on(runs):
    for trajectory in runs["lake"]:
        updates = trajectory.episodes_of(types.EpisodeKind.UPDATE_CONTEXT)
        assert hints(trajectory) == [NULL_HINT, *(update.hint_out for update in updates)]
        truth = lake.draw_codes(trajectory.pack.seed)
        note = hints(trajectory)[2]
        assert note == NULL_HINT or all(
            truth[code] == letter for code, letter in zip(note[::2], note[1::2], strict=True)
        )
    assert mean_rewards(runs["lake"])[2] > mean_rewards(runs["lake"])[0] + 0.2


def test_blanked_hints_are_blank_everywhere(runs):
    for trajectory in runs["hint_blanked"]:
        assert {episode.hint_in for episode in trajectory.episodes} == {NULL_HINT}
    updates = [e.hint_out for t in runs["hint_blanked"] for e in t.episodes]
    assert set(updates) != {NULL_HINT}  # notes are written, and thrown away
    assert np.ptp(mean_rewards(runs["hint_blanked"])) < 0.2


def test_swapped_hints_are_those_of_the_next_pack(runs):
    donors = runs["lake"][1:] + runs["lake"][:1]
    for swapped, donor in zip(runs["hint_swapped"], donors, strict=True):
        assert hints(swapped) == hints(donor)
        assert swapped.pack.seed != donor.pack.seed
    assert np.ptp(mean_rewards(runs["hint_swapped"])) < 0.25


def test_swapped_hints_need_no_undisturbed_entry():
    made = evaluator(SloppyPlayer(follows=True, writes_truth=True), **with_packs(4))
    with made.config.evaluation.matrix.unlocked():
        for name in ("lake", "hint_blanked", "ralph_sample", "ralph_full"):
            del made.config.evaluation.matrix[name]
    (trajectories,) = runs_of(made).values()
    assert [hints(t)[0] for t in trajectories] == [NULL_HINT] * 4
    assert {hint for t in trajectories for hint in hints(t)} != {NULL_HINT}


def test_entries_meet_the_same_worlds(runs):
    seeds = [t.pack.seed for t in runs["lake"]]
    assert len(set(seeds)) == 60
    for name in ("hint_blanked", "hint_swapped"):
        assert [t.pack.seed for t in runs[name]] == seeds
    again = runs_of(evaluator(SloppyPlayer(follows=False, writes_truth=False), **with_packs(5)))
    assert [t.pack.seed for t in again["lake"]] == seeds[:5]


def test_ralph_entries_repeat_one_task(runs):
    for name, per_pack in (("ralph_sample", 3), ("ralph_full", 1)):
        first_rows = [t.pack.tasks[0].index for t in runs[name]]
        assert first_rows == list(range(0, 60 * per_pack, per_pack))
        for trajectory in runs[name]:
            assert len({task.index for task in trajectory.pack.tasks}) == 1
            assert trajectory.pack.mode == name
            assert len(solves(trajectory)) == 3


def test_more_packs_than_slots_are_run_in_parts():
    """4 slots: 10 packs are 3 parts, and the outcome of a pack does not depend on its part."""
    player = SloppyPlayer(follows=True, writes_truth=True)
    made = evaluator(player, **with_packs(10))
    found = runs_of(made)
    assert made.policy.sampler.peak_in_flight == 4
    wide = evaluator(player, **with_packs(10), **{"engine.num_slots": 64})
    for name, trajectories in runs_of(wide).items():
        assert [t.episodes for t in map(without_turns, trajectories)] == [
            t.episodes for t in map(without_turns, found[name])
        ]
    assert wide.policy.sampler.peak_in_flight == 10


def without_turns(trajectory):
    """Arrays have no `==` of their own."""
    replace = types.dataclasses.replace
    return replace(trajectory, episodes=tuple(replace(e, turns=()) for e in trajectory.episodes))


def test_too_few_rows_are_refused():
    config = tiny()
    taskset = build.load_tasksets(config, ["lake_test"])["lake_test"]
    entry = config_lib.evaluation(taskset="lake_test", pack_size=8, num_packs=1025)
    with pytest.raises(ValueError, match=r"needs 8200 rows of tasksets\.lake_test, which has 8192"):
        evaluate.entry_packs(entry, taskset)


# Means and intervals.


def test_mean_and_interval_by_hand():
    # deviations -1 -1 1 1: variance 4/3 with 3 degrees of freedom, over 4 values
    mean, half_width = evaluate.mean_and_ci95([1.0, 1.0, 3.0, 3.0])
    assert mean == 2.0
    assert half_width == pytest.approx(1.96 * (4 / 3 / 4) ** 0.5)
    assert evaluate.mean_and_ci95([True, False, False, False])[0] == 0.25
    assert evaluate.mean_and_ci95([0.7]) == (0.7, 0.0)
    assert evaluate.mean_and_ci95([0.5] * 10) == (0.5, 0.0)


def test_the_summary_is_over_packs(runs):
    chat = chats.load_chat("builtin:symbols")
    positions = evaluate.summarise(runs["lake"], chat)
    np.testing.assert_allclose([p["reward"] for p in positions], mean_rewards(runs["lake"]))
    lengths = [[len(hint) for hint in hints(t)] for t in runs["lake"]]
    np.testing.assert_allclose([p["hint_tokens"] for p in positions], np.mean(lengths, axis=0))
    tokens = [[2 * len(e.turns) for e in solves(t)] for t in runs["lake"]]  # a code and its end
    np.testing.assert_allclose([p["response_tokens"] for p in positions], np.mean(tokens, axis=0))
    assert [p["format_error"] for p in positions] == [0.0] * 3


def test_runs_that_the_machinery_spoiled_are_left_out_and_counted(caplog):
    player = SloppyPlayer(follows=True, writes_truth=True)
    seen = []

    def fails_once(prompt, rng):
        seen.append(prompt)
        if len(seen) == 6:
            raise samplers.SamplerError("the server is gone")
        return player(prompt, rng)

    made = evaluator(fails_once, **with_packs(4))
    found = runs_of(made)
    summary = evaluate._summary(made.config, made.chat, found)
    counts = [(e["num_packs"], e["dropped_packs"]) for e in summary["tasksets"].values()]
    assert sorted(counts) == [(3, 1)] + [(4, 0)] * 4
    evaluate._warn_of_failures({"step 1": found})
    assert "1 of 4 runs failed and are left out (dropped_packs in eval.json)." in caplog.text
    assert all(len(entry["positions"]) == 3 for entry in summary["tasksets"].values())


def test_entries_of_nothing_but_failures_are_reported_beside_others(tmp_path, capsys):
    player = SloppyPlayer(follows=True, writes_truth=True)

    def fails_later(prompt, rng):
        if made.policy.sampler.num_requests > 20:  # an entry takes at most 2 * (3 * 2 + 2)
            raise samplers.SamplerError("the server is gone")
        return player(prompt, rng)

    made = evaluator(fails_later, **with_packs(2))
    found = runs_of(made)
    report = {"checkpoint": "step 1", **evaluate._summary(made.config, made.chat, found)}
    report["ladder"] = {}
    dropped = [entry["dropped_packs"] for entry in report["tasksets"].values()]
    assert 0 in dropped
    assert 2 in dropped
    empty = report["tasksets"][list(report["tasksets"])[dropped.index(2)]]
    assert (empty["num_packs"], empty["positions"]) == (0, [])
    evaluate._write(tmp_path, report, {"step 1": found})
    evaluate.show(report)
    assert "step 1: lake" in " ".join(capsys.readouterr().out.split())


def test_an_evaluation_of_nothing_but_failures_is_one_error():
    """After the first entry: the others would fail as well."""

    def fails(prompt, rng):
        raise samplers.SamplerError("the server is gone.")

    made = evaluator(fails, **with_packs(2))
    message = r"^all 2 runs failed, so that there .* by sampler_failed: the server is gone\.$"
    with pytest.raises(checks.EvaluationError, match=message):
        made.run({"script": None})
    assert made.policy.sampler.num_requests == 2


class Watched:
    """A policy that notes what is done with it, and in which event loop."""

    num_at_once = 3

    def __init__(self, sampler):
        self.sampler, self.calls, self.loops = sampler, [], set()

    def note(self, call):
        self.calls.append(call)
        self.loops.add(asyncio.get_running_loop())

    async def open(self):
        self.note("open")

    async def load(self, params):
        self.note(params)

    async def close(self):
        self.note("close")


def test_a_policy_is_opened_loaded_and_closed_in_one_loop():
    made = evaluator(SloppyPlayer(follows=True, writes_truth=True), **with_packs(4))
    policy = Watched(made.policy.sampler)
    watched = evaluate.dataclasses.replace(made, policy=policy)
    found = watched.run({"new": 1, "old": 0})
    assert list(found) == ["new", "old"]
    assert policy.calls == ["open", *[1] * 5, *[0] * 5, "close"]  # before every entry
    assert len(policy.loops) == 1
    assert policy.sampler.peak_in_flight == 3


def test_a_policy_is_closed_when_something_fails():
    def fails(prompt, rng):
        raise samplers.SamplerError("the server is gone")

    made = evaluator(fails, **with_packs(2))
    policy = Watched(made.policy.sampler)
    with pytest.raises(checks.EvaluationError):
        evaluate.dataclasses.replace(made, policy=policy).run({"new": 1})
    assert policy.calls == ["open", 1, "close"]


# Endpoints.

SYMBOLS = chats.load_chat("builtin:symbols")
PLAYER = SloppyPlayer(follows=True, writes_truth=True)


@pytest.mark.parametrize("kind", ["vllm", "somebody"])
def test_an_endpoint_plays_as_the_model_behind_it(kind, tmp_path, monkeypatch):
    """The same rewards as the script behind the endpoint, in process, and no key in any file."""
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    player = SloppyPlayer(follows=True, writes_truth=True)

    def sure(prompt, rng):
        # Of the request's seed only what fits into 31 bits is sent.
        return player(prompt, random.Random(prompt))

    config = tiny(**{"evaluation.endpoint.api_key_variable": "MY_KEY"})
    with served(FakeEndpoint(sure, SYMBOLS, kind=kind, api_key="sk-very-secret")) as endpoint:
        endpoint.faults = [429, "truncated", None, 500]
        report = evaluate.main(config, endpoint.url, str(tmp_path))
    assert report["checkpoint"] == f"tiny at {endpoint.url}"
    assert list(report) == ["checkpoint", "tasksets", "ladder"]  # no base, whatever compare_base
    assert json.loads((tmp_path / "eval.json").read_text()) == report
    made = evaluator(sure)
    expected = evaluate._summary(made.config, made.chat, runs_of(made))
    assert report["tasksets"] == expected["tasksets"]
    for path in tmp_path.rglob("*"):
        assert b"very-secret" not in path.read_bytes()


def test_the_chat_route_plays_full_texts(tmp_path):
    made = config_lib.default_config()
    made.tokenizer.source = "builtin:bytes"
    made.tasksets.lake = config_lib.taskset(env="frozen_lake_obscure", split="test", num_records=8)
    made.rollout.tasksets = ("lake",)
    made.batching.row_length = 12000
    made.rollout.max_response_tokens = 200
    made.evaluation.endpoint.route = "chat"
    made.evaluation.matrix.lake = config_lib.evaluation(taskset="lake", pack_size=2, num_packs=3)
    with served(FakeEndpoint(wordy, chats.load_chat("builtin:bytes"), kind="somebody")) as endpoint:
        report = evaluate.main(made, endpoint.url, str(tmp_path))
        roles = {tuple(m["role"] for m in body["messages"]) for body in endpoint.bodies}
        systems = [body["messages"][0]["content"] for body in endpoint.bodies]
    entry = report["tasksets"]["lake"]
    assert (entry["num_packs"], entry["dropped_packs"]) == (3, 0)
    first, second = entry["positions"]
    assert first["hint_parse_frac"] == 1.0
    assert first["format_error"] == second["format_error"] == 0.0
    assert sum("try up" in text for text in systems) >= 3  # of the second tasks
    assert ("system", "user", "assistant", "user") in roles


def wordy(prompt, rng):
    if "## Record of the latest task" in prompt:
        return "=== BEGIN NEW HINTS ===\ntry up\n=== END NEW HINTS ==="
    return f"Well. <answer>Direction {rng.randint(1, 4)}</answer>"


def test_what_an_endpoint_cannot_do_is_said_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("MY_KEY", raising=False)
    with served(FakeEndpoint(PLAYER, SYMBOLS, models=["a", "b"])) as endpoint:
        section = "--config.evaluation.endpoint."
        cases = [
            ([], 2, "evaluation.endpoint.model must be a model of http://127.0.0.1:"),
            ([f"{section}model=c"], 2, "which lists a, b; got 'c'"),
            ([f"{section}api_key_variable=MY_KEY"], 2, "is not set, is empty, or is no single li"),
            ([f"{section}route=chat", f"{section}model=a"], 2, "route must be completions with th"),
            ([f"{section}model=b"], 1, "all 6 runs failed, so that there is nothing to report; th"),
        ]
        for flags, status, message in cases:
            endpoint.always = 400
            address = f"--checkpoint={endpoint.url}"
            args = ["eval", f"--config={TINY}", f"--workdir={tmp_path}", address, *flags]
            assert cli.main(args) == status
            error = capsys.readouterr().err
            assert error.count("\n") == 1
            assert message in error
    assert not (tmp_path / "eval.json").exists()
    for address, message in (
        ("http://me:secret@host/v1", "must hold no user and password"),
        ("http://", "must be an address as http://host:8000/v1"),
        ("http://host:port/v1", "must be an address as http://host:8000/v1"),
        ("https://host/v1?key=1", "must be an address as http://host:8000/v1"),
    ):
        args = ["eval", f"--config={TINY}", f"--workdir={tmp_path}", f"--checkpoint={address}"]
        assert cli.main(args) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "secret" not in error
