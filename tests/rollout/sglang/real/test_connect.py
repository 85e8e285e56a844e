"""What real servers tell, and which are refused."""

import asyncio

import numpy as np
import pytest

from codjax import models
from codjax.rollout.sampler import SamplerError
from codjax.rollout.sglang import wire
from codjax.rollout.sglang.replicas import ExpectedModel
from codjax.rollout.sglang.sampler import SGLangSampler
from codjax.rollout.sglang.server import ServerClient
from tests.rollout.sglang import serving
from tests.rollout.sglang.real import learner, local

pytestmark = local.MARKS


def test_what_a_server_tells(pair):
    async def scenario():
        async with ServerClient(pair.urls[0], pair.reach()) as client:
            assert await client.is_ready()
            assert await client.load() == wire.Load(num_running=0, num_waiting=0)
            return await client.info(), await client.vocab_size()

    info, vocab_size = serving.run(scenario())
    print(info)
    assert info.sglang_version == "0.5.23"
    assert (info.architecture, vocab_size) == ("Qwen3ForCausalLM", learner.CONFIG.vocab_size)
    # Its memory, not its model, ends the context here.
    assert 16000 < info.prompt_tokens < info.context_tokens < 16384 < learner.CONFIG.max_positions
    assert (info.tp_size, info.dp_size, info.has_tokenizer) == (1, 1, False)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"architecture": "LlamaForCausalLM"}, r"runs a Qwen3ForCausalLM .* model is a LlamaFor"),
        ({"vocab_size": 511}, "has a vocabulary of 512, and the model one of 511"),
        ({"context_tokens": 16384}, r"has room for 163\d\d tokens .* are 16384"),
    ],
)
def test_servers_of_another_model_are_refused(pair, changes, complaint):
    wanted = {"architecture": "Qwen3ForCausalLM", "vocab_size": 512, "context_tokens": 4000}

    async def scenario():
        made = SGLangSampler(pair.reach(), ExpectedModel(**(wanted | changes)), run_id="run")
        async with made as sampler:
            with pytest.raises(SamplerError, match=complaint):
                await sampler.connect()

    serving.run(scenario())


def test_a_server_of_a_llama_is_refused(start_servers, tmp_path):
    models.save_pretrained(learner.policy(0, family="llama"), tmp_path / "llama")
    running = start_servers(tmp_path / "llama")
    [url] = running.urls

    async def scenario():
        made = SGLangSampler(running.reach(), learner.EXPECTED, run_id="run")
        async with made as sampler:
            with pytest.raises(SamplerError, match=rf"{url} runs a LlamaForCausalLM \(.*llama\)"):
                await sampler.connect()

    serving.run(scenario())


def test_servers_with_other_weights_are_refused(pair, tmp_path):
    """Another run's, and older ones of this run."""

    async def scenario():
        async with learner.owning(pair, tmp_path) as owner:
            url = pair.urls[0]
            with pytest.raises(wire.WrongWeightsError, match=r"-0', and should have '.*-1': push"):
                await owner.sampler.readmit(url, policy_version=1)
            assert "push them there first" in owner.sampler.replicas.of(url).aside
            made = SGLangSampler(pair.reach(), learner.EXPECTED, run_id="other")
            async with made as other:
                await other.connect()
                with pytest.raises(wire.WrongWeightsError, match="should have 'other-0'"):
                    await other.readmit(url, policy_version=0)
                await other.readmit(url, policy_version=None)  # as a teacher
                scored = await other.score(learner.PROBE)
                gap = np.max(np.abs(scored - learner.score(0, learner.PROBE)))
                assert gap < learner.PREFILL_GAP

    serving.run(scenario())


def test_an_answer_from_stale_weights_is_asked_elsewhere(pair, tmp_path):
    """A server that was put back behind our back, as by a restart that nobody noticed."""

    async def scenario():
        async with learner.owning(pair, tmp_path) as owner:
            await owner.push(owner.by_bytes(1))
            sampler = owner.sampler
            stale, good = sampler.replicas.all
            old = stale.info.weight_version.removesuffix("1") + "0"
            await stale.client.set_version(old)
            answers = await asyncio.gather(
                *(
                    sampler.generate(learner.PROBE, serving.params(), seed=0, group=group)
                    for group in range(2)
                )
            )
            assert [answer.policy_version for answer in answers] == [1, 1]
            assert f"sampled from {old}, older than" in stale.aside
            assert good.aside is None
            assert sampler.counters.retries == 1

    serving.run(scenario())
