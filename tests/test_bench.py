"""Benchmarks at toy size: they compare like with like, and say what they measured on."""

import asyncio
import json
import os
import urllib.error
import urllib.request

import jax.numpy as jnp
import numpy as np
import pytest

from codjax import bench, chat
from codjax.bench import (
    loss_head,
    material,
    rollouts,
    sampling,
    scripted_server,
    served,
    trainers,
    tunix_step,
    updates,
)
from codjax.checks import ConfigError

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
TINY_ROLLOUT = {
    "num_packs": 1,
    "group_size": 2,
    "pack_size": 2,
    "rounds": 2,
    "num_served_packs": 2,
    "num_requests": 3,
    "latency_s": 0.05,
    "num_served_rounds": 1,
}
TINY_STEP = {
    "num_rows": 2,
    "row_length": 16,
    "vocab_size": 32,
    "hidden_size": 16,
    "num_layers": 1,
}


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


def test_every_loss_head_finds_the_same_and_projects_what_it_says():
    # More than xla.logprobs.SINGLE_CHUNK_LOGITS, so that there are chunks.
    tables = loss_head.bench(
        num_positions=256, hidden_size=8, vocab_size=5000, chunk_size=64, rounds=1
    )
    assert list(tables) == ["loss_head, all scored", "loss_head, 25% scored"]
    every, some = tables.values()
    assert [row["variant"] for row in every] == [
        "whole logits",
        "chunks, rematerialised",
        "codjax, recomputing",
        "codjax, in forward",
    ]
    assert [row["variant"] for row in some] == ["masked", "compacted"]
    assert {row["scored"] for row in every} == {256}
    assert {row["scored"] for row in some} == {64}
    assert [row["projected"] for row in every + some] == [256] * 5 + [64]
    logits_mib = 256 * 5000 * 4 / 2**20
    assert every[0]["temporaries_mib"] > logits_mib
    for rows in (every, some):
        for row in rows:
            assert row is every[0] or row["temporaries_mib"] < 0.6 * logits_mib
            assert row["x_temporaries"] == row["temporaries_mib"] / rows[0]["temporaries_mib"]


def test_loss_heads_that_find_something_else_are_not_timed():
    def result(loss, hidden, table):
        return jnp.float32(loss), (jnp.float32([hidden]), jnp.float32([table]))

    right = result(1.0, [2.0, 0.0], [0.0, -3.0])
    loss_head.check_same({"one": right, "other": result(1.00005, [2, 1e-5], [0, -3])}, 1e-4)
    for other, what in (
        (result(1.001, [2, 0], [0, -3]), "the loss of 'other'"),
        (result(1, [2, 0.001], [0, -3]), "the gradient of the hidden states of 'other'"),
        (result(1, [2, 0], [0, float("nan")]), "the gradient of the table of 'other'"),
    ):
        with pytest.raises(RuntimeError, match=f"{what} and of 'one' differ"):
            loss_head.check_same({"one": right, "other": other}, 1e-4)
    with pytest.raises(RuntimeError, match="the gradient of the table of 'one' is 0"):
        loss_head.check_same({"one": result(1, [2, 0], [0, 0])}, 1e-4)


def test_the_step_of_the_tunix_benchmark_is_the_same_row_by_row():
    job, given = tunix_step.make_job(**TINY_STEP)
    metrics, changes = {}, {}
    for name, way in (("whole", trainers.Way(2, "none")), ("by row", trainers.Way(1, "full"))):
        made = trainers.codjax_trainer(job, way, given)
        made.step()
        metrics[name] = made.first_metrics()
        changes[name] = {key: new - given.weights[key] for key, new in made.weights().items()}
    tunix_step.check_same(metrics, changes)
    assert changes["whole"].keys() == given.weights.keys()
    assert 0 < metrics["whole"]["loss/clip_frac"] < 0.5  # so that the clip is compared, too


def test_trainers_that_make_different_steps_are_not_compared():
    step = {"loss/entropy": 3.0, "optimizer/grad_norm": 2.0}
    change = {"embedding": np.float32([[3.0, 4.0]]), "final_norm": np.float32([0.0])}
    tunix_step.check_same(
        {"one": step, "other": {"loss/entropy": 3.0002}},  # it does not report its norm
        {"one": change, "other": change | {"final_norm": np.float32([0.004])}},
    )
    for other, turned, what in (
        (step | {"loss/entropy": 3.001}, change, "loss/entropy is 3.001 in 'other' and 3.0 in"),
        (step | {"optimizer/grad_norm": float("nan")}, change, "grad_norm is nan in 'other'"),
        (
            step,
            change | {"final_norm": np.float32([0.01])},
            "weights .* 'other' .* differ by 0.002",
        ),
    ):
        with pytest.raises(RuntimeError, match=what):
            tunix_step.check_same({"one": step, "other": other}, {"one": change, "other": turned})


def test_a_contender_is_timed_in_a_process_of_its_own(monkeypatch):
    contenders = {"codjax": tunix_step.CONTENDERS["codjax"]}
    monkeypatch.setattr(tunix_step, "CONTENDERS", contenders)
    (row,) = tunix_step.bench(**TINY_STEP, rounds=1)
    assert row["variant"] == "codjax"
    assert row["rows_at_once"] == 2
    assert row["process_mib"] > row["temporaries_mib"] > 0
    assert row["x_seconds"] == 1

    monkeypatch.setitem(contenders, "codjax", contenders["codjax"]._replace(remat="no such thing"))
    with pytest.raises(RuntimeError, match=r"(?s)ended at 'step':.*no such thing"):
        tunix_step.bench(**TINY_STEP, rounds=1)


def test_without_tunix_the_benchmark_says_how_to_get_it(monkeypatch, tmp_path):
    older = tmp_path / "python"
    older.write_text("#!/bin/sh\necho 0.1.3\n")
    older.chmod(0o755)
    for python, found in ((str(older), "has 0.1.3"), ("/no/such/python", "has none")):
        monkeypatch.setenv(tunix_step.PYTHON_VARIABLE, python)
        with pytest.raises(ConfigError, match=f"{found}.*pip install google-tunix==0.1.7"):
            tunix_step.bench(**TINY_STEP)


@pytest.mark.slow
@pytest.mark.skipif(
    tunix_step.PYTHON_VARIABLE not in os.environ, reason="no interpreter with Tunix is named"
)
def test_tunix_makes_the_same_step():
    rows = tunix_step.bench(**TINY_STEP, rounds=1)
    assert [row["variant"] for row in rows] == list(tunix_step.CONTENDERS)


def test_both_samplers_answer_the_same_and_one_feeds_less():
    reuse, whole = sampling.bench(**TINY_ENGINE)
    for key in ("calls", "prompt_tokens", "sampled_tokens"):
        assert reuse[key] == whole[key] > 0
    # The last token of a prompt is not fed but decoded from.
    assert whole["fed_tokens"] == whole["prompt_tokens"] - whole["calls"]
    assert reuse["fed_tokens"] < 0.5 * whole["fed_tokens"]


def test_the_rollout_layer_is_timed_per_call():
    tables = rollouts.bench(**TINY_ROLLOUT)
    assert list(tables) == ["rollout", "rollout, over HTTP", "rollout, messages"]
    (row,), over_http, messages = tables.values()
    assert row["runs"] == 2
    assert 2 * (2 + 1) <= row["calls"] <= 2 * (4 + 1)  # one or two presses a task, one note between
    assert row["us_per_call"] == pytest.approx(1e6 * row["rollout_s"] / row["calls"])

    in_process, ours, bare, frozen = over_http
    assert [r["variant"] for r in over_http] == [
        served.SCRIPTED,
        served.HTTP,
        served.BARE,
        served.FROZEN,
    ]
    assert {r["calls"] for r in over_http} == {ours["calls"]}
    assert 4 * (2 + 1) <= ours["calls"] <= 4 * (4 + 1)
    assert {in_process["peak_in_flight"], ours["peak_in_flight"], bare["peak_in_flight"]} == {4}
    for r in (ours, bare, frozen):  # the calls of a run wait for each other's answers
        assert r["seconds"] > 0.05 * ours["calls"] / 4
    assert 0 < ours["http_frac"] < 1
    cpu_us = [r["cpu_us_per_call"] for r in (in_process, ours, bare)]
    assert ours["x_bare"] == pytest.approx((cpu_us[1] - cpu_us[0]) / cpu_us[2])

    assert [(r["prompt_tokens"], r["response_tokens"]) for r in messages] == [
        *[(100, 20)] * 2,
        *[(8000, 1000)] * 2,
    ]
    for ours, bare in (messages[:2], messages[2:]):
        assert ours["calls"] == bare["calls"] == 3 * 4
        cpu_us = [r["cpu_us_per_call"] for r in (ours, bare)]
        assert ours["x_bare"] == pytest.approx(cpu_us[0] / cpu_us[1])


def test_rollouts_that_are_not_the_same_are_not_compared():
    config, chat_ = material.compact_config(num_tasks=2), chat.load_chat("builtin:symbols")
    responses = served._responses(chat_)

    def groups(responses):
        sampler = served.scripted.ScriptedSampler(served._script(responses))
        sizes = {"num_packs": 1, "pack_size": 2, "group_size": 1}
        return asyncio.run(material.playing(config, chat_, sampler, **sizes))

    served._check_same(groups(responses), groups(responses))
    other = {
        last: [r._replace(logprobs=r.logprobs - 1) for r in choices]
        for last, choices in responses.items()
    }
    with pytest.raises(RuntimeError, match="not the same"):
        served._check_same(groups(responses), groups(other))


def test_the_scripted_server_answers_by_the_end_of_the_prompt_and_ends_with_its_block():
    answers = {"9": ['{"nine":"RID"}'], scripted_server.ANY: ['{"even":"RID"}', '{"odd":"RID"}']}

    def post(url, body):
        with urllib.request.urlopen(f"{url}/generate", body.encode()) as answer:
            return json.loads(answer.read())

    with scripted_server.serving(answers, {"/ready": {"a": 1}}, latency_s=0.0) as server:
        assert post(server.url, '{"rid":"r1","input_ids":[3,1],"x":[1]}') == {"even": "r1"}
        assert post(server.url, '{"rid": "r2", "input_ids": [3, 2], "x": [1]}') == {"odd": "r2"}
        assert post(server.url, '{"input_ids":[3,9],"rid":"r3"}') == {"nine": "r3"}
        long = "[" + "7," * 100_000 + "2" * 8 + "]"  # comes in many pieces
        assert post(server.url, f'{{"rid":"r4","input_ids":{long}}}') == {"odd": "r4"}
        with urllib.request.urlopen(f"{server.url}/ready") as answer:
            assert json.loads(answer.read()) == {"a": 1}
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{server.url}/unknown")
        assert server.peak_in_flight() == 1
    with pytest.raises(urllib.error.URLError):
        server.peak_in_flight()


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

    def lack(*, size: int = 1):
        raise ConfigError(f"of this size, {size}, nothing is installed")

    monkeypatch.setitem(bench.BENCHES, "lacking", lack)
    assert bench.main(None, None)["benches"].keys() == {"toy", "other"}
    assert "lacking is left out: of this size, 1, nothing" in capsys.readouterr().out
    with pytest.raises(ConfigError):
        bench.main("lacking", None)
