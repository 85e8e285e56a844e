"""What goes wrong while servers are brought back, or while the fleet ends."""

import asyncio
import contextlib
import time

import pytest

from codjax.rollout.sampler import SamplerError
from tests.rollout.sglang.fleets import ask, opened, serving, staged, versions
from tests.rollout.sglang.serving import run


def set_aside(made, *servers):
    for server in servers:
        made.sampler.set_aside(server.url, "it is ill")


@pytest.mark.parametrize("fault", ["refuses", "hangs"])
def test_one_that_takes_no_weights_is_in_no_others_way_back(tmp_path, fault):
    async def scenario():
        async with opened() as (made, servers):
            await made.load(staged(tmp_path, 0))
            servers[0].update = fault
            set_aside(made, *servers)
            async with asyncio.timeout(3):
                await servers[1].until(lambda: serving(made) == [False, True])
            assert {answer.policy_version for answer in await ask(made, 2)} == {0}

    run(scenario())


def test_one_that_was_left_paused_is_told_again_to_go_on(tmp_path):
    async def scenario():
        async with opened() as (made, servers):
            await made.load(staged(tmp_path, 0))
            servers[0].continues = False
            await made.load(staged(tmp_path, 1))
            assert (serving(made), servers[0].paused) == ([False, True], "retract")
            servers[0].continues = True
            async with asyncio.timeout(3):
                await servers[0].until(lambda: all(serving(made)))
            assert (servers[0].paused, versions(made)) == (None, [1, 1])

    run(scenario())


def test_a_proxy_in_the_place_of_one_ends_nothing(tmp_path):
    async def scenario():
        async with opened() as (made, servers):
            await made.load(staged(tmp_path, 0))
            servers[0].is_found = False
            set_aside(made, servers[0])
            asked = len(servers[0].calls)
            await servers[0].until(lambda: len(servers[0].calls) > asked + 4)
            assert serving(made) == [False, True]
            servers[0].is_found = True
            await servers[0].until(lambda: all(serving(made)))

    run(scenario())


def test_one_that_does_not_tell_its_version_is_aside(tmp_path):
    async def scenario():
        async with opened() as (made, servers):
            await made.load(staged(tmp_path, 0))
            servers[0].tells_version = False
            await made.load(staged(tmp_path, 1))
            assert serving(made) == [False, True]
            assert "has weights None after it was given" in made.sampler.replicas.why_aside()

    run(scenario())


def test_what_one_answers_after_its_way_back_is_not_dropped(tmp_path):
    async def scenario():
        async with opened(1) as (made, [server]):
            await made.load(staged(tmp_path, 0))
            (replica,) = made.sampler.replicas.all
            replica.in_flight += 1  # of before: the server is not idle until it is answered
            server.update = "refuses"
            await made.load(staged(tmp_path, 1))
            server.update = "takes"
            await server.until(lambda: all(serving(made)))
            await asyncio.sleep(0.15)  # longer than between two looks of a drain
            aborts = server.calls.count("/abort_request")
            await asyncio.sleep(0.3)
            replica.in_flight -= 1
            assert server.calls.count("/abort_request") == aborts
            (answer,) = await ask(made)
            assert answer.policy_version == 1

    run(scenario())


def test_a_readmission_does_not_outlive_a_doubt(tmp_path):
    async def scenario():
        async with opened(1) as (made, [server]):
            await made.load(staged(tmp_path, 0))
            server.update = "refuses"  # nor is it brought back at once
            server.info_waits = asyncio.Event()
            admitting = asyncio.create_task(made.sampler.readmit(server.url, policy_version=0))
            asked = server.calls.count("/model_info")
            await server.until(lambda: server.calls.count("/model_info") > asked)
            made.sampler.set_aside(server.url, "its push failed", distrust=True)
            server.info_waits.set()
            with pytest.raises(SamplerError, match="was set aside while it was readmitted"):
                await admitting
            assert serving(made) == [False]

    run(scenario())


def test_a_push_of_two_that_ended_leaves_the_other_under_way(tmp_path):
    async def scenario():
        async with opened(1) as (made, [server]):
            await made.load(staged(tmp_path, 0))
            first, second = asyncio.Event(), asyncio.Event()

            async def push(until):
                with made._pushing(server.url):
                    await until.wait()

            tasks = [asyncio.create_task(push(event)) for event in (first, second)]
            assert made._is_idle(server.url)  # neither has begun
            await asyncio.sleep(0)
            first.set()
            await tasks[0]
            assert not made._is_idle(server.url)
            second.set()
            await tasks[1]
            assert made._is_idle(server.url)

    run(scenario())


def test_one_set_aside_amid_a_push_is_not_told_to_go_on(tmp_path):
    async def scenario():
        async with opened() as (made, servers):
            await made.load(staged(tmp_path, 0))
            servers[0].update = "hangs"
            loading = asyncio.create_task(made.load(staged(tmp_path, 1)))
            await servers[0].until(lambda: len(servers[0].pushes) == 2)
            set_aside(made, servers[0])
            await asyncio.sleep(0.05)
            assert servers[0].paused == "retract"
            loading.cancel()

    run(scenario())


@contextlib.asynccontextmanager
async def amid_a_push(folder):
    """A server hangs while it is brought back, and will not go on when it is told to."""
    async with opened(drain_timeout_s=20) as (made, servers):
        await made.load(staged(folder, 0))
        servers[1].update = "hangs"
        set_aside(made, servers[1])
        await servers[1].until(lambda: len(servers[1].pushes) == 2)
        servers[1].continues = False
        made.sampler.replicas.all[1].in_flight += 1  # nor is it idle, were it drained
        yield made


async def fail_amid_a_push(folder):
    async with amid_a_push(folder):
        raise KeyError("mine")


def test_an_error_amid_a_push_comes_out_as_it_is(tmp_path):
    with pytest.raises(KeyError, match="mine"):
        run(fail_amid_a_push(tmp_path))


def test_the_end_amid_a_push_waits_for_no_drain(tmp_path):
    async def scenario():
        async with amid_a_push(tmp_path):
            began = time.monotonic()
        assert time.monotonic() - began < 5
        assert list(tmp_path.iterdir()) == []

    run(scenario())


async def lose_all_amid_a_load(folder):
    async with opened(replica_wait_s=0.3) as (made, servers):
        await made.load(staged(folder, 0))
        for server in servers:
            server.update = "hangs"
            server.continues = False
        asyncio.get_running_loop().call_later(0.05, set_aside, made, *servers)
        await made.load(staged(folder, 1))


def test_no_server_for_too_long_amid_a_load_is_what_comes_out(tmp_path):
    with pytest.raises(SamplerError, match=r"no server served for 0\.3 s"):
        run(lose_all_amid_a_load(tmp_path))
    assert list(tmp_path.iterdir()) == []
