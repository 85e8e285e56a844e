"""Pauses and aborts of real servers, and what they do to responses that are under way."""

import asyncio

import numpy as np
import pytest

from codjax import types
from codjax.rollout.sampler import RefusedError
from codjax.rollout.sglang import wire
from tests.rollout.sglang import serving
from tests.rollout.sglang.real import learner, local

pytestmark = local.MARKS
[PROMPT] = learner.texts([30], seed=4)


async def is_held(task):
    """Whether something is still not answered after a while in which it could have been."""
    await asyncio.wait([task], timeout=1.0)
    return not task.done()


@pytest.mark.parametrize("mode", ["abort", "retract", "in_place"])
def test_a_pause(pair, tmp_path, mode):
    """abort ends requests with what they have; the others keep them; none takes new ones."""

    async def scenario():
        async with learner.owning(pair, tmp_path) as owner:
            replica = owner.sampler.replicas.all[0]
            client = replica.client
            run_id = replica.info.weight_version.rpartition("-")[0]

            def ask(num_tokens):
                asking = client.generate(
                    PROMPT,
                    serving.params(),
                    max_new_tokens=num_tokens,
                    vocab_size=512,
                    run_id=run_id,
                    oldest_version=0,
                )
                return asyncio.create_task(asking)

            running = ask(1500)
            await learner.all_running(owner.sampler, num_requests=1, urls=[client.url])
            await client.pause(mode)
            new = ask(5)
            assert await is_held(new)
            assert not await client.is_ready()
            assert running.done() == (mode == "abort")
            if mode == "in_place":  # it keeps the keys and values of what it holds
                with pytest.raises(RefusedError, match="flush"):
                    await client.flush()
            else:
                await client.flush()
            await client.continue_()
            answers = await asyncio.gather(running, new)
            assert await client.is_ready()
            whole, held = answers
            print(mode, len(whole.tokens))
            if mode == "abort":
                assert whole.finish is wire.Finish.ABORT
                assert 0 < len(whole.tokens) < 1500
            else:
                assert whole.finish is wire.Finish.LENGTH
                assert len(whole.tokens) == 1500
            assert len(held.tokens) == 5
            for answer in answers:
                assert learner.gap(0, PROMPT, answer) < learner.DECODE_GAP

    serving.run(scenario())


def test_a_paused_server_holds_a_scoring_request(pair, tmp_path):
    """Which is why a push probes after `continue`."""

    async def scenario():
        async with learner.owning(pair, tmp_path) as owner:
            client = owner.sampler.client(pair.urls[0])
            await client.pause("retract")
            scoring = asyncio.create_task(client.score(PROMPT))
            assert await is_held(scoring)
            await client.continue_()
            gap = np.max(np.abs(await scoring - learner.score(0, PROMPT)))
            assert gap < learner.PREFILL_GAP

    serving.run(scenario())


def test_aborted_responses_lose_no_token_and_double_none(pair, tmp_path):
    """A greedy one is what it is without aborts; a sampled one has the log-probs of its text."""

    async def scenario():
        async with learner.owning(pair, tmp_path) as owner:
            sampler = owner.sampler
            greedy, sampled = serving.params(1500, temperature=0.0), serving.params(1500)
            calm = await sampler.generate(PROMPT, greedy, seed=0)
            asked = [
                asyncio.create_task(sampler.generate(PROMPT, params, seed=0, group=group))
                for group, params in enumerate([greedy, greedy, sampled, sampled])
            ]
            for num_aborts in range(1, 4):
                await learner.all_running(sampler, num_requests=2)
                await asyncio.sleep(0.1)
                for url in pair.urls:
                    await sampler.client(url).abort_all()
                await learner.until(
                    lambda so_far=4 * num_aborts: sampler.counters.resumed == so_far
                )
            answers = await asyncio.gather(*asked)
            print(sampler.counters)
            assert sampler.counters.aborted == sampler.counters.resumed == 12
            assert sampler.counters.retries == 0
            for answer in answers:
                assert len(answer.tokens) == len(answer.logprobs) == 1500
                assert answer.version_spans == (types.VersionSpan(0, 0, 1500),)
                assert learner.gap(0, PROMPT, answer) < learner.DECODE_GAP
            for answer in answers[:2]:
                np.testing.assert_array_equal(answer.tokens, calm.tokens)

    serving.run(scenario())


def test_a_drained_server_is_idle_and_its_responses_go_on_elsewhere(pair, tmp_path):
    async def scenario():
        async with learner.owning(pair, tmp_path) as owner:
            sampler = owner.sampler
            params = serving.params(1000)
            asked = [
                asyncio.create_task(sampler.generate(PROMPT, params, seed=0, group=group))
                for group in range(4)
            ]
            await learner.all_running(sampler, num_requests=2)
            await sampler.drain([pair.urls[0]])
            load = await sampler.client(pair.urls[0]).load()
            assert load == wire.Load(num_running=0, num_waiting=0)
            answers = await asyncio.gather(*asked)
            assert [len(answer.tokens) for answer in answers] == [1000] * 4
            assert (sampler.counters.resumed, sampler.counters.retries) == (2, 0)
            for answer in answers:
                assert learner.gap(0, PROMPT, answer) < learner.DECODE_GAP

    serving.run(scenario())
