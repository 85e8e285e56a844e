"""The launch scripts: what they would run, word by word, and the loops and quotes really run."""

import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / "scripts" / "launch"
TRAIN = ["--config=configs/mine.py", "--workdir=/runs/mine", "--config.x=it's 2 $(HOME)"]
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
                "CODJAX_STOP_STATUS=0",
                *MODULE,
                *TRAIN,
            ]
        )
    assert len(found) == 2


def test_sglang():
    flags = ["--config=configs/mine.py", "--workdir=/runs/servers"]
    where = ["--num=4", "--gpus=2", "--venv=/my sglang", "--model=/models/Qwen3-8B"]
    make, install, serve = printed("sglang.sh", *where, *flags, PYTHON="python3.12")
    assert make == ["python3.12", "-m", "venv", "/my sglang"]
    assert install == ["/my sglang/bin/python", "-m", "pip", "install", "sglang==0.5.23"]
    assert serve == [
        *[".venv/bin/python", "-m", "codjax", "serve", "--model=/models/Qwen3-8B"],
        *["--config.server.local.num=4", "--config.server.local.gpus_per_server=2"],
        "--config.server.local.host=0.0.0.0",
        "--config.server.local.command=('/my sglang/bin/python', '-m', 'sglang.launch_server')",
        *flags,
    ]


def test_sglang_serves_what_is_installed(tmp_path):
    """Nothing is installed twice, and SIGTERM reaches codjax serve itself."""
    for name, does in [
        ("venv", 'echo "serve $@"'),
        ("sglang", "cat > /dev/null; [[ $2 == 1.2.3 ]]"),
    ]:
        python = tmp_path / name / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f"#!/bin/bash\n{does}\n")
        python.chmod(0o755)
    (tmp_path / "install.sh").write_text(f"VENV={tmp_path}/venv; install_codjax() {{ :; }}\n")
    (tmp_path / "launch").mkdir()
    for name in ("sglang.sh", "common.sh"):
        (tmp_path / "launch" / name).write_text((LAUNCH / name).read_text())
    done = subprocess.run(
        [
            *["bash", tmp_path / "launch" / "sglang.sh", "--model=/models/8B", "--sglang=1.2.3"],
            *[f"--venv={tmp_path}/sglang", "--config=configs/mine.py"],
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("serve -m codjax serve --model=/models/8B ")
    assert done.stdout.endswith("--config=configs/mine.py\n")


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
    *_, install = printed("tpu_pod.sh", "setup", *TPU, "--python=/my python3.12")
    assert install[-1].endswith("install.sh && PYTHON='/my python3.12' install_codjax tpu")
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


XPK = ["--xpk=cluster", "--tpu-type=v5p-128"]


def test_gke():
    yaml = pytest.importorskip("yaml")
    done = script("gke.sh", *GKE, *SLICES, "--claim=runs", *TRAIN, "--print", PYTHON=sys.executable)
    first, text = done.stdout.split("\n", 1)
    assert (first, done.stderr) == ("kubectl apply -f - <<'YAML'", "")
    job = yaml.safe_load(text.removesuffix("YAML\n"))
    assert (job["kind"], job["metadata"]["name"]) == ("JobSet", "cod")
    assert job["spec"]["failurePolicy"]["maxRestarts"] == 100
    (replicated,) = job["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"]
    assert (replicated["replicas"], spec["parallelism"], spec["completions"]) == (2, 16, 16)
    (final,) = spec["podFailurePolicy"]["rules"]
    assert (final["action"], final["onExitCodes"]["values"]) == ("FailJob", [2, 3])
    pod = spec["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
    }
    (container,) = pod["containers"]
    # `$(NAME)` would be replaced by Kubernetes, were the `$` not doubled.
    assert [word.replace("$$", "$") for word in container["args"]] == (
        ["python", "-m", "codjax", "train", "--distributed=true", *TRAIN]
    )
    assert container["args"][-1] == "--config.x=it's 2 $$(HOME)"
    # After `args`, not `command`, which would replace it: the entry point that is process 1.
    assert 'ENTRYPOINT ["tini", "--"]' in (LAUNCH / "Dockerfile").read_text()
    assert "command" not in container
    assert container["env"] == [{"name": "CODJAX_STOP_STATUS", "value": "143"}]
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "runs"}


def test_xpk():
    flags = ["--xpk=cluster", "--tpu-type=v5p-128", "--xpk-flag=--zone=us-west4-a"]
    (found,) = printed("gke.sh", *GKE, *flags, *TRAIN)
    assert found[:-1] == [
        *["xpk", "workload", "create", "--cluster=cluster", "--workload=cod"],
        *["--tpu-type=v5p-128", "--num-slices=1", "--docker-image=registry/codjax:1"],
        *["--max-restarts=100", "--restart-on-exit-codes=1"],
        *["--termination-grace-period-seconds=600", "--zone=us-west4-a"],
    ]
    command = shlex.split(found[-1].removeprefix("--command=").replace("$$", "$"))
    assert command == [
        *["exec", "env", "CODJAX_STOP_STATUS=143"],
        *["python", "-m", "codjax", "train", "--distributed=true", *TRAIN],
    ]
    assert "$$(HOME)" in found[-1]


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
        (["sglang.sh", "--config=x"], "sglang.sh: --model must be given; --help tells the flags."),
        (["slurm.sh"], "slurm.sh: flags of codjax train must be given: --config=… --workdir=…"),
        (["tpu_pod.sh", "start", *TPU], "create, setup, train, logs, stop or delete; got 'start'."),
        (["tpu_pod.sh", "create", *TPU, "--tpye=x"], "unknown flag --tpye=x;"),
        (["tpu_pod.sh", "create", *TPU, "--type=v4-8"], "--version must be given for --type=v4-8."),
        (["gke.sh", *GKE, *TRAIN], "gke.sh: --accelerator must be given;"),
        (["gke.sh", *GKE, *XPK, *TRAIN, "--claim=runs"], "--claim is not for xpk"),
        (["gke.sh", *GKE, *XPK, *TRAIN, "--chips=4"], "--chips are not for xpk"),
        (["gke.sh", *GKE, *XPK, *TRAIN, "--zone=z"], "for xpk it must be --xpk-flag=--zone=z."),
        (["gke.sh", *GKE, *TRAIN, "--tpu-type=v5p-8"], "--xpk=CLUSTER must be given too."),
        (["restart.sh", "--tires=3", "true"], "restart.sh: unknown flag --tires=3;"),
    ],
)
def test_bad_usage_is_one_line_and_status_2(command, message):
    done = script(*command)
    assert done.returncode == 2
    assert message in done.stderr
    assert (done.stdout, done.stderr.count("\n")) == ("", 1)


def test_an_old_python_is_told_in_one_line(tmp_path):
    old = tmp_path / "python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.6 || exit 1\n')
    old.chmod(0o755)
    done = script("gke.sh", *GKE, *SLICES, "--claim=runs", *TRAIN, "--print", PYTHON=str(old))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "needs Python 3.11 or newer; found: Python 3.9.6." in done.stderr


@pytest.mark.parametrize(
    "path",
    [*sorted((ROOT / "scripts").rglob("*.sh")), LAUNCH / "train.sbatch"],
    ids=lambda path: path.name,
)
def test_empty_arrays_are_expanded_as_the_bash_of_macos_can(path):
    """Bash 3.2 takes `"${x[@]}"` of an empty array for an unset variable: an error by `set -u`."""
    text = path.read_text()
    filled_later = set(re.findall(r"(\w+)=\(\)", text))
    bare = set(re.findall(r'(?<!\+)"\$\{(\w+)\[@\]\}"', text))
    assert bare & filled_later == set()


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
        ([], [3], 1, 3),  # a metric became nan, as it would again
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


@pytest.mark.parametrize("is_newer", [True, False])
@pytest.mark.parametrize("flag", ["--workdir={}", "--workdir {}", "--elsewhere={}"])
def test_only_a_newer_checkpoint_counts_as_a_success(is_newer, flag, tmp_path):
    """Otherwise a run that fails in its eleventh minute, for a good reason, would for ever."""
    (tmp_path / "sleep").write_text(f"#!/bin/sh\necho $1 >> {tmp_path}/slept\n")
    (tmp_path / "sleep").chmod(0o755)
    command = counting(tmp_path, [1, 1, 1, 0])
    saved = tmp_path / "my run" / "checkpoints"
    (saved / "0").mkdir(parents=True)
    (saved / "99.orbax-checkpoint-tmp").mkdir()
    program = pathlib.Path(command[1])
    name = f"$((9 + $(wc -l < {tmp_path}/starts)))" if is_newer else "0"
    saving = f'\nmkdir -p "{saved}/{name}"\nset --'
    program.write_text(program.read_text().replace("\nset --", saving))
    flags = [word.format(saved.parent) for word in flag.split(" ")]
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = script("restart.sh", "--tries=3", *command, *flags, PATH=path)
    goes_on = is_newer and "workdir" in flag
    assert done.returncode == (0 if goes_on else 1)
    pauses = [int(line) for line in (tmp_path / "slept").read_text().split()]
    assert pauses == ([5, 5, 5] if goes_on else [5, 10])


def test_the_loop_asks_that_a_stop_does_not_look_like_the_end():
    done = script("restart.sh", "bash", "-c", "echo $CODJAX_STOP_STATUS", CODJAX_STOP_STATUS="0")
    assert (done.returncode, done.stdout) == (0, "143\n")


# As from a terminal: pytest may have been started with SIGINT ignored, which children inherit.
TERMINAL = ["env", "--default-signal=INT", "bash"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("passes", [True, False])
def test_sigterm_reaches_the_command_and_ends_the_loop(passes, number, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        f"pathlib.Path({str(tmp_path / 'ready')!r}).touch()\n"
        f"time.sleep({60 if passes else 2})\n"
        "sys.exit(1)\n"
    )
    flags = [] if passes else ["--no-pass"]
    loop = subprocess.Popen(
        [*TERMINAL, str(LAUNCH / "restart.sh"), *flags, sys.executable, str(program)],
        stderr=subprocess.PIPE,
    )
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    loop.send_signal(number)
    _, errors = loop.communicate(timeout=20)
    assert (loop.returncode, errors) == (143 if passes else 1, b"")


@pytest.mark.parametrize("name", ["local.sh", "ssh.sh"])
def test_ctrl_c_leaves_the_processes_their_last_words(name, tmp_path):
    """It goes to the whole group: the scripts, the processes, and what labels their lines."""
    ready, python, ssh = tmp_path / "ready", tmp_path / "python", tmp_path / "ssh"
    python.write_text(
        f"#!{sys.executable}\n"
        "import os, pathlib, signal, sys, time\n"
        "def stop(*_):\n"
        "    time.sleep(0.5)\n"
        "    print('a checkpoint', end='', flush=True)\n"
        "    sys.exit(7)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        f"pathlib.Path({str(ready)!r} + os.environ['CODJAX_PROCESS_ID']).touch()\n"
        "time.sleep(60)\n"
    )
    ssh.write_text('#!/bin/bash\nexec bash -c "${@:6}"\n')
    for program in (python, ssh):
        program.chmod(0o755)
    flags = {
        "local.sh": ["-n", "2", "--port=47312"],
        "ssh.sh": ["--hosts=0,1", f"--dir={tmp_path}", "--port=47312"],
    }
    started = subprocess.Popen(
        [*TERMINAL, str(LAUNCH / name), *flags[name]],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(python)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
    )
    end = time.monotonic() + 20
    while not all(pathlib.Path(f"{ready}{index}").exists() for index in range(2)):
        assert time.monotonic() < end
        time.sleep(0.01)
    os.killpg(started.pid, signal.SIGINT)
    output, _ = started.communicate(timeout=20)
    assert sorted(output.splitlines()) == ["[0] a checkpoint", "[1] a checkpoint"]
    assert started.returncode == 7
    for path in pathlib.Path("/tmp").glob("codjax-47312-*.pid"):
        path.unlink()


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
    for status, ending in ((0, []), (2, []), (3, []), (143, ["scontrol requeue 17"])):
        done = script(
            *["train.sbatch", *TRAIN], PATH=path, SLURM_JOB_ID="17", SRUN_STATUS=str(status)
        )
        assert (done.returncode, done.stderr) == (status, "")
        first, *rest = (tmp_path / "calls").read_text().splitlines()
        assert first.endswith("-m codjax train --distributed=true " + " ".join(TRAIN))
        assert rest == ending
        (tmp_path / "calls").unlink()


def test_the_end_of_a_slurm_job_neither_reaches_srun_nor_queues_the_job_again(tmp_path):
    """srun would answer SIGTERM by killing its tasks; the job's own end is SLURM's business."""
    for name, body in {
        "srun": f"trap 'touch {tmp_path}/killed' TERM; touch {tmp_path}/ready; sleep 1; exit 143",
        "scontrol": f"touch {tmp_path}/requeued",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    job = subprocess.Popen(
        ["bash", str(LAUNCH / "train.sbatch"), *TRAIN],
        cwd=ROOT,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"},
    )
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=20) == 143
    assert not (tmp_path / "killed").exists()
    assert not (tmp_path / "requeued").exists()


@pytest.mark.slow
def test_the_tpu_extra_can_be_installed_with_the_constraints():
    """Asks PyPI, or the index that pip is set to."""
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed"]
    done = subprocess.run(
        [*pip, "-c", "constraints.txt", "-e", ".[tpu]"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (libtpu,) = re.findall(r"^libtpu==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert f" libtpu-{libtpu} " in done.stdout
