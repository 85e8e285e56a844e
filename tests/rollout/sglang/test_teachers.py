"""Servers whose weights nobody pushes: they score texts with what they have."""

import asyncio
import contextlib

import pytest

from codjax.rollout.sampler import SamplerError
from codjax.rollout.sglang.sampler import SGLangSampler
from tests.rollout.sglang.fake_server import FakeServer, scored_logprob
from tests.rollout.sglang.faults import Fault
from tests.rollout.sglang.serving import EXPECTED, PROMPT, params, run, settings

SCORES = [scored_logprob(token) for token in PROMPT[1:]]


@contextlib.asynccontextmanager
async def teaching(num_servers=1, **changes):
    """(sampler, servers) of any weights; all of them serve."""
    async with contextlib.AsyncExitStack() as stack:
        versions = ["default", "run-7", "other-3"][:num_servers]
        servers = [
            await stack.enter_async_context(FakeServer(weight_version=version))
            for version in versions
        ]
        made = SGLangSampler(settings(servers, **changes), EXPECTED, run_id="run")
        sampler = await stack.enter_async_context(made)
        await sampler.connect()
        watch = asyncio.create_task(sampler.serve_as_they_are())
        try:
            await servers[0].until(lambda: all(serving(sampler)))
            yield sampler, servers
        finally:
            assert not watch.done()
            watch.cancel()


def serving(sampler):
    return [replica.aside is None for replica in sampler.replicas.all]


async def scores(sampler, count=1):
    scored = await asyncio.gather(*(sampler.score(PROMPT) for _ in range(count)))
    return [each.tolist() for each in scored]


def test_they_score_with_whatever_weights_they_have():
    async def scenario():
        async with teaching(3, max_imbalance=0) as (sampler, servers):
            assert await scores(sampler, 6) == [SCORES] * 6
            assert [len(server.generations) for server in servers] == [2, 2, 2]
            assert [server.pushes for server in servers] == [[], [], []]

    run(scenario())


@pytest.mark.parametrize("fault", [Fault.STATUS_503, Fault.STATUS_429, Fault.TRUNCATED_JSON])
def test_a_score_that_failed_is_asked_for_again(fault):
    async def scenario():
        async with teaching() as (sampler, [server]):
            server.faults = [fault, fault]
            assert await scores(sampler) == [SCORES]
            assert sampler.counters.retries == 2

    run(scenario())


def test_one_that_died_is_left_out_until_it_is_back_as_it_is():
    async def scenario():
        async with teaching(2, max_failures=1) as (sampler, servers):
            port = servers[0].port
            await servers[0].stop()
            assert await scores(sampler, 4) == [SCORES] * 4
            assert serving(sampler) == [False, True]
            servers[0].port = port
            await servers[0].start()
            await servers[0].until(lambda: all(serving(sampler)))
            servers[0].generations.clear()
            await servers[1].stop()
            assert await scores(sampler, 4) == [SCORES] * 4
            assert len(servers[0].generations) == 4

    run(scenario())


def test_a_score_waits_for_the_only_one_to_come_back():
    async def scenario():
        async with teaching(max_failures=1) as (sampler, [server]):
            port = server.port
            await server.stop()
            scoring = asyncio.create_task(scores(sampler, 3))
            await server.until(lambda: serving(sampler) == [False])
            server.port = port
            await server.start()
            assert await scoring == [SCORES] * 3

    run(scenario())


def test_one_that_came_back_with_another_model_stays_aside():
    async def scenario():
        async with teaching(2) as (sampler, servers):
            servers[0].architecture = "LlamaForCausalLM"
            sampler.set_aside(servers[0].url, "it was slow")
            sampler.set_aside(servers[1].url, "it was slow")
            await servers[1].until(lambda: serving(sampler) == [False, True])
            assert "runs a LlamaForCausalLM" in sampler.replicas.why_aside()
            servers[0].architecture = "Qwen3ForCausalLM"
            await servers[0].until(lambda: all(serving(sampler)))

    run(scenario())


@pytest.mark.parametrize("has_router", [False, True])
def test_it_answers_nothing_for_the_run(has_router):
    async def scenario():
        async with FakeServer() as router:
            changes = {"router": router.url} if has_router else {}
            async with teaching(**changes) as (sampler, [server]):
                with pytest.raises(SamplerError, match="serves the weights that it has: it scores"):
                    await sampler.generate(PROMPT, params(), seed=0)
                assert (server.generations, serving(sampler)) == ([], [True])
                assert router.generations == []
                assert await scores(sampler) == [SCORES]

    run(scenario())
