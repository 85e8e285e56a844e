"""Server processes: started, watched, started again, ended with all that they started."""

import asyncio
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from codjax.rollout.sglang import pool as pools
from codjax.rollout.sglang import processes

SCRIPT = pathlib.Path(__file__).with_name("child_server.py")


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def settings(folder, *modes, **changes):
    made = {
        "name": "gpu0",
        "command": (sys.executable, str(SCRIPT), "{port}", "{model_folder}", *modes),
        "model_folder": folder,
        "port": free_port(),
        "log_file": folder / "log",
        "gpus": "2,3",
        "ready_timeout_s": 30.0,
        "probe_every_s": 0.2,
        "probe_timeout_s": 0.5,
        "stop_timeout_s": 0.5,
        "max_restarts": 2,
        "backoff_s": 0.05,
    }
    return processes.ProcessSettings(**(made | changes))


def pids_of(folder):
    """The server's, its helper's, and that of a helper which left the process group."""
    return [int(pid) for pid in (folder / "pids").read_text().split()]


def is_alive(pid):
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"  # ended, and nobody asked how


def wait_until(is_so, limit_s=20.0):
    deadline = time.monotonic() + limit_s
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


async def until(is_so, limit_s=20.0):
    async with asyncio.timeout(limit_s):
        while not is_so():
            await asyncio.sleep(0.02)


async def ready(process):
    await process.start()
    await process.wait_ready()


@pytest.mark.parametrize("mode", ["plain", "old", "stubborn"])
def test_a_server_starts_and_stops_with_all_that_it_started(mode, tmp_path):
    process = processes.ServerProcess(settings(tmp_path, mode))

    async def run():
        await ready(process)
        assert await process.is_healthy()
        pids = pids_of(tmp_path)
        assert all(map(is_alive, pids))
        await process.stop()
        return pids

    pids = asyncio.run(run())
    assert not any(map(is_alive, pids))
    assert not process.is_running
    assert (tmp_path / "log").read_text() == f"loading {tmp_path} on GPUs 2,3\n"


def test_a_server_that_ends_instead_says_its_last_words(tmp_path):
    process = processes.ServerProcess(settings(tmp_path, "dies"))
    with pytest.raises(processes.ServerProcessError) as error:
        asyncio.run(ready(process))
    assert str(error.value) == (
        f"gpu0 ended with status 3; see {tmp_path}/log, which ends in: loading {tmp_path} on GPUs "
        "2,3 | out of memory"
    )


def test_keys_are_not_quoted_and_the_log_is_ours_alone(tmp_path):
    process = processes.ServerProcess(settings(tmp_path, "dies", secrets=("memory",)))
    with pytest.raises(processes.ServerProcessError, match=r"out of \*\*\*"):
        asyncio.run(ready(process))
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600


def test_a_program_that_is_not_there_is_told(tmp_path):
    process = processes.ServerProcess(settings(tmp_path, command=("/nowhere/sglang",)))
    with pytest.raises(processes.ServerProcessError, match="/nowhere/sglang"):
        asyncio.run(ready(process))


def test_a_server_that_does_not_get_ready_is_given_a_deadline(tmp_path):
    process = processes.ServerProcess(settings(tmp_path, "deaf", ready_timeout_s=1.0))

    async def run():
        try:
            await ready(process)
        finally:
            await process.stop()

    with pytest.raises(processes.ServerProcessError, match=r"/ready within 1 s of its start; see"):
        asyncio.run(run())
    assert not any(map(is_alive, pids_of(tmp_path)))


def test_a_port_that_another_program_has_is_told(tmp_path):
    """Else its answers would be taken for the new server's."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        process = processes.ServerProcess(settings(tmp_path, port=port))
        with pytest.raises(processes.ServerProcessError, match=f"cannot have port {port}: another"):
            asyncio.run(process.start())
    assert not process.is_running


def watched(one, action, **hooks):
    """Run `action(pool)` while a pool with one server is watched; then stop it."""

    async def run():
        pool = pools.ServerPool([one], **hooks)
        stop = asyncio.Event()
        try:
            await pool.start()
            watching = asyncio.create_task(pool.watch(stop))
            await action(pool)
            stop.set()
            await watching
        finally:
            await pool.stop()
        return pool

    return asyncio.run(run())


def test_a_killed_server_is_started_again_from_the_last_good_weights(tmp_path):
    good = tmp_path / "weights-run-3"
    good.mkdir()
    down, ready_again, last_good = [], asyncio.Event(), {}

    async def on_ready(name):
        ready_again.set()

    async def action(pool):
        before = pids_of(tmp_path)
        last_good["gpu0"] = good
        os.kill(before[0], signal.SIGKILL)
        killed = time.monotonic()
        await until(lambda: down)
        assert time.monotonic() - killed < 1.0
        await ready_again.wait()
        assert not any(map(is_alive, before))  # the memory that they held is free
        assert all(map(is_alive, pids_of(good)))

    pool = watched(
        settings(tmp_path),
        action,
        last_good=last_good,
        on_down=lambda *told: down.append(told),
        on_ready=on_ready,
    )
    assert [name for name, _ in down] == ["gpu0"]
    assert "gpu0 ended with status signal 9; see" in down[0][1]
    assert pool.processes["gpu0"].num_starts == 2
    assert not any(map(is_alive, pids_of(good)))


def test_a_server_that_never_comes_back_is_given_up(tmp_path):
    script = tmp_path / "server.py"
    script.write_text(SCRIPT.read_text())
    one = settings(tmp_path, command=(sys.executable, str(script), "{port}", "{model_folder}"))
    down = []

    async def action(pool):
        script.unlink()
        os.kill(pids_of(tmp_path)[0], signal.SIGKILL)
        await until(lambda: pool.given_up)

    with pytest.raises(processes.ServerProcessError, match="given up after 2 restarts in a row: "):
        watched(one, action, on_down=lambda *told: down.append(told))
    assert len(down) == 3  # killed, and two starts that failed


def test_a_server_that_idles_and_does_not_answer_is_started_again(tmp_path):
    """Asked while it is busy, or paused for a push, a healthy one might not answer either."""
    idle = []
    down = []

    async def action(pool):
        await asyncio.sleep(0.6)  # three probes long
        assert down == []
        idle.append(True)
        await until(lambda: down)
        idle.clear()
        await until(lambda: pool.processes["gpu0"].num_starts == 2)

    watched(
        settings(tmp_path, "unwell"),
        action,
        is_idle=lambda name: bool(idle),
        on_down=lambda *told: down.append(told),
    )
    assert "gpu0 idled and did not answer http://127.0.0.1:" in down[0][1]


def test_one_that_fails_at_the_start_ends_the_others(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    good = settings(tmp_path / "a", name="a")
    bad = settings(tmp_path / "b", "dies", name="b")

    async def run():
        pool = pools.ServerPool([good, bad])
        with pytest.raises(processes.ServerProcessError, match="b ended with status 3"):
            await pool.start()
        assert not any(process.is_running for process in pool.processes.values())

    asyncio.run(run())


def test_serve_runs_until_it_is_told_to_stop(tmp_path):
    async def run():
        stop = asyncio.Event()
        serving = asyncio.create_task(pools.serve([settings(tmp_path)], stop))
        await until((tmp_path / "pids").exists)
        await asyncio.sleep(0.5)
        assert not serving.done()
        stop.set()
        await serving

    asyncio.run(run())
    assert not any(map(is_alive, pids_of(tmp_path)))


def test_serve_can_be_stopped_while_it_starts(tmp_path):
    async def run():
        stop = asyncio.Event()
        serving = asyncio.create_task(pools.serve([settings(tmp_path, "deaf")], stop))
        await until((tmp_path / "pids").exists)
        stop.set()
        await serving

    asyncio.run(run())
    assert not any(map(is_alive, pids_of(tmp_path)))


PARENT = """
import asyncio, pathlib, sys
from codjax.rollout.sglang import pool
from tests.rollout.sglang import test_processes

async def main():
    pools = pool.ServerPool([test_processes.settings(pathlib.Path(sys.argv[1]))])
    await pools.start()
    print("ready", flush=True)
    if sys.argv[2] == "returns":
        return
    await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.mark.parametrize("end", ["SIGKILL", "SIGTERM", "returns"])
def test_no_server_outlives_its_parent(end, tmp_path):
    """However the parent ends, and though it never calls `stop`."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path), end], stdout=subprocess.PIPE
    )
    with parent:
        assert parent.stdout.readline() == b"ready\n"
        pids = pids_of(tmp_path)
        if end != "returns":
            assert all(map(is_alive, pids))
            os.kill(parent.pid, signal.Signals[end])
    wait_until(lambda: not any(map(is_alive, pids)))


def test_a_killed_guard_takes_its_command_with_it(tmp_path):
    process = processes.ServerProcess(settings(tmp_path))

    async def run():
        await ready(process)
        server, *helpers = pids_of(tmp_path)
        os.kill(process._process.pid, signal.SIGKILL)
        await until(lambda: not is_alive(server))
        for pid in helpers:  # which the test's server lets run; SGLang's end by themselves
            os.kill(pid, signal.SIGKILL)
        await process.wait_ended()

    asyncio.run(run())
    assert "gpu0 ended with status -9" in process.ending()
