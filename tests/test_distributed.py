"""Several processes that train as one: the same numbers, one stop, one end.

The processes are real, on this machine's loopback, started by `scripts/launch/local.sh`.
"""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from codjax import (
    checkpoints,
    checks,
    config_files,
    distributed,
    evaluate,
    metrics,
    sharding,
    train,
)

TESTS = pathlib.Path(__file__).parent
TINY = TESTS / "tiny.py"
LOCAL = TESTS.parent / "scripts" / "launch" / "local.sh"
RESTART = LOCAL.with_name("restart.sh")


def tiny(**changes):
    config = config_files.load(str(TINY))
    config.update_from_flattened_dict(changes)
    return config


def rows(workdir):
    path = workdir / metrics.METRICS_FILE
    return metrics.read_metrics(path) if path.exists() else []


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(workdir, *flags, num=2, devices=1, before=()):
    """Processes that train in the workdir, and the file that they write to."""
    command = [
        *before,
        *("bash", str(LOCAL), "-n", str(num), f"--devices={devices}", f"--port={free_port()}"),
        *(f"--config={TINY}", f"--workdir={workdir}", *flags),
    ]
    log = workdir.with_suffix(".log")
    with log.open("a") as output:
        process = subprocess.Popen(
            command,
            cwd=TESTS.parent,
            stdout=output,
            stderr=output,
            env=os.environ | {"PYTHON": sys.executable},
        )
    return process, log


def pid_of(index, workdir):
    """The process with this index that trains in the workdir."""
    for folder in pathlib.Path("/proc").iterdir():
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # not a process, not ours, or gone
            continue
        is_training = f"--workdir={workdir}".encode() in words and b"bash" not in words
        if is_training and f"CODJAX_PROCESS_ID={index}".encode() in environment:
            return int(folder.name)
    raise AssertionError(f"process {index} is not running")


def wait_for(condition, process, log, *, limit_s=240):
    end = time.monotonic() + limit_s
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.01)


def from_step(workdir, copy, step):
    """A copy of a workdir with no checkpoint after this step."""
    shutil.copytree(workdir, copy)
    for folder in (copy / "checkpoints").iterdir():
        if int(folder.name) > step:
            shutil.rmtree(folder)
    return copy


def assert_same_numbers(found, expected):
    """Everything that was sampled is the same; sums over devices run in another order.

    Adam turns a gradient's last bits into a different step only where the gradient is tiny, so
    that a few steps later losses still agree to 1e-5.
    """
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    sampled = ("reward/", "raw_reward/", "turns/", "rollout/", "hint/", "credit/", "batching/")
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            if key.startswith((*sampled, "success/", "staleness/")):
                assert one[key] == other[key], (one["step"], key)
            elif key == "loss/log_ratio_abs_max":  # of the worst entry, and near 0
                assert one[key] == pytest.approx(other[key], abs=1e-4), one["step"]
            elif key.startswith("loss/"):
                assert one[key] == pytest.approx(other[key], abs=1e-5), (one["step"], key)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The workdir of a step in this process alone, on its eight devices."""
    workdir = tmp_path_factory.mktemp("whole")
    train.main(tiny(num_steps=1), str(workdir))
    return workdir


def test_two_processes_stop_as_one_and_one_process_goes_on(whole, tmp_path):
    """Two go on from what one wrote, on another mesh; SIGTERM to one of them; one goes on."""
    two = from_step(whole, tmp_path / "two", 0)
    process, log = start(two, "--config.num_steps=100000", "--config.checkpoint.every_steps=100000")
    wait_for(lambda: "train: step " in log.read_text(), process, log)
    wait_for(lambda: len(rows(two)) >= 3, process, log)
    os.kill(pid_of(1, two), signal.SIGTERM)
    assert process.wait(timeout=60) == 0, log.read_text()

    last = len(rows(two))
    for index in range(2):
        line = rf"^\[{index}\] codjax train: stopped after step {last}, as asked, with a checkpoint"
        assert re.search(line, log.read_text(), re.MULTILINE), log.read_text()
    steps = sorted(int(folder.name) for folder in (two / "checkpoints").iterdir())
    assert steps == [0, last]
    assert list((two / "trajectories").iterdir())

    for workdir in (two, whole):
        train.main(tiny(num_steps=last + 1), str(workdir))
    assert_same_numbers(rows(two), rows(whole))
    # The test would show little if nothing were learned.
    assert min(row["optimizer/grad_norm"] for row in rows(whole)) > 0


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("max_staleness", [0, 1])
def test_four_processes_from_the_first_step_to_the_last(tmp_path, max_staleness):
    """With two packs a step, two of them have nothing to sample; fsdp goes across processes."""
    changes = {"rollout.max_staleness": max_staleness, "mesh.fsdp": 4, "num_steps": 3}
    # At its learning rate, 200 steps of warm-up alone would make 1e-5 of the last bits.
    changes["warmup.num_steps"] = 50
    train.main(tiny(**changes), str(tmp_path / "one"))
    flags = [f"--config.{key}={value}" for key, value in changes.items()]
    process, log = start(tmp_path / "four", *flags, num=4, devices=2)
    assert process.wait(timeout=600) == 0, log.read_text()
    assert_same_numbers(rows(tmp_path / "four"), rows(tmp_path / "one"))
    for name in ("trajectories/step_000002.jsonl", "config.json"):
        assert (tmp_path / "four" / name).exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_asynchronous_processes_train_on_the_same_steps(whole, tmp_path):
    """Each samples as fast as it can; SIGTERM to one of them; one process goes on alone."""
    two = tmp_path / "two"
    flags = ("--config.rollout.max_staleness=3", "--config.rollout.in_flight_updates=True")
    flags += ("--config.warmup.num_steps=20", "--config.checkpoint.every_steps=7")
    process, log = start(two, *flags, "--config.num_steps=100000")
    wait_for(lambda: len(rows(two)) >= 30, process, log)
    os.kill(pid_of(1, two), signal.SIGTERM)
    assert process.wait(timeout=120) == 0, log.read_text()
    last = len(rows(two))

    store = checkpoints.Checkpoints(two, keep=1, read_only=True)
    run = train._Run.of(
        tiny(**{"rollout.max_staleness": 3, "rollout.in_flight_updates": True}), two
    )
    _, loop = store.restore(last, run.learner.abstract_state())
    store.close()
    for item in loop["items"]:  # the packs of both, in order
        assert len(item["groups"]) == 2

    process, log = start(two, *flags, f"--config.num_steps={last + 20}", num=1, devices=2)
    assert process.wait(timeout=300) == 0, log.read_text()
    found = rows(two)
    assert [row["step"] for row in found] == list(range(1, last + 21))
    assert all(row["rollout/num_runs"] == 4 for row in found)  # of both processes
    assert len({row["rollout/step"] for row in found}) == len(found)
    waiting = {item["step"] for item in loop["items"]} | set(loop["unfinished"])
    assert waiting
    num_dropped = sum(row["staleness/dropped_steps"] for row in found[last:])
    assert len(waiting - {row["rollout/step"] for row in found[last:]}) <= num_dropped


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_process_ends_all_and_the_loop_starts_them_again(whole, tmp_path):
    two = from_step(whole, tmp_path / "two", 0)
    flags = ("--config.num_steps=300", "--config.checkpoint.every_steps=2")
    loop = ("bash", str(RESTART), "--pause=1", "--tries=2")
    process, log = start(two, *flags, before=loop)
    wait_for(lambda: "train: step " in log.read_text(), process, log)
    wait_for(lambda: len(rows(two)) >= 3, process, log)
    os.kill(pid_of(1, two), signal.SIGKILL)
    killed_at = time.monotonic()
    wait_for(lambda: "again in 1 s" in log.read_text(), process, log)
    # Seven seconds where gloo sees the closed connection; where it does not, the heartbeat's.
    assert time.monotonic() - killed_at < distributed.HEARTBEAT_S + 20
    assert process.wait(timeout=600) == 0, log.read_text()
    assert [row["step"] for row in rows(two)] == list(range(1, 301))
    assert log.read_text().count("Resuming") == 2


def run_each(*commands, folders=None):
    """(status, stderr) of processes that are one run, each with its own flags and folder."""
    port = free_port()
    paths = [str(path) for path in (TESTS.parent, TESTS.parent / "kernels")]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "codjax", *command],
            cwd=folders[index] if folders else None,
            env=os.environ
            | {
                "PYTHONPATH": os.pathsep.join(paths),
                "CODJAX_COORDINATOR": f"127.0.0.1:{port}",
                "CODJAX_NUM_PROCESSES": str(len(commands)),
                "CODJAX_PROCESS_ID": str(index),
                "XLA_FLAGS": "--xla_force_host_platform_device_count=2"
                " --xla_cpu_enable_concurrency_optimized_scheduler=false",
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, command in enumerate(commands)
    ]
    try:
        errors = [process.communicate(timeout=500)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return [(process.returncode, text) for process, text in zip(processes, errors, strict=True)]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("command", "first", "second", "what"),
    [
        ("train", "--config.seed=0", "--config.seed=1", "the config"),
        ("train", "--workdir=one", "--workdir=two", "--workdir"),
        ("eval", "--checkpoint=0", "--checkpoint=1", "--checkpoint"),
    ],
)
def test_processes_that_were_told_different_things_say_so_and_end(
    command, first, second, what, tmp_path
):
    flags = (command, f"--config={TINY}", "--workdir=one")
    for status, errors in run_each((*flags, first), (*flags, second), folders=[tmp_path] * 2):
        assert status == 2, errors
        assert f"{what} must be the same on all processes; on process 1 it is not" in errors
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("wrong", [0, 1])
@pytest.mark.parametrize("flag", ["--config.num_steps=-1", "--config.num_stebs=1"])
def test_a_mistake_of_one_process_is_told_to_all(flag, wrong, tmp_path):
    """Before it has joined the others, which would wait for it, and start again, for hours."""
    commands = [["train", f"--config={TINY}", "--workdir=one"] for _ in range(2)]
    commands[wrong].append(flag)
    found = run_each(*commands, folders=[tmp_path] * 2)
    assert [status for status, _ in found] == [2, 2], found
    assert found[wrong][1].count("codjax train: ") == 1, found
    assert f"codjax train: on process {wrong}, " in found[1 - wrong][1]
    assert "num_ste" in found[1 - wrong][1]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("command", ["train", "eval"])
def test_processes_without_a_common_folder_say_so_and_end(command, tmp_path):
    (tmp_path / "here" / "one").mkdir(parents=True)
    (tmp_path / "there").mkdir()
    flags = (command, f"--config={TINY}", "--workdir=one")
    folders = [tmp_path / name for name in ("here", "there")]
    for status, errors in run_each(flags, flags, folders=folders):
        assert status == 2, errors
        assert "must be one folder that all processes see" in errors
        assert "process 1 sees another one" in errors
    assert not list((tmp_path / "there").iterdir())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_evaluate_as_one(whole, tmp_path):
    reports = []
    for name, num in (("one", 1), ("two", 2)):
        workdir = shutil.copytree(whole, tmp_path / name)
        flags = ("eval", f"--config={TINY}", f"--workdir={workdir}", "--checkpoint=0")
        assert [status for status, _ in run_each(*[flags] * num)] == [0] * num
        reports.append(json.loads((workdir / "eval.json").read_text()))
    assert reports[0] == reports[1]


# The parts, in one process.


def test_who_the_others_are():
    names = dict(zip(distributed.VARIABLES, ("host:8476", "4", "3"), strict=True))
    assert distributed._explicit(names) == {
        "coordinator_address": "host:8476",
        "num_processes": 4,
        "process_id": 3,
    }
    assert distributed._explicit({"PATH": "/bin"}) is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("host:1", "4", ""), r"CODJAX_PROCESS_ID must be set too"),
        (("host:1", "", ""), r"CODJAX_NUM_PROCESSES and CODJAX_PROCESS_ID must be set too"),
        (("host", "4", "3"), r"host:port of process 0; got 'host'"),
        (("host:1", "4", "4"), r"from 0 to CODJAX_NUM_PROCESSES - 1; got '4' of '4'"),
        (("host:1", "four", "0"), r"got '0' of 'four'"),
        (("host:1", "²", "0"), r"got '0' of '²'"),
        (("host:²", "4", "0"), r"host:port of process 0; got 'host:²'"),
    ],
)
def test_variables_that_cannot_be_right(values, message):
    with pytest.raises(checks.ConfigError, match=message):
        distributed._explicit(dict(zip(distributed.VARIABLES, values, strict=True)))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SLURM_STEP_NUM_TASKS", "4"),  # srun codjax train
        ("OMPI_COMM_WORLD_SIZE", "4"),  # mpirun codjax train
        ("TPU_WORKER_HOSTNAMES", "one,two"),  # GKE
    ],
)
def test_one_of_several_must_be_told_so(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    message = rf"--distributed=true must be given: {name}={value} says.*env -u {name}"
    with pytest.raises(checks.ConfigError, match=message):
        distributed.initialize(autodetect=False)
    with pytest.raises(checks.ConfigError, match=message):
        distributed.check_joined()


def test_one_process_in_a_job_of_several_is_alone(monkeypatch):
    """`codjax train` in the script of a SLURM job, on a host of TPUs, under `mpirun -n 1`."""
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "1")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    distributed.initialize(autodetect=False)
    distributed.check_joined()


@pytest.mark.parametrize("num_items", [0, 1, 2, 7])
def test_shares_together_are_the_whole(num_items, monkeypatch):
    items, parts = list(range(num_items)), []
    monkeypatch.setattr(distributed, "num_processes", lambda: 3)
    for index in range(3):
        monkeypatch.setattr(distributed, "process_index", lambda index=index: index)
        parts.append(distributed.share(items))
    assert distributed.merge(parts) == items


def test_alone_nothing_is_sent(tmp_path):
    assert distributed.gather({"a": 1}) == [{"a": 1}]
    assert distributed.on_main(lambda: 3) == 3
    assert distributed.on_all(lambda: 3) == 3
    distributed.check_equal("x", "the config")
    distributed.check_shared(tmp_path / "not there")
    distributed.check_joined()
    distributed.leave(1)  # returns


def test_a_mistake_of_one_is_raised_by_all(monkeypatch):
    def fail():
        raise checks.ConfigError("no such tokenizer")

    told = []
    monkeypatch.setattr(distributed, "gather", lambda value: told.append(value) or [None, value])
    with pytest.raises(checks.ConfigError, match=r"^no such tokenizer$"):
        distributed.on_all(fail)
    assert told == ["no such tokenizer"]
    monkeypatch.setattr(distributed, "gather", lambda value: [value, "no such tokenizer"])
    with pytest.raises(checks.ConfigError, match=r"^on process 1, no such tokenizer$"):
        distributed.on_all(lambda: 3)


def test_the_first_process_decides_what_is_restored(whole, tmp_path, monkeypatch):
    """Another may see an older list of the same folder, as on NFS."""

    def step_0(function):
        """`on_main` where process 0 sees step 0 alone."""
        return {int: 0, list: [0]}.get(type(found := function()), found)

    workdir, config = shutil.copytree(whole, tmp_path / "run"), tiny(num_steps=1)
    run = train._Run.of(config, tmp_path)
    monkeypatch.setattr(distributed, "on_main", step_0)
    store = checkpoints.Checkpoints(workdir, keep=1)
    assert store.latest_step() > 0
    assert train._begin(run, store, workdir)[1]["step"] == 0
    store.close()
    assert evaluate.main(config, "latest", str(workdir))["checkpoint"] == "step 0"


def test_the_samplers_weights_outlive_the_learners():
    mesh = sharding.make_mesh(data=2, fsdp=4, tensor=1)
    rows = {"w": jax.sharding.NamedSharding(mesh, sharding.spec(("embed",)))}
    placed = sharding.put({"w": np.arange(8.0)}, rows)
    copy = distributed.local_weights(placed)
    placed["w"].delete()
    assert copy["w"].tolist() == list(range(8))
    # As with several processes: every device gets the whole.
    placed = sharding.put({"w": np.arange(8.0)}, rows)
    everywhere = distributed._everywhere(mesh)(placed)["w"]
    assert [s.data.tolist() for s in everywhere.addressable_shards] == [list(range(8))] * 8


def test_the_first_sigterm_asks_and_the_second_ends():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("ended"))
    try:
        with distributed.StopRequest() as stop:
            assert not stop.is_asked()
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.is_asked()
            assert heard == []
            os.kill(os.getpid(), signal.SIGTERM)
            assert heard == ["ended"]
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == ["ended"] * 2
    finally:
        signal.signal(signal.SIGTERM, before)
