"""Responses over HTTP: whole, cut and resumed, under new weights, and beside every fault."""

import asyncio

import numpy as np
import pytest

from codjax import types
from codjax.rollout.sampler import PromptTooLongError, RefusedError, SamplerError
from tests.rollout.sglang.faults import Fault
from tests.rollout.sglang.serving import PROMPT, expected_answer, params, run, serving

SPAN = types.VersionSpan
# After these the request is sent again, and the answer is that of the second try.
RETRIED = [
    Fault.STATUS_500,
    Fault.STATUS_503,
    Fault.STATUS_429,
    Fault.DUPLICATE_RID,
    Fault.CLOSED,
    Fault.LATE,
    Fault.TRUNCATED_JSON,
    Fault.NO_OBJECT,
    Fault.FEWER_LOGPROBS,
    Fault.WRONG_COUNT,
    Fault.REPEATED_TOKENS,
    Fault.TOO_MANY_TOKENS,
    Fault.OTHER_IDS,
    Fault.NULL_LOGPROB,
    Fault.NAN_LOGPROB,
    Fault.POSITIVE_LOGPROB,
    Fault.NAN_STOP,
    Fault.OUT_OF_VOCABULARY,
    Fault.OTHER_RID,
    Fault.NO_SPANS,
    Fault.SPANS_WITH_A_GAP,
    Fault.ABORT_BEFORE_SPANS,
]
BUSY = {Fault.STATUS_429, Fault.DUPLICATE_RID}  # the server is well
SET_ASIDE = [Fault.STALE_VERSION, Fault.FOREIGN_VERSION]  # the server is not: at once
RESUMED = [Fault.ABORT_PARTIAL, Fault.ABORT_EMPTY]


def test_every_fault_has_an_outcome():
    assert {*RETRIED, *SET_ASIDE, *RESUMED, Fault.STATUS_400} == set(Fault)


def is_expected(answer, prompt=PROMPT, num_tokens=8):
    tokens, logprobs = expected_answer(prompt, num_tokens)
    assert answer.tokens.tolist() == tokens
    np.testing.assert_array_equal(answer.logprobs, np.float32(logprobs))
    assert [answer.version_spans[0].start, answer.version_spans[-1].end] == [0, num_tokens]
    return True


def test_a_response():
    async def scenario():
        async with serving() as (sampler, [server]):
            answer = await sampler.generate(PROMPT, params(temperature=0.5), seed=3, group=1)
            assert is_expected(answer)
            assert (answer.tokens.dtype, answer.logprobs.dtype) == (np.int32, np.float32)
            assert (answer.policy_version, answer.version_spans) == (0, (SPAN(0, 0, 8),))
            assert answer.stop_reason is types.StopReason.LENGTH
            [body] = server.generations
            assert body["input_ids"] == PROMPT.tolist()
            assert body["sampling_params"]["max_new_tokens"] == 8
            assert body["sampling_params"]["temperature"] == 0.5
            assert len(body["rid"]) == 32

    run(scenario())


def test_a_response_that_a_stop_token_ends():
    async def scenario():
        async with serving() as (sampler, _):
            tokens, _ = expected_answer()
            answer = await sampler.generate(PROMPT, params(stop_tokens=(tokens[4],)), seed=0)
            assert is_expected(answer, num_tokens=5)
            assert answer.stop_reason is types.StopReason.STOP_TOKEN

    run(scenario())


@pytest.mark.parametrize("fault", RETRIED)
def test_a_failed_request_is_sent_again(fault):
    async def scenario():
        async with serving(request_timeout_s=0.3) as (sampler, [server]):
            server.faults = [fault]
            assert is_expected(await sampler.generate(PROMPT, params(), seed=0))
            first, second = server.generations
            assert first.pop("rid") != second.pop("rid")
            assert first == second
            assert (sampler.counters.requests, sampler.counters.retries) == (2, 1)
            assert sampler.counters.aborted == sampler.counters.resumed == 0
            assert sampler.replicas.num_set_aside == 0

    run(scenario())


@pytest.mark.parametrize("fault", RETRIED)
def test_a_failed_request_is_sent_to_another_replica(fault):
    async def scenario():
        async with serving(2, request_timeout_s=0.3, backoff_s=60.0) as (sampler, servers):
            servers[0].faults = [fault]
            assert is_expected(await sampler.generate(PROMPT, params(), seed=0))
            assert [len(server.generations) for server in servers] == [1, 1]

    run(scenario())


@pytest.mark.parametrize("fault", RETRIED)
def test_a_server_that_fails_on_is_given_up_in_one_sentence(fault):
    async def scenario():
        async with serving(request_timeout_s=0.1, max_retries=2, max_failures=9) as (
            sampler,
            [server],
        ):
            server.always = fault
            with pytest.raises(SamplerError) as caught:
                await sampler.generate(PROMPT, params(), seed=0)
            assert len(server.generations) == 3
            message = str(caught.value)
            assert message.startswith("gave up after 3 tries (server.max_retries is 2), the last:")
            assert server.url in message
            assert "\n" not in message
            assert "set aside" not in message

    run(scenario())


@pytest.mark.parametrize("fault", sorted(set(RETRIED) - BUSY, key=lambda fault: fault.value))
def test_a_server_that_fails_three_times_in_a_row_is_set_aside(fault):
    async def scenario():
        changes = {"request_timeout_s": 0.1, "max_failures": 3, "replica_wait_s": 0.05}
        async with serving(**changes) as (sampler, [server]):
            server.always = fault
            with pytest.raises(SamplerError, match=r"no server served for 0\.05 s") as caught:
                await sampler.generate(PROMPT, params(), seed=0)
            assert len(server.generations) == 3
            assert f"{server.url} set aside 0 s ago: 3 failures in a row, the last: " in str(
                caught.value
            )

    run(scenario())


def test_failures_that_are_not_in_a_row_set_nobody_aside():
    async def scenario():
        async with serving(max_failures=2) as (sampler, [server]):
            server.faults = [Fault.STATUS_503, None, Fault.CLOSED, None, Fault.NAN_LOGPROB, None]
            for _ in range(3):
                assert is_expected(await sampler.generate(PROMPT, params(), seed=0))
            assert sampler.replicas.num_set_aside == 0

    run(scenario())


@pytest.mark.parametrize("fault", [Fault.STATUS_429, Fault.STATUS_503])
def test_a_storm_passes(fault):
    async def scenario():
        async with serving(max_retries=50, max_failures=50) as (sampler, [server]):
            server.faults = [fault] * 40
            answers = await asyncio.gather(
                *(sampler.generate(PROMPT, params(), seed=s) for s in range(20))
            )
            assert all(is_expected(answer) for answer in answers)
            assert sampler.counters.retries == 40
            assert len(server.generations) == 60

    run(scenario())


def test_what_a_server_refuses_is_not_asked_again():
    async def scenario():
        async with serving(2) as (sampler, servers):
            servers[0].faults = [Fault.STATUS_400]
            with pytest.raises(RefusedError, match="/generate answered 400: told to refuse"):
                await sampler.generate(PROMPT, params(), seed=0)
            assert [len(server.generations) for server in servers] == [1, 0]

    run(scenario())


@pytest.mark.parametrize("fault", SET_ASIDE)
def test_a_server_with_other_weights_is_set_aside_until_it_is_readmitted(fault):
    async def scenario():
        async with serving() as (sampler, [server]):
            server.weight_version = "run-3"
            await sampler.readmit(server.url, policy_version=3)
            server.faults = [fault]
            asked = asyncio.create_task(sampler.generate(PROMPT, params(), seed=0))
            await server.until(lambda: sampler.replicas.num_set_aside)
            await asyncio.sleep(0.02)
            assert not asked.done()
            reason = sampler.replicas.why_aside()
            wanted = {
                Fault.STALE_VERSION: "it sampled from run-2, older than run-3",
                Fault.FOREIGN_VERSION: "its weights are 'default', not of this run",
            }
            assert wanted[fault] in reason
            assert await sampler.returned() == server.url
            await sampler.readmit(server.url, policy_version=3)
            answer = await asked
            assert is_expected(answer)
            assert answer.version_spans == (SPAN(3, 0, 8),)

    run(scenario())


def test_a_response_that_is_aborted_goes_on_from_its_tokens():
    async def scenario():
        async with serving() as (sampler, [server]):
            server.faults = [Fault.ABORT_PARTIAL, Fault.ABORT_EMPTY, Fault.ABORT_PARTIAL]
            assert is_expected(await sampler.generate(PROMPT, params(), seed=0))
            tokens, _ = expected_answer()
            assert [
                (body["input_ids"], body["sampling_params"]["max_new_tokens"])
                for body in server.generations
            ] == [
                (PROMPT.tolist(), 8),
                (PROMPT.tolist() + tokens[:4], 4),
                (PROMPT.tolist() + tokens[:4], 4),
                (PROMPT.tolist() + tokens[:6], 2),
            ]
            counters = sampler.counters
            assert (counters.aborted, counters.resumed, counters.retries) == (3, 3, 0)

    run(scenario())


def test_aborts_without_end_are_an_error():
    async def scenario():
        async with serving(max_retries=2) as (sampler, [server]):
            server.always = Fault.ABORT_EMPTY
            with pytest.raises(SamplerError, match="aborted 3 times before its next token"):
                await sampler.generate(PROMPT, params(), seed=0)

    run(scenario())


def test_a_response_under_two_versions_knows_which_sampled_what():
    async def scenario():
        async with serving() as (sampler, [server]):
            client = sampler.client(server.url)
            server.hold_after = 3
            asked = asyncio.create_task(sampler.generate(PROMPT, params(), seed=0))
            await server.until(lambda: [len(r.tokens) for r in server.running.values()] == [3])
            await client.pause("retract")
            await client.update_from_disk("/weights/run-1", "run-1")
            await client.flush()
            await client.continue_()
            await sampler.readmit(server.url, policy_version=1)
            server.change(hold_after=None)
            answer = await asked
            assert is_expected(answer)
            assert answer.version_spans == (SPAN(0, 0, 3), SPAN(1, 3, 8))
            assert answer.policy_version == 0
            assert (await sampler.generate(PROMPT, params(), seed=0)).policy_version == 1

    run(scenario())


def test_parts_of_a_response_under_three_versions_are_joined():
    async def scenario():
        async with serving() as (sampler, [server]):
            server.hold_after = 2
            asked = asyncio.create_task(sampler.generate(PROMPT, params(), seed=0))
            for version in (1, 2):
                await server.until(lambda: [len(r.tokens) for r in server.running.values()] == [2])
                await sampler.drain()
                server.weight_version = f"run-{version}"
                await sampler.readmit(server.url, policy_version=version)
            await server.until(lambda: [len(r.tokens) for r in server.running.values()] == [2])
            server.change(hold_after=None)
            answer = await asked
            assert is_expected(answer)
            assert answer.version_spans == (SPAN(0, 0, 2), SPAN(1, 2, 4), SPAN(2, 4, 8))
            assert answer.policy_version == 0

    run(scenario())


def test_a_response_is_as_long_as_the_context_leaves_room():
    async def scenario():
        async with serving() as (sampler, [server]):
            limit = server.context_length - 2  # what a server of this context really takes
            prompt = np.full(limit - 5, 7, np.int32)
            answer = await sampler.generate(prompt, params(max_tokens=50), seed=0)
            assert is_expected(answer, prompt, num_tokens=5)
            assert answer.stop_reason is types.StopReason.LENGTH
            too_long = np.full(limit - 4, 7, np.int32)
            with pytest.raises(PromptTooLongError, match="take prompts of 2041 tokens and 2046"):
                await sampler.generate(too_long, params(), seed=0)
            with pytest.raises(PromptTooLongError, match="exceeds the servers' 2041"):
                await sampler.score(too_long)
            assert len(server.generations) == 1

    run(scenario())


def test_an_aborted_response_that_no_longer_fits_as_a_prompt_ends_there():
    async def scenario():
        async with serving() as (sampler, [server]):
            server.faults = [Fault.ABORT_PARTIAL]
            prompt = np.full(server.context_length - 2 - 5, 7, np.int32)
            answer = await sampler.generate(prompt, params(max_tokens=50), seed=0)
            assert is_expected(answer, prompt, num_tokens=2)
            assert answer.stop_reason is types.StopReason.LENGTH

    run(scenario())


@pytest.mark.parametrize("prompt", [[], [512], [-1, 3]])
def test_ids_outside_the_vocabulary_are_not_sent(prompt):
    async def scenario():
        async with serving() as (sampler, [server]):
            for asked in (
                sampler.generate(np.array(prompt, np.int32), params(), seed=0),
                sampler.score(np.array(prompt, np.int32)),
            ):
                with pytest.raises(ValueError, match="token"):
                    await asked
            assert server.generations == []

    run(scenario())


def test_scores():
    async def scenario():
        async with serving() as (sampler, [server]):
            found = await sampler.score(PROMPT)
            assert found.tolist() == [-12 / 1024, -13 / 1024]
            assert found.dtype == np.float32
            last = np.array([511, 3, 511, 0], np.int32)  # scored as if its ids were 0, 3, 0, 0
            assert (await sampler.score(last)).tolist() == [-4 / 1024, -512 / 1024, -1 / 1024]
            server.faults = [Fault.STATUS_503, Fault.TRUNCATED_JSON]
            assert (await sampler.score(PROMPT)).tolist() == found.tolist()
            assert sampler.counters.retries == 2

    run(scenario())


def test_a_caller_that_leaves_takes_its_request_along():
    async def scenario():
        async with serving() as (sampler, [server]):
            server.hold_after = 2
            asked = asyncio.create_task(sampler.generate(PROMPT, params(), seed=0))
            await server.until(lambda: server.running)
            asked.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asked
            await server.until(lambda: not server.running)
            server.change(hold_after=None)
            assert sampler.metrics()["sampler/in_flight_0"] == 0.0
            assert is_expected(await sampler.generate(PROMPT, params(), seed=0))

    run(scenario())


def test_a_thousand_requests_at_once():
    async def scenario():
        async with serving(2, max_in_flight=200) as (sampler, servers):
            for server in servers:
                server.faults = [Fault.STATUS_429, None, Fault.ABORT_PARTIAL, None] * 20
            prompts = [np.arange(1, 3 + i % 90, dtype=np.int32) for i in range(1000)]
            answers = await asyncio.gather(
                *(
                    sampler.generate(prompt, params(), seed=i, group=i // 10)
                    for i, prompt in enumerate(prompts)
                )
            )
            assert all(map(is_expected, answers, prompts))
            counters = sampler.counters
            assert counters.retries == counters.aborted == counters.resumed == 40
            assert sum(len(server.generations) for server in servers) == counters.requests == 1080
            assert max(server.peak_running for server in servers) <= 200
            assert min(len(server.generations) for server in servers) > 300

    run(scenario())


def test_no_more_requests_are_open_than_allowed():
    async def scenario():
        async with serving(max_in_flight=3) as (sampler, [server]):
            server.hold_after = 1
            asked = [
                asyncio.create_task(sampler.generate(PROMPT, params(), seed=0)) for _ in range(9)
            ]
            await server.until(lambda: len(server.running) == 3)
            await asyncio.sleep(0.02)
            assert sampler.metrics()["sampler/in_flight_0"] == 3.0
            server.change(hold_after=None)
            assert all(is_expected(answer) for answer in await asyncio.gather(*asked))
            assert server.peak_running == 3
            assert sampler.counters.wait_s > 0

    run(scenario())


def test_metrics_count_everything():
    async def scenario():
        async with serving() as (sampler, [server]):
            server.faults = [Fault.STATUS_503, Fault.ABORT_PARTIAL]
            for _ in range(2):
                await sampler.generate(PROMPT, params(), seed=0)
            sampler.set_aside(server.url, "a test")
            found = sampler.metrics()
            assert 0 < found.pop("sampler/wait_s") < 1
            assert found == {
                "sampler/requests": 4.0,
                "sampler/retries": 1.0,
                "sampler/resumed": 1.0,
                "sampler/aborted": 1.0,
                "sampler/in_flight_0": 0.0,
                "sampler/set_aside": 1.0,
            }

    run(scenario())


def test_nothing_is_asked_before_connect():
    async def scenario():
        async with serving() as (sampler, _):
            sampler.replicas.all[0].info = None
            with pytest.raises(RuntimeError, match="before connect"):
                await sampler.generate(PROMPT, params(), seed=0)

    run(scenario())
