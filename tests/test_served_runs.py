"""Whole runs whose tokens come over HTTP, from scripted servers with the model behind them.

The servers are processes that `codjax train` starts and looks after (`server.local`), or one that
the test holds in its hand.
"""

import asyncio
import contextlib
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from codjax import build, checks, cli, config_files, evaluate, metrics, models, train
from codjax import chat as chats
from codjax.rollout.sampler import SamplerError
from tests.rollout.sglang import model_server
from tests.rollout.sglang.faults import Fault
from tests.rollout.sglang.test_processes import free_port

TESTS = pathlib.Path(__file__).parent
TINY = TESTS / "tiny.py"
QUICK = {  # pauses that a test can wait for
    "server.dtype": "float32",
    "server.probe_interval_s": 0.1,
    "server.backoff_s": 0.01,
    "server.max_backoff_s": 0.1,
    "server.ready_timeout_s": 60.0,
    "server.replica_wait_s": 60.0,
}


def tiny(**changes):
    config = config_files.load(str(TINY))
    config.update_from_flattened_dict(QUICK | {"warmup.num_steps": 50} | changes)
    return config


def served(server, **changes):
    return tiny(**{"rollout.sampler": "sglang", "server.urls": (server.url,)} | changes)


def local_flags(num_servers, *arguments):
    """Flags for a run that starts its own servers."""
    command = (sys.executable, "-m", "tests.rollout.sglang.model_server")
    ports = random.Random(os.getpid()).randrange(20000, 30000)
    changes = QUICK | {
        "rollout.sampler": "sglang",
        "server.local.num": num_servers,
        "server.local.gpus_per_server": 0,
        "server.local.command": command,
        "server.local.arguments": arguments,
        "server.local.first_port": ports,
    }
    return [f"--config.{key}={value}" for key, value in changes.items()]


def start(workdir, *flags, log):
    """`codjax train` in a process of its own."""
    paths = [str(path) for path in (TESTS.parent, TESTS.parent / "kernels")]
    with log.open("a") as output:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "codjax", "train", f"--config={TINY}"),
                *(f"--workdir={workdir}", "--config.warmup.num_steps=50", *flags),
            ],
            stdout=output,
            stderr=output,
            cwd=TESTS.parent,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        )


def rows(workdir):
    path = workdir / metrics.METRICS_FILE
    return metrics.read_metrics(path) if path.exists() else []


def wait_for(condition, process, log, limit_s=200):
    end = time.monotonic() + limit_s
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.01)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny model as a Hugging Face folder, as a server starts with it."""
    config, path = tiny(), tmp_path_factory.mktemp("model")
    model = build.make_model(config, chats.load_chat(config.tokenizer.source))
    models.save_pretrained(models.init(model.config, seed=7), path)
    return path


class Held:
    """A server in a thread of this process, whose attributes a test sets."""

    def __init__(self, folder):
        self._made = model_server.ModelServer(folder)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self.call(self._made.start())
        self.url = self._made.url

    def __getattr__(self, name):
        return getattr(self._made, name)

    def call(self, awaitable):
        return asyncio.run_coroutine_threadsafe(awaitable, self._loop).result(30)

    def change(self, **values):
        self._loop.call_soon_threadsafe(lambda: self._made.change(**values))

    def close(self):
        self.call(self._made.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)


@pytest.fixture
def server(folder):
    with contextlib.closing(Held(folder)) as held:
        yield held


def test_a_run_on_a_server_trains_on_what_the_weights_before_sampled(server, tmp_path):
    config = served(server, num_steps=3)
    train.main(config, str(tmp_path))
    found = rows(tmp_path)
    assert [row["step"] for row in found] == [1, 2, 3]
    for row in found:
        assert row["staleness/max"] == 0
        assert row["loss/ratio_mean"] == pytest.approx(1, abs=1e-5)
        assert row["loss/log_ratio_abs_max"] < 1e-4
        assert row["rollout/dropped_runs"] == row["sampler/retries"] == 0
    assert [push["weight_version"].split("-")[1] for push in server.pushes] == ["0", "1", "2", "3"]
    assert not list((tmp_path / "weights").rglob("*.safetensors"))  # no one needs them any more


def test_a_server_that_keeps_its_old_weights_is_found_by_the_probe(server, tmp_path):
    server._made.is_deaf = True
    config = served(server, num_steps=1, **{"server.replica_wait_s": 1.0})
    with pytest.raises(SamplerError, match=r"does not have the weights .*-0: a log-prob"):
        train.main(config, str(tmp_path))
    asked = [body["sampling_params"]["max_new_tokens"] for body in server.generations]
    assert set(asked) == {0}  # the probe alone


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("architecture", "LlamaForCausalLM", "runs a LlamaForCausalLM"),
        ("vocab_size", 99, "a vocabulary of 99, and the model one of"),
        ("context_length", 40, "room for 38 tokens of prompt and response"),
        ("version", "0.4.1", r"runs sglang 0\.4\.1; needed is 0\.5\.19 or later"),
    ],
)
def test_a_server_of_another_model_ends_the_run_before_it_begins(
    server, tmp_path, attribute, value, message
):
    setattr(server._made, attribute, value)
    with pytest.raises(SamplerError, match=message):
        train.main(served(server), str(tmp_path))
    assert not (tmp_path / "checkpoints").exists()


def test_a_server_that_is_not_there_is_one_line(tmp_path, capsys):
    flags = [f"--config.{key}={value}" for key, value in QUICK.items()]
    status = cli.main(
        [
            *("train", f"--config={TINY}", f"--workdir={tmp_path}", *flags),
            "--config.rollout.sampler=sglang",
            f"--config.server.urls=('http://127.0.0.1:{free_port()}',)",
            "--config.server.ready_timeout_s=0.5",
        ]
    )
    error = capsys.readouterr().err
    assert status == 1
    assert re.fullmatch(r"codjax train: http://.* was not ready within 0.5 s .*\n", error), error


def test_a_run_that_waits_in_vain_says_for_what_and_where_the_stacks_are(server, tmp_path):
    server.change(hold_after=1)
    config = served(server, num_steps=1, **{"rollout.deadline_s": 4.0})
    with pytest.raises(checks.StalledError) as caught:
        train.main(config, str(tmp_path))
    assert re.search(
        r"waited 4 s \(rollout.deadline_s\) for a rollout step for update 1; last sign of life of "
        r"rollouts: . s ago: step 0 was begun; the stacks .* are in (.*)\.$",
        str(caught.value),
    )
    (stacks,) = tmp_path.glob("stall-*.txt")
    assert "in generate" in stacks.read_text()


def test_weights_that_cannot_be_staged_end_the_run_in_one_line(server, tmp_path):
    (tmp_path / "file").touch()
    config = served(server, num_steps=1, **{"server.weights_folder": str(tmp_path / "file")})
    with pytest.raises(checks.WriteError, match=r"cannot be written to .*/file"):
        train.main(config, str(tmp_path / "run"))


def test_evaluation_on_a_server_is_evaluation_in_process(server, tmp_path):
    """Greedy answers are the same, so are all numbers."""
    config = served(server, num_steps=1, **{"evaluation.temperature": 0.0})
    train.main(tiny(num_steps=1), str(tmp_path))
    reports = []
    for changes in ({"rollout.sampler": "engine"}, {}):
        config.update_from_flattened_dict(changes or {"rollout.sampler": "sglang"})
        evaluate.main(config, "latest", str(tmp_path))
        reports.append(json.loads((tmp_path / "eval.json").read_text()))
    assert reports[0] == reports[1]
    versions = {push["weight_version"].split("-")[1] for push in server.pushes}
    assert versions == {"0", "1"}  # the checkpoint, and the base


def orphans():
    """Servers, and their guards, of any run of these tests that still live."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if "tests.rollout.sglang.model_server" in (process.info["cmdline"] or [])
    ]


def servers():
    """The servers alone, by port: one that is started again gets another number as a process."""
    found = [process for process in orphans() if process.info["cmdline"][1] == "-m"]
    return sorted(found, key=lambda process: port_of(process.info["cmdline"]))


def port_of(words):
    return int(words[words.index("--port") + 1])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_servers_that_are_killed_come_back_and_nothing_is_lost(tmp_path):
    """Two local servers; each is killed while answers are under way, in an asynchronous run."""
    log, workdir = tmp_path / "log.txt", tmp_path / "run"
    num_steps = 60
    process = start(
        workdir,
        *local_flags(2, "--token-s=0.002"),
        *(f"--config.num_steps={num_steps}", "--config.rollout.max_staleness=3"),
        "--config.rollout.in_flight_updates=True",
        log=log,
    )
    for number in (0, 1):
        wait_for(lambda: len(rows(workdir)) >= 10 * (number + 1), process, log)  # noqa: B023
        servers()[number].kill()
        wait_for(
            lambda: log.read_text().count("is started again in") == number + 1,  # noqa: B023
            process,
            log,
        )
    assert process.wait(timeout=300) == 0, log.read_text()
    found = rows(workdir)
    assert [row["step"] for row in found] == list(range(1, num_steps + 1))
    trained = [row["rollout/step"] for row in found]
    assert len(set(trained)) == num_steps
    assert found[-1]["sampler/set_aside"] >= 2
    assert sum(row["rollout/dropped_runs"] for row in found) == 0
    assert log.read_text().count("serves the weights of version") >= 2
    assert orphans() == []


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_no_server_outlives_a_trainer_that_is_killed(tmp_path):
    log, workdir = tmp_path / "log.txt", tmp_path / "run"
    process = start(workdir, *local_flags(2), "--config.num_steps=1000", log=log)
    wait_for(lambda: len(rows(workdir)) >= 3, process, log)
    assert len(servers()) == 2
    process.kill()
    process.wait()
    end = time.monotonic() + 40
    while orphans() and time.monotonic() < end:
        time.sleep(0.1)
    assert orphans() == []


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_uses_the_servers_that_another_command_serves(folder, tmp_path):
    log = tmp_path / "log.txt"
    flags = local_flags(2)
    serve = [
        *(sys.executable, "-m", "codjax", "serve", f"--config={TINY}", *flags),
        *(f"--workdir={tmp_path / 'served'}", f"--model={folder}"),
    ]
    with (
        log.open("a") as output,
        subprocess.Popen(serve, stdout=output, stderr=output, cwd=TESTS.parent) as serving,
    ):
        try:
            wait_for(lambda: "2 servers are ready: http" in log.read_text(), serving, log)
            urls = re.findall(r"http://[0-9.]+:\d+", log.read_text().split("are ready: ")[1])
            trained = tmp_path / "trained"
            process = start(trained, *flags, f"--config.server.urls={tuple(urls)}", log=log)
            assert process.wait(timeout=200) == 0, log.read_text()
            assert len(servers()) == 2  # they are not the run's to end
        finally:
            serving.send_signal(signal.SIGTERM)
        assert serving.wait(timeout=30) == 0, log.read_text()
    assert orphans() == []
    assert [row["rollout/dropped_runs"] for row in rows(trained)] == [0] * 5


def test_a_local_server_that_does_not_start_is_one_line_with_its_last_words(tmp_path, capsys):
    changes = QUICK | {
        "rollout.sampler": "sglang",
        "server.local.num": 1,
        "server.local.command": (
            sys.executable,
            "-c",
            "print('no such device'); raise SystemExit(3)",
        ),
        "server.local.first_port": free_port(),
    }
    flags = [f"--config.{key}={value}" for key, value in changes.items()]
    status = cli.main(
        [
            "train",
            f"--config={TINY}",
            "--config.warmup.num_steps=0",
            f"--workdir={tmp_path}",
            *flags,
        ]
    )
    error = capsys.readouterr().err
    assert status == 1
    assert re.fullmatch(r"codjax train: http://\S+ ended .*no such device\.?\n", error), error


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("max_staleness", [0, 3])
def test_sigterm_does_not_wait_for_a_rollout(folder, tmp_path, max_staleness):
    """The step that is being sampled is begun again by the same command."""
    log, workdir = tmp_path / "log.txt", tmp_path / "run"
    with contextlib.closing(Held(folder)) as held:
        flags = [f"--config.{key}={value}" for key, value in QUICK.items()]
        flags += [
            "--config.rollout.sampler=sglang",
            f"--config.server.urls=('{held.url}',)",
            f"--config.rollout.max_staleness={max_staleness}",
            f"--config.rollout.in_flight_updates={max_staleness > 0}",
            *("--config.num_steps=12", "--config.checkpoint.every_steps=100"),
        ]
        process = start(workdir, *flags, log=log)
        wait_for(lambda: len(rows(workdir)) >= 4, process, log)
        held.change(hold_after=1)
        time.sleep(2)  # everything that was sampled is trained on
        num_steps = len(rows(workdir))
        told_at = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0, log.read_text()
        assert time.monotonic() - told_at < 20
        assert f"stopped after step {num_steps}, as asked" in log.read_text()
        assert (workdir / "checkpoints" / str(num_steps)).is_dir()
        held.change(hold_after=None)
        assert start(workdir, *flags, log=log).wait(timeout=200) == 0, log.read_text()
    found = rows(workdir)
    assert [row["step"] for row in found] == list(range(1, 13))
    assert len({row["rollout/step"] for row in found}) == 12


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ctrl_c_ends_in_good_order_and_twice_at_once(tmp_path):
    log, workdir = tmp_path / "log.txt", tmp_path / "run"
    flags = [*local_flags(1), "--config.num_steps=1000"]
    process = start(workdir, *flags, log=log)
    wait_for(lambda: len(rows(workdir)) >= 2, process, log)
    process.send_signal(signal.SIGINT)
    # Requests are ended, then servers, each within its limit: 30 + 60 + 20 s in all.
    assert process.wait(timeout=150) == 130
    assert "interrupted; the same command goes on" in log.read_text()
    assert orphans() == []
    process = start(workdir, *flags, log=log)
    wait_for(lambda: log.read_text().count("Resuming") == 1, process, log)
    wait_for(lambda: log.read_text().count("are ready") == 2, process, log)
    for server in servers():
        server.suspend()  # so that it ignores SIGTERM, and the good order takes its time
    process.send_signal(signal.SIGINT)
    time.sleep(1.0)
    assert process.poll() is None
    told_at = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert time.monotonic() - told_at < 2
    end = time.monotonic() + 60
    while orphans() and time.monotonic() < end:
        time.sleep(0.1)
    assert orphans() == []


def test_a_run_that_gets_no_answer_at_all_ends_with_what_was_said(server, tmp_path):
    """Otherwise it would go through its tasks, step by step, and learn nothing."""
    server._made.faults = [None, *[Fault.STATUS_400] * 4]  # after the probe
    config = served(server, num_steps=3)
    with pytest.raises(SamplerError, match=r"all 4 runs of rollout step 0 failed; the last: http:"):
        train.main(config, str(tmp_path))
    assert rows(tmp_path) == []
