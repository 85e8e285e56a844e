"""Whole runs of `codjax train`, in a process of its own, whose tokens come from real servers."""

import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import psutil
import pytest
from flax import nnx

from codjax import build, checkpoints, config_files, metrics, models
from codjax import chat as chats
from codjax.rollout.sglang import guard
from tests.rollout.sglang.real import local
from tests.rollout.sglang.test_processes import free_port

pytestmark = local.MARKS
ROOT = pathlib.Path(__file__).parents[4]
TINY = ROOT / "tests" / "tiny.py"
DECODE_GAP = 1e-3  # largest allowed between server and learner, in float32
NUM_PACKS, GROUP, SIZE = 8, 8, 3  # of a step: 64 runs, 192 rewards
SHAPE = {
    "rollout.tasks_per_step": NUM_PACKS * SIZE,
    "rollout.group_size": GROUP,
    "engine.num_slots": NUM_PACKS * GROUP,
    "engine.prefill_rows": NUM_PACKS * GROUP,
    "metrics.packs_per_step": NUM_PACKS,  # every run is written
    "metrics.packs_every_steps": 1,
    "checkpoint.every_steps": 1,
}
SERVED = {
    "rollout.sampler": "sglang",
    "server.dtype": "float32",
    "server.probe_interval_s": 0.2,
    "server.backoff_s": 0.1,
}
AHEAD = {
    "rollout.max_staleness": 3,
    "rollout.in_flight_updates": True,
    "rollout.group_size": 4,
    "num_steps": 10,
}


def start(workdir, *changes, environment=None):
    """The command, begun; its output goes to a file beside the workdir."""
    values = functools.reduce(dict.__or__, changes, SHAPE)
    paths = os.pathsep.join(str(path) for path in (ROOT, ROOT / "kernels"))
    with log_of(workdir).open("a") as output:
        return subprocess.Popen(
            [
                *("nice", "-n", "10", sys.executable, "-m", "codjax", "train"),
                *(f"--config={TINY}", f"--workdir={workdir}"),
                *(f"--config.{key}={value}" for key, value in values.items()),
            ],
            stdout=output,
            stderr=output,
            cwd=ROOT,
            env=os.environ | (environment or {}) | {"PYTHONPATH": paths},
        )


def run(workdir, *changes):
    """The command, to its end."""
    begun = time.monotonic()
    process = start(workdir, *changes)
    try:
        assert process.wait(timeout=500) == 0, log_of(workdir).read_text()
    finally:
        process.kill()
    print(f"{workdir.name}: {time.monotonic() - begun:.1f} s")


def log_of(workdir):
    return workdir.with_suffix(".log")


def rows(workdir):
    path = workdir / metrics.METRICS_FILE
    return metrics.read_metrics(path) if path.exists() else []


def runs(workdir):
    """Of each step its runs, as `docs/file_formats.md` has them, group by group."""
    files = sorted((workdir / "trajectories").iterdir())
    steps = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    return [sorted(step, key=lambda run: (run["group"], run["run"])) for step in steps]


def turns(step):
    return [turn for run in step for episode in run["episodes"] for turn in episode["turns"]]


@pytest.fixture(scope="module")
def tiny_model():
    config = config_files.load(str(TINY))
    return build.make_model(config, chats.load_chat(config.tokenizer.source))


@pytest.fixture(scope="module")
def urls(tiny_model, tmp_path_factory):
    """Two servers of the tiny model, with weights that no run has."""
    folder = tmp_path_factory.mktemp("tiny")
    models.save_pretrained(models.init(tiny_model.config, seed=7), folder / "model")
    with local.started(folder / "model", folder, num_servers=2) as running:
        yield {"server.urls": running.urls}


# The same run on servers and in process.


def rewards(workdir):
    """Mean reward of each run over its tasks: `[steps, packs, group]`."""
    means = [
        [
            np.mean([e["reward"] for e in run["episodes"] if e["kind"] == "solve_task"])
            for run in step
        ]
        for step in runs(workdir)
    ]
    return np.array(means).reshape(len(means), NUM_PACKS, GROUP)


def variance(of_runs):
    """Of the mean over runs of these packs: `[…, packs, group]` -> `[…]`.

    Runs of a pack differ by what was sampled alone; packs differ by their tasks, which two runs of
    one config share.
    """
    return np.mean(np.var(of_runs, axis=-1, ddof=1) / GROUP, axis=-1) / NUM_PACKS


def test_a_run_on_servers_is_the_run_in_process(urls, tmp_path):
    """Learning is on: with each step's weights unlike the last, stale ones would show in the ratio,
    by 0.1 and more in the largest log-ratio.

    The two policies drift apart by what they sampled, which the standard error does not count. It
    is little: eleven runs in process that differed in the draws of their sampler alone had mean
    rewards of 0.177 on average with a standard deviation of 0.0046, where the standard error of
    one is 0.0058. That of this seed, 0.174, is among their middle.
    """
    num_steps = 20
    served, alone = tmp_path / "served", tmp_path / "alone"
    length = {"num_steps": num_steps, "seed": 1}
    run(served, length, SERVED, urls)
    run(alone, length)

    found = rows(served)
    assert [row["step"] for row in found] == list(range(1, num_steps + 1))
    for row in found:
        assert row["staleness/max"] == row["staleness/dropped_samples"] == 0
        assert row["loss/ratio_mean"] == pytest.approx(1, abs=DECODE_GAP)
        assert row["loss/log_ratio_abs_max"] < DECODE_GAP
        assert row["rollout/num_runs"] == NUM_PACKS * GROUP
        assert (
            row["rollout/dropped_runs"] == row["sampler/retries"] == row["sampler/set_aside"] == 0
        )
        assert row["batching/trained_tokens"] == row["rollout/response_tokens"]
    print("largest log-ratio", max(row["loss/log_ratio_abs_max"] for row in found))
    asked = sum(len(turns(step)) for step in runs(served))
    assert found[-1]["sampler/requests"] == asked

    for one, other in zip(runs(served), runs(alone), strict=True):
        assert [run["pack"] for run in one] == [run["pack"] for run in other]
    ours, theirs = rewards(served), rewards(alone)
    gaps = np.mean(ours, axis=(1, 2)) - np.mean(theirs, axis=(1, 2))  # by step
    variances = variance(ours) + variance(theirs)
    error = np.sqrt(np.sum(variances)) / num_steps
    print(f"rewards {ours.mean():.4f} and {theirs.mean():.4f}, standard error {error:.4f}")
    print(f"by step: chi-square {np.sum(gaps**2 / variances):.1f} of {num_steps}")
    assert abs(np.mean(gaps)) < 4 * error
    assert theirs.mean() > 10 * error  # so that a policy that was not warmed up would show
    assert np.sum(gaps**2 / variances) < 53  # once in 10,000, with 20 degrees of freedom


# Runs ahead of the learner.


class Scorer:
    """What the policies of a run say, by their checkpoints."""

    def __init__(self, workdir, model):
        graphdef = nnx.split(model)[0]
        config = config_files.load(str(TINY))
        self._like = build.abstract_params(model, build.make_mesh(config, model))
        self._store = checkpoints.Checkpoints(workdir, keep=100, read_only=True)
        self._score = jax.jit(
            lambda params, tokens: models.score_rows(graphdef, params, tokens, implementation="xla")
        )
        self._params = functools.cache(self._restore)

    def _restore(self, version):
        return self._store.restore_params(version, self._like)

    def gaps(self, turn, version):
        """Between the log-probs of a response and those of a version, token by token."""
        tokens = np.zeros((1, 64), np.int32)
        prompt, ids = turn["prompt_tokens"], turn["prompt_tokens"] + turn["response_tokens"]
        tokens[0, : len(ids)] = ids
        scored = np.asarray(self._score(self._params(version), tokens))[0]
        return np.abs(scored[len(prompt) - 1 : len(ids) - 1] - turn["sampler_logprobs"])


def check_versions(workdir, model):
    """Each token was sampled by the version that it says, and trained on while it was young enough.

    Returns:
        Responses with tokens of several versions.
    """
    scorer, num_mixed = Scorer(workdir, model), 0
    for row, step in zip(rows(workdir), runs(workdir), strict=True):
        newest, oldest, num_trained = row["step"] - 1, row["step"] - 1, 0
        for turn in turns(step):
            spans = turn["version_spans"]
            versions, starts, ends = zip(*spans, strict=True)
            num_tokens = len(turn["response_tokens"])
            assert (0, *ends) == (*starts, num_tokens)
            assert sorted(set(versions)) == list(versions)
            assert versions[-1] <= newest
            assert versions[0] == turn["policy_version"]
            for version, first, end in spans:
                assert np.max(scorer.gaps(turn, version)[first:end]) < DECODE_GAP
            oldest = min(oldest, versions[0])
            num_mixed += len(spans) > 1
            if newest - versions[0] <= AHEAD["rollout.max_staleness"]:
                num_trained += num_tokens
        assert row["staleness/max"] == newest - oldest
        assert row["batching/trained_tokens"] == num_trained
    return num_mixed


def check_steps(workdir):
    """All lines are there, and no rollout step was trained on twice."""
    found, num_steps = rows(workdir), AHEAD["num_steps"]
    assert [row["step"] for row in found] == list(range(1, num_steps + 1))
    assert len({row["rollout/step"] for row in found}) == num_steps
    assert all(row["batching/trained_tokens"] > 0 for row in found)
    assert sum(row["rollout/dropped_runs"] for row in found) == 0
    return found


def test_tokens_of_an_asynchronous_run_are_of_the_version_that_they_say(urls, tiny_model, tmp_path):
    """Weights travel as bytes here, and by disk in the other runs."""
    workdir = tmp_path / "ahead"
    run(workdir, SERVED, AHEAD, {"server.route": "bytes"}, urls)
    found = check_steps(workdir)
    assert max(row["staleness/max"] for row in found) >= 1
    print("staleness", [row["staleness/max"] for row in found])
    num_mixed = check_versions(workdir, tiny_model)
    print(f"{num_mixed} responses by several versions; {found[-1]['sampler/resumed']} resumed")
    assert num_mixed > 0


def test_a_server_of_the_run_that_is_killed(tiny_model, tmp_path):
    """Its only one, which the run started itself, with its group, while it answers."""
    workdir = tmp_path / "killed"
    at_home = {
        "server.local.num": 1,
        "server.local.gpus_per_server": 0,
        "server.local.first_port": free_port(),
        # Of the server alone: the trainer has no torch, which the stand-in imports.
        "server.local.command": (
            "env",
            f"PYTHONPATH={local.ENVIRONMENT['PYTHONPATH']}",
            *local.PROGRAM,
        ),
        "server.local.arguments": local.ARGUMENTS,
    }
    process = start(workdir, SERVED, AHEAD, at_home, environment=local.ENVIRONMENT)
    trainer, seen = psutil.Process(process.pid), set()
    try:
        until(lambda: len(rows(workdir)) >= 3, process, workdir)
        seen |= below(trainer)
        [server] = [
            one
            for one in seen
            if local.PROGRAM[-1] in one.cmdline() and guard.__file__ not in one.cmdline()
        ]
        killed, num_serving = time.monotonic(), num_told(workdir)
        os.killpg(server.pid, signal.SIGKILL)
        num_steps_then = len(rows(workdir))
        until(lambda: num_told(workdir) > num_serving, process, workdir)
        print(f"serves again after {time.monotonic() - killed:.1f} s")
        seen |= below(trainer)
        assert process.wait(timeout=300) == 0, log_of(workdir).read_text()
    finally:
        process.terminate()
        process.wait(timeout=60)
    found = check_steps(workdir)
    assert num_steps_then < AHEAD["num_steps"]
    assert found[-1]["sampler/set_aside"] == 1
    assert found[-1]["sampler/retries"] > 0
    check_versions(workdir, tiny_model)
    assert len(seen) >= 2 * 3  # of two starts: the server, its scheduler and another
    assert not [one for one in seen if one.is_running()]


def num_told(workdir):
    """How often a server began to serve."""
    return log_of(workdir).read_text().count("serves the weights of version")


def below(trainer):
    """Whatever the run has started, and still runs."""
    return set(trainer.children(recursive=True))


def until(is_so, process, workdir, limit_s=300):
    end = time.monotonic() + limit_s
    while not is_so():
        assert process.poll() is None, log_of(workdir).read_text()
        assert time.monotonic() < end, log_of(workdir).read_text()
        time.sleep(0.05)
