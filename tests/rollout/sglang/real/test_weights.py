"""Both ways of weights into real servers, and what becomes of responses that are under way."""

import asyncio

import numpy as np
import pytest

from codjax import types
from codjax.rollout.sglang import weights
from tests.rollout.sglang import serving
from tests.rollout.sglang.real import learner, local

pytestmark = local.MARKS
[PROMPT] = learner.texts([30], seed=2)


async def scored_gap(client, version):
    [text] = learner.texts([100], seed=3)
    return np.max(np.abs(await client.score(text) - learner.score(version, text)))


def test_pushed_weights_are_those_that_answer(pair, tmp_path):
    async def scenario():
        async with learner.owning(pair, tmp_path) as owner:
            clients = [owner.sampler.client(url) for url in pair.urls]
            for version, stage in [(1, owner.by_disk), (2, owner.by_bytes), (3, owner.by_disk)]:
                staged = stage(version)
                outcomes = await owner.push(staged)
                for client, outcome in zip(clients, outcomes, strict=True):
                    route = f"{len(staged.payloads)} payloads" if staged.payloads else "disk"
                    print(f"{staged.num_bytes} bytes by {route} in {outcome.seconds:.2f} s")
                    assert outcome.gap < learner.PREFILL_GAP
                    assert await scored_gap(client, version) < learner.PREFILL_GAP
                    assert await scored_gap(client, version - 1) > 1.0
                    assert (await client.model_info())["weight_version"] == staged.version

    serving.run(scenario())


def test_a_response_goes_on_under_new_weights(pair, tmp_path):
    """Each span of it has the log-probs of its own policy, given all tokens before it."""

    async def scenario():
        async with learner.owning(pair, tmp_path) as owner:
            sampler, later = owner.sampler, [owner.by_disk(1), owner.by_bytes(2)]
            params = serving.params(1500)
            asked = [
                asyncio.create_task(sampler.generate(PROMPT, params, seed=0, group=group))
                for group in range(4)
            ]
            await learner.all_running(sampler, num_requests=2)
            for staged in later:
                await asyncio.sleep(0.2)
                await owner.push(staged)
            answers = await asyncio.gather(*asked)
            assert sampler.counters.requests == 4
            for answer in answers:
                check_spans(answer)

    serving.run(scenario())


def check_spans(answer):
    spans = answer.version_spans
    print([(span.version, span.start, span.end) for span in spans])
    assert [span.version for span in spans] == [0, 1, 2]
    assert answer.policy_version == 0
    assert [span.start for span in spans] == [0, *(span.end for span in spans[:-1])]
    assert spans[-1].end == len(answer.tokens) == len(answer.logprobs) == 1500
    for span in spans:
        part = slice(span.start, span.end)
        assert learner.gap(span.version, PROMPT, answer, part) < learner.DECODE_GAP
        assert learner.gap((span.version + 1) % 3, PROMPT, answer, part) > 1.0


def test_weights_that_are_not_what_they_are_called_are_found_out(pair, tmp_path):
    """The server says that all went well; what it was answering is asked elsewhere."""

    async def scenario():
        async with learner.owning(pair, tmp_path) as owner:
            sampler = owner.sampler
            first, second = sampler.replicas.all
            wrong = learner.named_weights(
                1,
                first.info.weight_version.rpartition("-")[0],
                tensors=learner.named_weights(2, "").tensors,
            )
            params = serving.params(1000)
            asked = asyncio.create_task(sampler.generate(PROMPT, params, seed=0))
            await learner.all_running(sampler, num_requests=1, urls=[first.url])
            [outcome] = await owner.pusher.push(weights.stage_payloads(wrong), [first.client])
            print(outcome.error)
            assert not outcome.ok
            assert "does not have the weights" in outcome.error
            assert outcome.gap > 1.0
            assert first.aside in outcome.error
            answer = await asked
            assert answer.version_spans == (types.VersionSpan(0, 0, 1000),)
            assert learner.gap(0, PROMPT, answer) < learner.DECODE_GAP
            assert second.aside is None

    serving.run(scenario())


def test_a_wrong_shape_never_reaches_a_server(pair, tmp_path):
    """SGLang would die of it."""
    turned = [(name, array.T) for name, array in learner.named_weights(1, "run").tensors]

    async def scenario():
        async with learner.owning(pair, tmp_path) as owner:
            with pytest.raises(weights.WeightsError, match=r"must be float32 of shape .* got"):
                weights.stage_payloads(learner.named_weights(1, "run", tensors=turned))
            for url in pair.urls:
                assert await scored_gap(owner.sampler.client(url), 0) < learner.PREFILL_GAP

    serving.run(scenario())
