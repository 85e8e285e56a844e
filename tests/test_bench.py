"""Benchmarks at toy size: they compare like with like, and say what they measured on."""

import json

import numpy as np
import pytest

from codjax import bench, chat
from codjax.bench import material, rollouts, sampling, updates

# One step solves the last of four tasks now and then, so that there is something to learn.
TINY_MODEL = {"vocab_size": 1024, "num_layers": 1, "rounds": 1}
TINY_LEARNER = {
    **TINY_MODEL,
    "pack_size": 4,
    "group_size": 2,
    "max_turns": 1,
    "num_thoughts": 1,
    "row_length": 1280,
}
TINY_ENGINE = {**TINY_MODEL, "pack_size": 1, "group_size": 2, "max_turns": 2, "num_thoughts": 1}
TINY_ROLLOUT = {"num_packs": 1, "group_size": 2, "pack_size": 2, "rounds": 2}


def test_the_learner_saves_tokens_projections_and_memory(monkeypatch):
    farthest = ("forest, scored (codjax)", "samples, full logits")  # each costs seconds to compile
    monkeypatch.setattr(updates, "VARIANTS", {name: updates.VARIANTS[name] for name in farthest})
    ours, plain = updates.bench(**TINY_LEARNER, measures_process=False)

    assert (ours["variant"], plain["variant"]) == farthest
    assert ours["samples"] == plain["samples"]
    assert ours["scored_tokens"] == plain["scored_tokens"] <= ours["projected_tokens"]
    assert ours["stored_tokens"] < 0.6 * plain["stored_tokens"]
    assert plain["projected_tokens"] == plain["rows"] * plain["row_tokens"]
    assert ours["program_mib"] < plain["program_mib"]
    assert plain["x_program"] == plain["program_mib"] / ours["program_mib"]
    for row in (ours, plain):
        assert 0 < row["fastest_s"] <= row["update_s"]
        assert row["x_cpu"] == row["cpu_s"] / ours["cpu_s"]
        assert row["process_mib"] is None


def test_variants_that_make_different_steps_are_not_timed():
    step = {"loss/total": -0.25, "optimizer/grad_norm": 3.0}
    updates._check_same({"one": step, "other": step | {"loss/total": -0.25001}})
    for key, value in (("loss/total", -0.2501), ("optimizer/grad_norm", float("nan"))):
        with pytest.raises(RuntimeError, match=f"{key} is .* in the variant 'other' .* not the sa"):
            updates._check_same({"one": step, "other": step | {key: value}})
    with pytest.raises(RuntimeError, match="nothing was trained"):
        updates._check_same({"one": step | {"loss/total": 0.0}, "other": step})


def test_both_samplers_answer_the_same_and_one_feeds_less():
    reuse, whole = sampling.bench(**TINY_ENGINE)
    for key in ("calls", "prompt_tokens", "sampled_tokens"):
        assert reuse[key] == whole[key] > 0
    # The last token of a prompt is not fed but decoded from.
    assert whole["fed_tokens"] == whole["prompt_tokens"] - whole["calls"]
    assert reuse["fed_tokens"] < 0.5 * whole["fed_tokens"]


def test_the_rollout_layer_is_timed_per_call():
    (row,) = rollouts.bench(**TINY_ROLLOUT)
    assert row["runs"] == 2
    assert 2 * (2 + 1) <= row["calls"] <= 2 * (4 + 1)  # one or two presses a task, one note between
    assert row["us_per_call"] == pytest.approx(1e6 * row["rollout_s"] / row["calls"])


def test_the_scripted_group_is_what_training_sees():
    (run,) = material.lake_group(
        material.word_chat(), pack_size=2, group_size=1, max_turns=8, num_thoughts=3
    )
    for episode in run.episodes:
        assert not episode.has_format_error
    assert "Direction" in run.episodes[1].hint_out
    turn = run.episodes[0].turns[0]
    text = material.word_chat().decode(turn.prompt_tokens)
    assert 3 < len(text) / len(turn.prompt_tokens) < 5


def test_the_words_of_the_benchmarks_lose_no_text():
    words = material.word_chat()
    text = "Wörter, \t 0/8 <answer>Direction 3</answer> √"
    assert words.decode(words.respond(text)) == text
    assert words.vocab_size < chat.load_chat("builtin:bytes").vocab_size * 4


def test_main_writes_what_a_number_must_be_read_with(tmp_path, monkeypatch, capsys):
    rows = [{"variant": "ours", "update_s": 1234.5, "calls": 12345, "process_mib": None}]

    def measure(*, rounds: int = 7):
        assert rounds == 7
        return rows

    monkeypatch.setattr(bench, "BENCHES", {"toy": measure, "other": measure})
    output = tmp_path / "deep" / "bench.json"
    report = bench.main("toy", str(output))

    written = json.loads(output.read_text())
    assert written == report
    assert written["benches"] == {"toy": {"sizes": {"rounds": 7}, "rows": rows}}
    assert {"command", "date", "commit", "versions", "machine"} <= written.keys()
    assert written["versions"]["numpy"] == np.__version__
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("toy", "ours", "1,234", "12,345", "-"))
    assert bench.main(None, None)["benches"].keys() == {"toy", "other"}
