"""Servers from one hand: who serves after which load, who comes back, and what is left at the end.

The servers are scripted, so the probe says what they score; whole runs are in test_served_runs.py.
"""

import asyncio
import contextlib
import dataclasses
import sys

import pytest

from codjax.rollout.sampler import SamplerError
from codjax.rollout.sglang import fleet, processes
from tests.rollout.sglang.fleets import (
    PUSHES,
    Server,
    ask,
    opened,
    serving,
    staged,
    versions,
)
from tests.rollout.sglang.serving import EXPECTED, run, settings
from tests.rollout.sglang.test_processes import free_port

STEPS = [
    "/pause_generation",
    "/update_weights_from_disk",
    "/flush_cache",
    "/continue_generation",
]


def test_every_load_is_what_all_answer_from(tmp_path):
    async def scenario():
        async with opened() as (made, servers):
            assert serving(made) == [False, False]
            for version in (0, 1):
                await made.load(staged(tmp_path, version))
                assert (serving(made), versions(made)) == ([True, True], [version] * 2)
                assert {a.policy_version for a in await ask(made, 4)} == {version}
            for server in servers:
                steps = [call for call in server.calls if call in STEPS]
                assert steps == [*STEPS, *STEPS]
            assert made.metrics()["sampler/probe_gap"] == 0

    run(scenario())


def test_one_that_does_not_take_them_is_aside_until_it_does(tmp_path):
    async def scenario():
        async with opened() as (made, servers):
            await made.load(staged(tmp_path, 0))
            servers[1].update = "refuses"
            await made.load(staged(tmp_path, 1))
            assert (serving(made), versions(made)) == ([True, False], [1, 0])
            assert "out of memory" in made.sampler.replicas.why_aside()
            assert {a.policy_version for a in await ask(made, 4)} == {1}
            servers[1].update = "takes"
            await servers[1].until(lambda: serving(made) == [True, True])
            assert versions(made) == [1, 1]

    run(scenario())


def test_one_that_died_is_given_the_newest_before_it_serves(tmp_path):
    async def scenario():
        async with opened(max_failures=1) as (made, servers):
            await made.load(staged(tmp_path, 0))
            port = servers[0].port
            await servers[0].stop()
            await made.load(staged(tmp_path, 1))
            assert serving(made) == [False, True]
            servers[0].port, servers[0].weight_version = port, "default"
            servers[0].pushes.clear()
            await servers[0].start()
            await servers[1].until(lambda: all(serving(made)))
            assert versions(made) == [1, 1]
            assert servers[0].pushes[0]["weight_version"] == "run-1"

    run(scenario())


def test_a_load_while_one_is_brought_back_ends_with_the_newest_everywhere(tmp_path):
    async def scenario():
        async with opened(max_failures=1) as (made, servers):
            await made.load(staged(tmp_path, 0))
            made.sampler.set_aside(servers[0].url, "it was slow")
            for version in range(1, 6):
                await asyncio.sleep(0.004)  # the watch is anywhere in its round
                await made.load(staged(tmp_path, version))
            await servers[0].until(lambda: all(serving(made)))
            assert versions(made) == [5, 5]
            assert [server.weight_version for server in servers] == ["run-5", "run-5"]
            assert [server.paused for server in servers] == [None, None]

    run(scenario())


def test_what_one_in_doubt_is_answering_is_asked_elsewhere(tmp_path):
    async def scenario():
        async with opened() as (made, servers):
            await made.load(staged(tmp_path, 0))
            for server in servers:
                server.change(hold_after=2)
            asked = asyncio.create_task(ask(made, 4))
            await servers[0].until(lambda: sum(len(s.running) for s in servers) == 4)
            servers[1].is_wrong = True
            loading = asyncio.create_task(made.load(staged(tmp_path, 1)))
            await servers[0].until(lambda: not serving(made)[1])
            for server in servers:
                server.change(hold_after=None)
            await loading
            servers[1].is_wrong = False
            answers = await asked
            assert all(len(answer.tokens) == 8 for answer in answers)
            assert made.sampler.replicas.num_distrusted == 1

    run(scenario())


async def load_in_vain(folder):
    async with opened() as (made, servers):
        for server in servers:
            server.update = "refuses"
        await made.load(staged(folder, 0))


def test_first_weights_that_nobody_takes_end_it_at_once(tmp_path):
    with pytest.raises(SamplerError, match=r"no server took the first weights: .*memory.*memory"):
        run(load_in_vain(tmp_path))


async def lose_all(folder):
    async with opened(max_failures=1, replica_wait_s=0.2) as (made, servers):
        await made.load(staged(folder, 0))
        for server in servers:
            made.sampler.set_aside(server.url, "it is ill")
            server.change(is_ready=False)
        await asyncio.sleep(5)


def test_no_server_for_too_long_ends_it_and_names_them(tmp_path):
    with pytest.raises(
        SamplerError, match=r"no server served for 0\.2 s .* it is ill; .* it is ill"
    ):
        run(lose_all(tmp_path))


async def fail_within(folder):
    before = asyncio.all_tasks()
    try:
        async with opened() as (made, _):
            await made.load(staged(folder, 0))
            await made.load(staged(folder, 1))
            raise KeyError("mine")
    finally:
        assert asyncio.all_tasks() == before


def test_an_error_within_comes_out_as_it_is_and_nothing_is_left(tmp_path):
    with pytest.raises(KeyError, match="mine"):
        run(fail_within(tmp_path))
    assert list(tmp_path.iterdir()) == []


def local(folder, number):
    """A server that ends, and does not start, while there is a file dies-NUMBER."""
    port = free_port()
    words = ("-m", "tests.rollout.sglang.fake_process", "{port}", str(folder / f"dies-{number}"))
    return processes.ProcessSettings(
        name=f"http://127.0.0.1:{port}",
        command=(sys.executable, *words),
        model_folder=folder,
        port=port,
        log_file=folder / "log",
        stop_timeout_s=0.5,
        max_restarts=1,
        backoff_s=0.05,
    )


def test_a_server_that_was_given_up_is_given_no_more_weights_and_keeps_none(tmp_path, caplog):
    async def scenario():
        own = [local(tmp_path, number) for number in range(2)]
        urls = tuple(one.name for one in own)
        reached = dataclasses.replace(settings([], max_failures=1), urls=urls)
        made = fleet.Fleet(reached, PUSHES, EXPECTED, run_id="run", local=own)
        async with made.opened():
            await made.load(staged(tmp_path, 0))
            assert serving(made) == [True, True]
            (tmp_path / "dies-0").touch()
            async with asyncio.timeout(30):
                while "is given up" not in caplog.text:
                    await asyncio.sleep(0.02)
            await made.load(staged(tmp_path, 1))
            assert serving(made) == [False, True]
            assert [made.pushed[one.name].version for one in own] == ["run-0", "run-1"]
            assert [path.name for path in tmp_path.glob("weights-*")] == ["weights-run-1"]

    run(scenario())


def test_cancelled_in_the_middle_of_a_load_it_lets_the_servers_go_on(tmp_path):
    async def scenario():
        async with contextlib.AsyncExitStack() as stack:
            servers = [await stack.enter_async_context(Server()) for _ in range(2)]
            made = fleet.Fleet(settings(servers), PUSHES, EXPECTED, run_id="run")

            async def body():
                async with made.opened():
                    await made.load(staged(tmp_path, 0))
                    servers[0].update = "hangs"
                    await made.load(staged(tmp_path, 1))

            task = asyncio.create_task(body())
            await servers[0].until(lambda: servers[0].paused and len(servers[0].pushes) == 2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert [server.paused for server in servers] == [None, None]
            assert list(tmp_path.iterdir()) == []

    run(scenario())


def test_a_server_that_was_left_paused_is_told_to_go_on(tmp_path):
    """As by a trainer that was killed during a push."""

    async def scenario():
        async with Server() as server:
            server.change(paused="retract")
            made = fleet.Fleet(settings([server]), PUSHES, EXPECTED, run_id="run")
            async with made.opened():
                await made.load(staged(tmp_path, 0))
                assert serving(made) == [True]

    run(scenario())


def test_one_that_hangs_aside_delays_no_load(tmp_path):
    async def scenario():
        async with opened() as (made, servers):
            await made.load(staged(tmp_path, 0))
            servers[0].update = "hangs"
            made.sampler.set_aside(servers[0].url, "it was slow")
            await servers[0].until(lambda: len(servers[0].pushes) == 2)  # it is being brought back
            async with asyncio.timeout(1):
                await made.load(staged(tmp_path, 1))
            assert (serving(made), versions(made)) == ([False, True], [0, 1])

    run(scenario())


def test_a_server_that_serves_again_is_not_drained_any_more(tmp_path):
    async def scenario():
        async with opened(1) as (made, (server,)):
            await made.load(staged(tmp_path, 0))
            server.update = "refuses"
            await made.load(staged(tmp_path, 1))
            server.update = "takes"
            await server.until(lambda: serving(made) == [True])
            server.calls.clear()
            server.change(hold_after=1)
            asked = asyncio.create_task(ask(made, 3))
            await asyncio.sleep(0.3)
            assert "/abort_request" not in server.calls
            server.change(hold_after=None)
            assert len(await asked) == 3

    run(scenario())


def test_an_answer_by_new_weights_waits_for_their_probe(tmp_path):
    """The server goes on before it can score: what it says meanwhile is not believed yet."""

    async def scenario():
        async with opened(1) as (made, (server,)):
            await made.load(staged(tmp_path, 0))
            for is_right in (True, False):
                number = 1 if is_right else 2
                judged = asyncio.Event()
                server.scoring = judged
                server.change(hold_after=2)
                asked = asyncio.create_task(ask(made))
                await server.until(lambda: any(len(r.tokens) == 2 for r in server.running.values()))
                loading = asyncio.create_task(made.load(staged(tmp_path, number)))
                await server.until(lambda: server.weight_version == f"run-{number}")  # noqa: B023
                server.change(hold_after=None)
                await server.until(lambda: len(server.running) == 1)  # the probe
                await asyncio.sleep(0.05)
                assert not asked.done()
                server.is_wrong = not is_right
                judged.set()
                await loading
                if is_right:
                    (answer,) = await asked
                    assert answer.policy_version == 0
                    assert answer.version_spans[-1].version == 1
                else:
                    assert serving(made) == [False]
                    assert not asked.done()  # it waits for a server
                    server.is_wrong = False
                    (answer,) = await asked
                    assert answer.policy_version == 2  # asked again, from its beginning

    run(scenario())
