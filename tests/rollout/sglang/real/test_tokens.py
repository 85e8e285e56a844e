"""Tokens and log-probs of real servers, against the learner's own forward pass."""

import asyncio
import dataclasses

import jax
import numpy as np
import pytest

from codjax import types
from codjax.rollout.sampler import PromptTooLongError
from tests.rollout.sglang import serving
from tests.rollout.sglang.real import learner, local

pytestmark = local.MARKS
VOCAB_SIZE = learner.CONFIG.vocab_size


def asked(pair, where, requests):
    """Answers of a new run's policy 0 to (prompt, params) of each request, all at once."""

    async def scenario():
        async with learner.owning(pair, where) as owner:
            asks = (
                owner.sampler.generate(prompt, params, seed=0, group=group)
                for group, (prompt, params) in enumerate(requests)
            )
            return await asyncio.gather(*asks)

    return serving.run(scenario())


def test_sampled_tokens_have_the_learners_logprobs(pair, tmp_path):
    prompts = learner.texts([1, 2, 17, 64, 150, 200, 333, 500])
    answers = asked(pair, tmp_path, [(prompt, serving.params(150)) for prompt in prompts])
    gaps = [learner.gap(0, prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    print(f"decode: {max(gaps):.2g} over {len(gaps)} responses")
    assert max(gaps) < learner.DECODE_GAP
    assert all(len(answer.tokens) == 150 for answer in answers)
    assert all(answer.version_spans == (types.VersionSpan(0, 0, 150),) for answer in answers)
    assert len({tuple(answer.tokens) for answer in answers}) == len(answers)
    # Another policy says something quite different.
    assert min(map(learner.gap, [1] * 8, prompts, answers)) > 1.0


@pytest.mark.parametrize(("temperature", "top_p", "top_k"), [(0.7, 1.0, 0), (1.5, 0.8, 20)])
def test_logprobs_are_at_the_temperature_and_over_the_whole_vocabulary(
    pair, tmp_path, temperature, top_p, top_k
):
    params = serving.params(100, temperature=temperature)
    params = dataclasses.replace(params, top_p=top_p, top_k=top_k)
    prompt = learner.PROBE
    [answer] = asked(pair, tmp_path, [(prompt, params)])
    logits = learner.logits(0, np.concatenate([prompt, answer.tokens]))[len(prompt) - 1 : -1]
    logprobs = np.asarray(jax.nn.log_softmax(logits / temperature))
    wanted = logprobs[np.arange(100), answer.tokens]
    assert np.max(np.abs(answer.logprobs - wanted)) < learner.DECODE_GAP
    is_likelier = logprobs > wanted[:, None]
    mass = np.where(is_likelier, np.exp(logprobs), 0.0).sum(axis=1)
    assert mass.max() < top_p + 1e-5
    assert is_likelier.sum(axis=1).max() < (top_k or VOCAB_SIZE)


def test_greedy_tokens_are_the_learners_most_probable_ones(pair, tmp_path):
    prompt = learner.PROBE
    greedy = serving.params(100, temperature=0.0)
    answers = asked(pair, tmp_path, [(prompt, greedy)] * 2)  # one each
    for answer in answers:
        logits = learner.logits(0, np.concatenate([prompt, answer.tokens]))[len(prompt) - 1 : -1]
        np.testing.assert_array_equal(answer.tokens, logits.argmax(axis=1))
        assert learner.gap(0, prompt, answer) < learner.DECODE_GAP  # as if at temperature 1


def test_a_response_ends_at_a_stop_token_or_at_its_budget(pair, tmp_path):
    prompt = learner.PROBE
    [whole] = asked(pair, tmp_path, [(prompt, serving.params(30, temperature=0.0))])
    stop = int(whole.tokens[-1])
    length = whole.tokens.tolist().index(stop) + 1
    stopped, short = asked(
        pair,
        tmp_path,
        [
            (prompt, serving.params(30, stop_tokens=(stop, 3), temperature=0.0)),
            (prompt, serving.params(7, temperature=0.0)),
        ],
    )
    assert whole.stop_reason is types.StopReason.LENGTH
    assert stopped.stop_reason is types.StopReason.STOP_TOKEN
    assert stopped.tokens.tolist() == whole.tokens[:length].tolist()
    assert len(stopped.logprobs) == length
    assert short.stop_reason is types.StopReason.LENGTH
    assert short.tokens.tolist() == whole.tokens[:7].tolist()


def test_a_response_is_shorter_where_the_context_ends(pair, tmp_path):
    async def scenario():
        async with learner.owning(pair, tmp_path) as owner:
            info = owner.sampler.replicas.all[0].info
            [prompt, longer] = learner.texts([info.prompt_tokens - 10, info.prompt_tokens + 1])
            answer = await owner.sampler.generate(prompt, serving.params(100), seed=0)
            assert answer.stop_reason is types.StopReason.LENGTH
            assert len(answer.tokens) == info.context_tokens - len(prompt)
            with pytest.raises(PromptTooLongError):
                await owner.sampler.generate(longer, serving.params(100), seed=0)

    serving.run(scenario())


def test_a_teacher_scores_texts_at_temperature_1(pair, tmp_path):
    """Of any length, many at once, with the first and the last token of the vocabulary in them."""
    texts = learner.texts([2, 3, 40, 64, 129, 500, 1000, 2000], seed=1)
    texts += [np.array([VOCAB_SIZE - 1, 0, VOCAB_SIZE - 1, VOCAB_SIZE - 1, 0, 7], np.int32)]

    async def scenario():
        async with learner.owning(pair, tmp_path) as owner:
            return await asyncio.gather(*map(owner.sampler.score, texts))

    scores = serving.run(scenario())
    gaps = [
        np.max(np.abs(scored - learner.score(0, text)))
        for scored, text in zip(scores, texts, strict=True)
    ]
    print(f"prefill: {max(gaps):.2g} over {len(gaps)} texts")
    assert max(gaps) < learner.PREFILL_GAP
