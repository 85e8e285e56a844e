"""Answers through a router, while weights and checks go to the servers themselves."""

import asyncio
import contextlib
import itertools

import aiohttp
import pytest
from aiohttp import web

from codjax.rollout.sampler import SamplerError
from codjax.rollout.sglang.sampler import SGLangSampler
from tests.rollout.sglang.fake_server import FakeServer
from tests.rollout.sglang.faults import Fault
from tests.rollout.sglang.serving import EXPECTED, PROMPT, expected_answer, params, run, settings

KNOWN = {"rid", "input_ids", "sampling_params", "return_logprob", "logprob_start_len", "stream"}


class Proxy:
    """A router in turn, which asks the next server when one is gone and drops unknown fields.

    Attributes:
        servers: those that it knows; without any it is well, and not ready.
        is_sticky: asks the first one as long as that answers, as a real one does by its cache.
        num_asked: requests so far.
    """

    def __init__(self, servers):
        self.servers, self.turn, self.num_asked = servers, itertools.count(), 0
        self.is_sticky = False

    async def __aenter__(self):
        app = web.Application(client_max_size=2**30)
        app.router.add_post("/generate", self.generate)
        app.router.add_get("/health", self.health)
        app.router.add_get("/readiness", self.readiness)
        self.runner = web.AppRunner(app, shutdown_timeout=0.001)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self.runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_):
        await self.runner.cleanup()

    async def health(self, _):
        return web.Response()

    async def readiness(self, _):
        return web.Response(status=200 if self.servers else 503)

    async def generate(self, request):
        body = {key: value for key, value in (await request.json()).items() if key in KNOWN}
        self.num_asked += 1
        first = 0 if self.is_sticky else next(self.turn)
        for offset in range(len(self.servers)):
            server = self.servers[(first + offset) % len(self.servers)]
            with contextlib.suppress(aiohttp.ClientError):
                async with (
                    aiohttp.ClientSession() as session,
                    session.post(f"{server.url}/generate", json=body) as answer,
                ):
                    text = await answer.text()
                    return web.Response(
                        text=text, status=answer.status, content_type="application/json"
                    )
        return web.json_response({"error": "no worker"}, status=503)


@contextlib.asynccontextmanager
async def routed(num_servers=2, **changes):
    """(sampler, servers, router): every server serves version 0 of "run"."""
    async with contextlib.AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(FakeServer()) for _ in range(num_servers)]
        router = await stack.enter_async_context(Proxy(servers))
        made = SGLangSampler(
            settings(servers, router=router.url, **changes), EXPECTED, run_id="run"
        )
        sampler = await stack.enter_async_context(made)
        await sampler.connect()
        for server in servers:
            await sampler.readmit(server.url, policy_version=0)
        yield sampler, servers, router


async def ask(sampler, count=1):
    return await asyncio.gather(*(sampler.generate(PROMPT, params(), seed=0) for _ in range(count)))


def is_expected(answer):
    return answer.tokens.tolist() == expected_answer()[0]


def test_answers_come_by_the_router_and_scores_do_not():
    async def scenario():
        async with routed() as (sampler, servers, router):
            answers = await ask(sampler, 6)
            assert all(map(is_expected, answers))
            assert router.num_asked == 6
            assert [len(server.generations) > 0 for server in servers] == [True, True]
            await sampler.score(PROMPT)
            assert router.num_asked == 6

    run(scenario())


def test_an_aborted_answer_goes_on_by_the_router():
    async def scenario():
        async with routed(1) as (sampler, (server,), router):
            server.faults = [Fault.ABORT_PARTIAL, Fault.ABORT_EMPTY]
            (answer,) = await ask(sampler)
            assert is_expected(answer)
            assert (router.num_asked, sampler.counters.aborted) == (3, 2)

    run(scenario())


def test_a_dead_server_behind_the_router_costs_nothing():
    async def scenario():
        async with routed() as (sampler, servers, _):
            await servers[0].stop()
            assert all(map(is_expected, await ask(sampler, 4)))
            assert sampler.counters.retries == 0

    run(scenario())


@pytest.mark.parametrize("is_sticky", [False, True])
def test_a_server_with_old_weights_behind_the_router_is_not_believed(is_sticky):
    async def scenario():
        async with routed() as (sampler, servers, router):
            router.is_sticky = is_sticky
            servers[1].change(weight_version="run-1")
            await sampler.readmit(servers[1].url, policy_version=1)
            sampler.set_aside(servers[0].url, "its push failed")  # and the router asks it still
            answers = await ask(sampler, 4)
            assert [answer.policy_version for answer in answers] == [1] * 4
            assert sampler.counters.retries == (4 if is_sticky else 2)
            assert router.num_asked == 4

    run(scenario())


def test_what_was_under_way_while_a_server_was_distrusted_is_asked_again():
    async def scenario():
        async with routed() as (sampler, servers, _):
            for server in servers:
                server.change(hold_after=3)
            asked = asyncio.create_task(ask(sampler, 2))
            await servers[0].until(lambda: all(server.running for server in servers))
            metrics = sampler.metrics()
            names = ("router", "0", "1")
            assert [metrics[f"sampler/in_flight_{name}"] for name in names] == [2, 0, 0]
            sampler.set_aside(servers[0].url, "the probe differs", distrust=True)
            for server in servers:
                server.change(hold_after=None)
            assert all(map(is_expected, await asked))
            assert sampler.counters.retries == 2
            assert [len(server.generations) for server in servers] == [1, 3]
            assert sampler.metrics()["sampler/in_flight_router"] == 0

    run(scenario())


def test_while_a_server_is_in_doubt_the_router_is_not_asked():
    async def scenario():
        async with routed() as (sampler, servers, router):
            sampler.set_aside(servers[0].url, "the probe differs", distrust=True)
            assert all(map(is_expected, await ask(sampler, 4)))
            assert (router.num_asked, len(servers[0].generations)) == (0, 0)
            await sampler.readmit(servers[0].url, policy_version=0)
            assert all(map(is_expected, await ask(sampler, 4)))
            assert router.num_asked == 4

    run(scenario())


def test_a_drained_server_behind_the_router_is_idle_and_its_answers_go_on():
    async def scenario():
        async with routed() as (sampler, servers, _):
            for server in servers:
                server.change(hold_after=3)
            asked = asyncio.create_task(ask(sampler, 4))
            await servers[0].until(lambda: sum(len(s.running) for s in servers) == 4)
            await sampler.drain([servers[0].url])
            for server in servers:
                server.change(hold_after=None)
            assert all(map(is_expected, await asked))
            assert sampler.counters.retries == 0

    run(scenario())


def test_while_no_server_serves_the_router_is_not_asked():
    async def scenario():
        async with routed() as (sampler, servers, router):
            for server in servers:
                sampler.set_aside(server.url, "its push failed")
            asked = asyncio.create_task(ask(sampler))
            await asyncio.sleep(0.02)
            assert router.num_asked == 0
            await sampler.readmit(servers[0].url, policy_version=0)
            assert all(map(is_expected, await asked))

    run(scenario())


def test_a_router_without_servers_is_waited_for():
    async def scenario():
        async with contextlib.AsyncExitStack() as stack:
            server = await stack.enter_async_context(FakeServer())
            router = await stack.enter_async_context(Proxy([]))
            made = SGLangSampler(settings([server], router=router.url), EXPECTED, run_id="run")
            sampler = await stack.enter_async_context(made)
            connecting = asyncio.create_task(sampler.connect())
            await asyncio.sleep(0.05)
            assert not connecting.done()
            router.servers = [server]
            await connecting
            await sampler.readmit(server.url, policy_version=0)
            assert all(map(is_expected, await ask(sampler)))

    run(scenario())


def test_something_else_in_the_place_of_a_router_is_named():
    async def scenario():
        async with FakeServer() as server:
            made = settings([server], router=f"{server.url}/nothing", replica_wait_s=0.1)
            async with SGLangSampler(made, EXPECTED, run_id="run") as sampler:
                with pytest.raises(
                    SamplerError, match=r"nothing \(server\.router\) .* answered 404"
                ):
                    await sampler.connect()

    run(scenario())


def test_a_router_that_is_gone_is_named():
    async def scenario():
        async with routed(replica_wait_s=0.2, max_retries=8) as (sampler, _, router):
            await router.runner.cleanup()
            with pytest.raises(SamplerError, match=r"\(server\.router\) was not ready for 0\.2 s"):
                await ask(sampler)
            since, why = sampler.why_stuck()
            assert since > 0
            assert router.url in why

    run(scenario())


def test_a_router_that_never_was_there_is_named_at_the_start():
    async def scenario():
        async with FakeServer() as server:
            made = settings([server], router="http://127.0.0.1:9", replica_wait_s=0.1)
            async with SGLangSampler(made, EXPECTED, run_id="run") as sampler:
                with pytest.raises(SamplerError, match=r"127\.0\.0\.1:9 \(server\.router\)"):
                    await sampler.connect()

    run(scenario())
