"""Which server is asked, which one is set aside, and how it comes back."""

import asyncio
import dataclasses

import numpy as np
import pytest

from codjax.rollout.sampler import SamplerError
from codjax.rollout.sglang import wire
from codjax.rollout.sglang.sampler import SGLangSampler
from codjax.rollout.sglang.server import NoAnswerError
from tests.rollout.sglang.fake_server import FakeServer
from tests.rollout.sglang.faults import Fault
from tests.rollout.sglang.serving import (
    EXPECTED,
    PROMPT,
    expected_answer,
    params,
    run,
    serving,
    settings,
)


def ask(sampler, **values):
    return asyncio.create_task(sampler.generate(PROMPT, params(), seed=0, **values))


def is_expected(answer):
    return answer.tokens.tolist() == expected_answer()[0]


def in_flight(sampler):
    return [replica.in_flight for replica in sampler.replicas.all]


async def connect_to(server, **changes):
    async with SGLangSampler(settings([server], **changes), EXPECTED, run_id="run") as sampler:
        await sampler.connect()


@pytest.mark.parametrize(("tokens", "is_same"), [([5, 6], True), (None, True), ([5, 7], False)])
def test_a_server_with_another_tokenizer_is_refused(tokens, is_same):
    expected = dataclasses.replace(EXPECTED, text="two dots", text_ids=(5, 6))

    async def scenario():
        async with FakeServer() as server:
            server.change(tokens=tokens)
            async with SGLangSampler(settings([server]), expected, run_id="run") as sampler:
                if is_same:
                    await sampler.connect()
                    return
                complaint = (
                    r"has another tokenizer than tokenizer.source: it makes \[5, 7\]… of 'two"
                )
                with pytest.raises(SamplerError, match=complaint):
                    await sampler.connect()

    run(scenario())


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"version": "0.5.12.post1"}, r"runs sglang 0\.5\.12\.post1; needed is 0\.5\.19 or later"),
        ({"version": ""}, r"runs sglang \(unknown\); needed"),
        ({"architecture": "LlamaForCausalLM"}, "LlamaForCausalLM .*, and the model is a Qwen3For"),
        ({"vocab_size": 1024}, "has a vocabulary of 1024, and the model one of 512"),
        ({"context_length": 101}, "room for 99 tokens .* are 100: start it with a larger"),
        ({"is_ready": False}, r"was not ready within 0\.1 s \(server\.ready_timeout_s\)"),
        ({"architecture": None}, "runs a None"),
        ({"weight_version": None}, "cannot be believed: weight_version should be str, and is None"),
    ],
)
def test_a_server_that_cannot_serve_the_model(changes, complaint):
    async def scenario():
        async with FakeServer() as server:
            server.change(**changes)
            with pytest.raises(SamplerError, match=complaint) as caught:
                await connect_to(server, ready_timeout_s=5 if server.is_ready else 0.1)
            assert server.url in str(caught.value)
            assert server.generations == []

    run(scenario())


@pytest.mark.parametrize("version", ["0.5.19", "0.5.23", "0.6.0rc1", "1.0.0"])
def test_a_server_that_can(version):
    async def scenario():
        async with FakeServer() as server:
            server.version, server.tells_vocab_size = version, version != "0.5.19"
            server.context_length = 102
            await connect_to(server)

    run(scenario())


def test_connect_waits_until_a_server_is_ready():
    async def scenario():
        async with FakeServer() as server:
            server.is_ready = False
            connecting = asyncio.create_task(connect_to(server))
            await server.until(lambda: len(server.calls) > 3)
            server.is_ready = True
            await connecting

    run(scenario())


def test_nothing_is_sent_to_a_server_without_weights():
    async def scenario():
        async with FakeServer(weight_version="default") as server:
            made = SGLangSampler(settings([server], replica_wait_s=0.05), EXPECTED, run_id="run")
            async with made as sampler:
                await sampler.connect()
                with pytest.raises(SamplerError, match="it was not given weights yet"):
                    await sampler.generate(PROMPT, params(), seed=0)
                with pytest.raises(
                    wire.WrongWeightsError, match=r"'default', .* have 'run-0': push"
                ):
                    await sampler.readmit(server.url, policy_version=0)
                server.weight_version = "other-0"
                with pytest.raises(wire.WrongWeightsError, match=r"'other-0', .* have 'run-0'"):
                    await sampler.readmit(server.url, policy_version=0)
                assert server.generations == []
                await sampler.client(server.url).set_version("run-0")
                await sampler.readmit(server.url, policy_version=0)
                assert is_expected(await ask(sampler))

    run(scenario())


def test_another_model_is_not_readmitted_nor_a_paused_one():
    async def scenario():
        async with serving() as (sampler, [server]):
            server.architecture = "LlamaForCausalLM"
            with pytest.raises(SamplerError, match="runs a LlamaForCausalLM"):
                await sampler.readmit(server.url, policy_version=0)
            assert "runs a LlamaForCausalLM" in sampler.replicas.why_aside()
            server.paused = "retract"
            with pytest.raises(
                NoAnswerError, match="is not ready: it loads, is paused, or is gone"
            ):
                await sampler.readmit(server.url, policy_version=0)

    run(scenario())


def test_a_group_stays_on_its_replica_and_groups_spread():
    async def scenario():
        async with serving(2) as (sampler, servers):
            for server in servers:
                server.hold_after = 1
            asked = [ask(sampler, group=group) for group in (7, 8, 7, 7, 8)]
            await servers[0].until(lambda: sum(in_flight(sampler)) == 5)
            assert in_flight(sampler) == [3, 2]
            for server in servers:
                server.change(hold_after=None)
            assert all(map(is_expected, await asyncio.gather(*asked)))
            assert is_expected(await ask(sampler, group=8))
            assert [len(server.generations) for server in servers] == [3, 3]

    run(scenario())


def test_a_group_leaves_a_replica_that_is_much_busier():
    async def scenario():
        async with serving(2, max_imbalance=2) as (sampler, servers):
            for server in servers:
                server.hold_after = 1
            asked = [ask(sampler, group=7) for _ in range(6)]
            await servers[0].until(lambda: sum(in_flight(sampler)) == 6)
            # 3 on its first replica are 3 more than none; the fourth moves the group.
            assert in_flight(sampler) == [3, 3]
            for server in servers:
                server.change(hold_after=None)
            assert all(map(is_expected, await asyncio.gather(*asked)))

    run(scenario())


def test_a_server_that_is_killed_loses_no_request_and_comes_back():
    async def scenario():
        async with serving(2) as (sampler, servers):
            for server in servers:
                server.hold_after = 2
            asked = [ask(sampler, group=group) for group in range(20)]
            await servers[0].until(lambda: min(len(s.running) for s in servers) == 10)
            await servers[0].stop()
            await servers[1].until(lambda: len(servers[1].running) == 20)
            servers[1].change(hold_after=None)
            assert all(map(is_expected, await asyncio.gather(*asked)))
            assert sampler.counters.retries == 10
            assert sampler.replicas.num_set_aside == 1
            returned = asyncio.create_task(sampler.returned())
            await asyncio.sleep(0.03)
            assert not returned.done()
            async with FakeServer(port=servers[0].port, weight_version="run-4") as again:
                assert await returned == again.url
                await ask(sampler)
                assert again.generations == []  # it answers, but nobody said with what
                with pytest.raises(wire.WrongWeightsError, match=r"'run-4', .* have 'run-5'"):
                    await sampler.readmit(again.url, policy_version=5)
                await sampler.readmit(again.url, policy_version=4)
                servers[1].hold_after = 1
                busy = ask(sampler, group=99)
                await asyncio.sleep(0.01)
                answer = await ask(sampler, group=100)
                assert (len(again.generations) > 0, answer.policy_version) == (True, 4)
                servers[1].change(hold_after=None)
                assert is_expected(await busy)

    run(scenario())


def test_requests_wait_for_the_only_server_to_come_back():
    async def scenario():
        async with serving() as (sampler, [server]):
            server.hold_after = 2
            asked = [ask(sampler) for _ in range(5)]
            await server.until(lambda: len(server.running) == 5)
            await server.stop()
            while not sampler.replicas.num_set_aside:
                await asyncio.sleep(0.001)
            async with FakeServer(port=server.port) as again:
                assert await sampler.returned() == again.url
                await sampler.readmit(again.url, policy_version=0)
                assert all(map(is_expected, await asyncio.gather(*asked)))
                assert len(again.generations) == 5

    run(scenario())


def test_old_failures_do_not_count_against_a_server_that_was_readmitted():
    async def scenario():
        async with serving(max_failures=1, max_retries=9) as (sampler, [server]):
            server.hold_after = 2
            asked = [ask(sampler) for _ in range(5)]
            await server.until(lambda: len(server.running) == 5)
            sampler.set_aside(server.url, "a test")
            await sampler.readmit(server.url, policy_version=0)
            admitted = sampler.replicas.num_set_aside
            server.change(hold_after=None)
            for running in server.running.values():
                running.logprobs = [None] * len(running.tokens)
            assert all(map(is_expected, await asyncio.gather(*asked)))
            assert sampler.counters.retries == 5
            assert sampler.replicas.num_set_aside == admitted

    run(scenario())


def test_what_a_distrusted_server_is_answering_is_dropped():
    async def scenario():
        async with serving(2) as (sampler, servers):
            servers[0].hold_after = 2
            asked = ask(sampler)
            await servers[0].until(lambda: servers[0].running)
            sampler.set_aside(servers[0].url, "the probe failed", distrust=True)
            servers[0].change(hold_after=None)
            assert is_expected(await asked)
            assert [len(server.generations) for server in servers] == [1, 1]
            servers[0].generations.clear()
            await sampler.readmit(servers[0].url, policy_version=0)
            sampler.set_aside(servers[1].url, "a test")
            assert is_expected(await ask(sampler))
            assert len(servers[0].generations) == 1

    run(scenario())


def test_a_drained_server_is_idle_and_its_responses_go_on_elsewhere():
    async def scenario():
        async with serving(2) as (sampler, servers):
            for server in servers:
                server.hold_after = 3
            asked = [ask(sampler, group=group) for group in range(10)]
            await servers[0].until(lambda: min(len(s.running) for s in servers) == 5)
            await sampler.drain([servers[0].url])
            assert not servers[0].running
            servers[1].change(hold_after=None)
            answers = await asyncio.gather(*asked)
            assert all(map(is_expected, answers))
            tokens = expected_answer()[0]
            resumed = [body for body in servers[1].generations if len(body["input_ids"]) > 3]
            assert [body["input_ids"] for body in resumed] == [[*PROMPT, *tokens[:3]]] * 5
            assert (sampler.counters.resumed, sampler.counters.retries) == (5, 0)

    run(scenario())


def test_a_server_that_does_not_drain_is_named():
    async def scenario():
        async with serving(drain_timeout_s=0.1) as (sampler, [server]):
            server.paused = "in_place"  # while it is, requests wait where no abort reaches them
            asked = ask(sampler)
            await server.until(lambda: server.held)
            with pytest.raises(SamplerError, match="0 running, 0 waiting, 1 of ours unanswered"):
                await sampler.drain()
            assert "/abort_request" in server.calls
            server.change(paused=None)
            assert is_expected(await asked)
            await server.stop()
            with pytest.raises(SamplerError, match=r"not idle 0\.1 s .*ClientConnector"):
                await sampler.drain()

    run(scenario())


def test_a_url_twice_is_one_server():
    async def scenario():
        async with FakeServer() as server:
            made = SGLangSampler(settings([server, server]), EXPECTED, run_id="run")
            assert len(made.replicas.all) == 1
            assert made.client(server.url + "/").url == server.url
            await made.close()

    run(scenario())


def test_scores_of_any_replica():
    async def scenario():
        async with serving(2) as (sampler, servers):
            await servers[0].stop()
            assert np.isfinite(await sampler.score(PROMPT)).all()

    run(scenario())


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_server_that_refuses_all_is_asked_nothing_more(status):
    async def scenario():
        async with serving(2) as (sampler, servers):
            servers[0].refuses_with = status
            answers = await asyncio.gather(*(ask(sampler, group=i) for i in range(6)))
            assert all(map(is_expected, answers))
            assert [replica.aside is None for replica in sampler.replicas.all] == [False, True]

    run(scenario())


def test_a_storm_on_all_servers_is_waited_out():
    async def scenario():
        async with serving(2, backoff_s=0.02, max_backoff_s=1.0) as (sampler, servers):
            for server in servers:
                server.change(always=Fault.STATUS_429)
            asked = ask(sampler)
            await asyncio.sleep(0.1)
            assert not asked.done()
            for server in servers:
                server.change(always=None)
            assert is_expected(await asked)

    run(scenario())
