"""The launch scripts: what they would run, word by word, and the loops and quotes really run."""

import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / "scripts" / "launch"
TRAIN = ["--config=configs/mine.py", "--workdir=/runs/mine", "--config.x=it's 2"]
MODULE = [".venv/bin/python", "-m", "codjax", "train"]
TPU = ["--name=cod", "--zone=us-west4-a"]


def script(name, *args, **variables):
    return subprocess.run(
        ["bash", str(LAUNCH / name), *args],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "HOME": "/nowhere", **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def printed(name, *args, **variables):
    """The commands that the script prints, each as the list of its words."""
    done = script(name, *args, "--print", **variables)
    assert (done.returncode, done.stderr) == (0, "")
    return [shlex.split(line) for line in done.stdout.splitlines()]


# What would be run.


def test_local():
    found = printed("local.sh", "-n", "2", "--devices=4", "--port=9000", *TRAIN)
    assert found == [
        [
            "env",
            "JAX_PLATFORMS=cpu",
            "XLA_FLAGS=--xla_force_host_platform_device_count=4"
            " --xla_cpu_enable_concurrency_optimized_scheduler=false",
            "CODJAX_COORDINATOR=127.0.0.1:9000",
            "CODJAX_NUM_PROCESSES=2",
            f"CODJAX_PROCESS_ID={index}",
            *MODULE,
            *TRAIN,
        ]
        for index in range(2)
    ]


def test_ssh():
    found = printed("ssh.sh", "--hosts=me@one,two", "--dir=/my files/codjax", *TRAIN)
    for index, words in enumerate(found):
        host = ("me@one", "two")[index]
        assert words[:-1] == ["ssh", "-o", "BatchMode=yes", "-o", "ServerAliveInterval=15", host]
        assert shlex.split(words[-1]) == (
            [
                "cd",
                "/my files/codjax",
                "&&",
                "echo",
                "$$",
                ">",
                f"/tmp/codjax-8476-{index}.pid",
                "&&",
                "exec",
                "env",
                "CODJAX_COORDINATOR=one:8476",
                "CODJAX_NUM_PROCESSES=2",
                f"CODJAX_PROCESS_ID={index}",
                *MODULE,
                *TRAIN,
            ]
        )
    assert len(found) == 2


def test_slurm():
    (found,) = printed("slurm.sh", "--nodes=4", "--sbatch=--partition=gpu", *TRAIN)
    assert found == [
        *["sbatch", "--job-name=codjax", "--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8"],
        *["--time=24:00:00", "--requeue", "--open-mode=append", "--signal=TERM@600"],
        *["--output=codjax-%j.log", "--partition=gpu", "scripts/launch/train.sbatch", *TRAIN],
    ]
    assert (ROOT / "scripts/launch/train.sbatch").read_text().startswith("#!")  # sbatch insists


def ssh_to(node, command, worker="all"):
    return [
        *["gcloud", "compute", "tpus", "tpu-vm", "ssh", node, "--zone=us-west4-a"],
        *[f"--worker={worker}", f"--command={command}"],
    ]


def test_tpu_pod_of_one_slice():
    (found,) = printed("tpu_pod.sh", "create", *TPU, "--type=v5litepod-256")
    assert found[4:] == [
        *["create", "cod", "--zone=us-west4-a", "--accelerator-type=v5litepod-256"],
        "--version=v2-alpha-tpuv5-lite",
    ]
    archive, copy, install = printed("tpu_pod.sh", "setup", *TPU)
    assert archive[:2] == ["git", "archive"]
    assert copy[4:7] == ["scp", archive[3].removeprefix("--output="), "cod:codjax.tar.gz"]
    assert install[-1].endswith("&& cd codjax && . scripts/install.sh && install_codjax tpu")
    (train,) = printed("tpu_pod.sh", "train", *TPU, *TRAIN)
    assert train[:-1] == ssh_to("cod", "")[:-1]
    words = shlex.split(train[-1].removeprefix("--command="))
    command = ["nohup", "bash", "scripts/launch/restart.sh", *MODULE, "--distributed=true", *TRAIN]
    assert words[: 4 + len(command)] == ["cd", "codjax", "&&", "{", *command]
    stop = 'kill -TERM "$(cat codjax.pid)"'
    assert printed("tpu_pod.sh", "stop", *TPU) == [ssh_to("cod", stop)]
    logs = ssh_to("cod", "tail -n 50 -f codjax.log", worker=0)
    assert printed("tpu_pod.sh", "logs", *TPU) == [logs]
    (delete,) = printed("tpu_pod.sh", "delete", *TPU)
    assert delete[3:] == ["tpu-vm", "delete", "cod", "--zone=us-west4-a", "--quiet"]


def test_tpu_pod_of_two_slices():
    (found,) = printed("tpu_pod.sh", "create", *TPU, "--slices=2", "--type=v6e-256", "--spot")
    assert found[3:] == [
        *["queued-resources", "create", "cod", "--zone=us-west4-a", "--accelerator-type=v6e-256"],
        *["--runtime-version=v2-alpha-tpuv6e", "--node-count=2", "--node-prefix=cod", "--spot"],
    ]
    started = printed("tpu_pod.sh", "train", *TPU, "--slices=2", *TRAIN)
    assert [words[5] for words in started] == ["cod-0", "cod-1"]
    (delete,) = printed("tpu_pod.sh", "delete", *TPU, "--slices=2")
    assert delete[3:] == [
        *["queued-resources", "delete", "cod", "--zone=us-west4-a", "--force", "--quiet"]
    ]


GKE = ["--name=cod", "--image=registry/codjax:1"]
SLICES = ["--accelerator=tpu-v5p-slice", "--topology=4x4x4", "--hosts=16", "--slices=2"]


def test_gke():
    yaml = pytest.importorskip("yaml")
    done = script("gke.sh", *GKE, *SLICES, "--claim=runs", *TRAIN, "--print", PYTHON=sys.executable)
    first, text = done.stdout.split("\n", 1)
    assert (first, done.stderr) == ("kubectl apply -f - <<'YAML'", "")
    job = yaml.safe_load(text.removesuffix("YAML\n"))
    assert (job["kind"], job["metadata"]["name"]) == ("JobSet", "cod")
    assert job["spec"]["failurePolicy"]["maxRestarts"] == 1000
    (replicated,) = job["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"]
    assert (replicated["replicas"], spec["parallelism"], spec["completions"]) == (2, 16, 16)
    (final,) = spec["podFailurePolicy"]["rules"]
    assert (final["action"], final["onExitCodes"]["values"]) == ("FailJob", [2])
    pod = spec["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
    }
    (container,) = pod["containers"]
    assert container["command"] == (
        ["python", "-m", "codjax", "train", "--distributed=true", *TRAIN]
    )
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "runs"}


def test_xpk():
    (found,) = printed("gke.sh", *GKE, "--xpk=cluster", "--tpu-type=v5p-128", *TRAIN)
    assert found[:-1] == [
        *["xpk", "workload", "create", "--cluster=cluster", "--workload=cod"],
        *["--tpu-type=v5p-128", "--num-slices=1", "--docker-image=registry/codjax:1"],
        "--max-restarts=1000",
    ]
    command = shlex.split(found[-1].removeprefix("--command="))
    assert command == ["python", "-m", "codjax", "train", "--distributed=true", *TRAIN]


def test_a_template_and_its_values_must_agree(tmp_path):
    (tmp_path / "t").write_text("$NAME $COMMAND $HOSTS")
    command = [sys.executable, str(LAUNCH / "render.py"), str(tmp_path / "t")]
    done = subprocess.run(
        [*command, "NAME=a b", "HOSTS=2", "--", "x y"], capture_output=True, text=True, check=True
    )
    assert done.stdout == '"a b" ["x y"] 2'
    done = subprocess.run(
        [*command, "NAME=a", "--", "x"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "only in the template or only given: ['HOSTS']" in done.stderr


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["local.sh", "-n", "two"], "local.sh: -n must be a whole number, at least 1; got 'two'."),
        (["ssh.sh", "--dir=/x"], "ssh.sh: --hosts must be given; --help tells the flags."),
        (["slurm.sh"], "slurm.sh: flags of codjax train must be given: --config=… --workdir=…"),
        (["tpu_pod.sh", "start", *TPU], "create, setup, train, logs, stop or delete; got 'start'."),
        (["tpu_pod.sh", "create", *TPU, "--tpye=x"], "unknown flag --tpye=x;"),
        (["tpu_pod.sh", "create", *TPU, "--type=v4-8"], "--version must be given for --type=v4-8."),
        (["gke.sh", *GKE, *TRAIN], "gke.sh: --accelerator must be given;"),
        (["restart.sh", "--tires=3", "true"], "restart.sh: unknown flag --tires=3;"),
    ],
)
def test_bad_usage_is_one_line_and_status_2(command, message):
    done = script(*command)
    assert done.returncode == 2
    assert message in done.stderr
    assert (done.stdout, done.stderr.count("\n")) == ("", 1)


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.sh")), ids=lambda path: path.name)
def test_every_script_is_strict_and_has_help(path):
    if path.name == "common.sh":
        return
    assert "\nset -euo pipefail\n" in path.read_text()
    done = script(path.name, "--help")
    assert done.returncode == 0
    assert f"scripts/launch/{path.name}" in done.stdout
    assert "--print " in done.stdout


# What is really run.


def counting(folder, statuses):
    """A command that ends with one status after the other, and says how often it was started."""
    program = folder / "program.sh"
    program.write_text(
        f"echo start >> {folder}/starts\n"
        f"set -- {' '.join(map(str, statuses))}\n"
        f'shift "$(($(wc -l < {folder}/starts) - 1))"\nexit "$1"\n'
    )
    return ["bash", str(program)]


@pytest.mark.parametrize(
    ("flags", "statuses", "num_starts", "status"),
    [
        ([], [0], 1, 0),  # done
        ([], [2], 1, 2),  # a mistake in the config
        ([], [1, 143, 0], 3, 0),  # a failure, then another host's preemption, then done
        (["--final=143"], [1, 143], 2, 143),  # for who has other plans
        (["--tries=2"], [1, 134, 0], 2, 134),  # enough
    ],
)
def test_the_loop_that_starts_again(tmp_path, flags, statuses, num_starts, status):
    sleeps = tmp_path / "sleep"  # in place of the real one: what it was asked for
    sleeps.write_text(f"#!/bin/sh\necho $1 >> {tmp_path}/slept\n")
    sleeps.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = script("restart.sh", *flags, *counting(tmp_path, statuses), PATH=path)
    assert done.returncode == status
    assert (tmp_path / "starts").read_text().count("start") == num_starts
    slept = tmp_path / "slept"
    pauses = [int(line) for line in slept.read_text().split()] if slept.exists() else []
    assert pauses == [5, 10][: num_starts - 1]


def test_sigterm_reaches_the_command_and_ends_the_loop(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        f"pathlib.Path({str(tmp_path / 'ready')!r}).touch()\n"
        "time.sleep(60)\n"
    )
    loop = subprocess.Popen(
        ["bash", str(LAUNCH / "restart.sh"), sys.executable, str(program)], stderr=subprocess.PIPE
    )
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    loop.send_signal(signal.SIGTERM)
    _, errors = loop.communicate(timeout=20)
    assert (loop.returncode, errors) == (143, b"")


def test_ssh_says_over_there_what_was_said_here(tmp_path):
    """`ssh` is a shell here, as it is over there: it gets one line to read."""
    (tmp_path / "ssh").write_text('#!/bin/bash\nexec bash -c "${@:6}"\n')
    report = "import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ)]))"
    (tmp_path / "python").write_text(f"#!{sys.executable}\n{report}\n")
    for name in ("ssh", "python"):
        (tmp_path / name).chmod(0o755)
    folder = tmp_path / "my $(folder)"
    folder.mkdir()
    path = f"{tmp_path}:{os.environ['PATH']}"
    flags = ["--hosts=one,two", f"--dir={folder}", "--port=47311", "--config.x=it's $HOME"]
    done = script("ssh.sh", *flags, PATH=path, PYTHON=str(tmp_path / "python"))
    assert (done.returncode, done.stderr) == (0, "")
    for index, host in enumerate(("one", "two")):
        (line,) = [x for x in done.stdout.splitlines() if x.startswith(f"[{host}] ")]
        arguments, environment = json.loads(line.removeprefix(f"[{host}] "))
        assert arguments == ["-m", "codjax", "train", "--config.x=it's $HOME"]
        assert environment["PWD"] == str(folder)
        assert environment["CODJAX_COORDINATOR"] == "one:47311"
        assert environment["CODJAX_PROCESS_ID"] == str(index)
        pathlib.Path(f"/tmp/codjax-47311-{index}.pid").unlink()


def test_the_job_of_slurm_is_queued_again_only_after_it_was_stopped(tmp_path):
    for name, body in {
        "srun": f'echo "$@" >> {tmp_path}/calls; exit "$SRUN_STATUS"',
        "scontrol": f'echo scontrol "$@" >> {tmp_path}/calls',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    for status, ending in ((0, []), (2, []), (143, ["scontrol requeue 17"])):
        done = script(
            *["train.sbatch", *TRAIN], PATH=path, SLURM_JOB_ID="17", SRUN_STATUS=str(status)
        )
        assert (done.returncode, done.stderr) == (status, "")
        first, *rest = (tmp_path / "calls").read_text().splitlines()
        assert first.endswith("-m codjax train --distributed=true " + " ".join(TRAIN))
        assert rest == ending
        (tmp_path / "calls").unlink()
