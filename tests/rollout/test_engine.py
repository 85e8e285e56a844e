"""The in-process sampler: what it returns is what the model says, whatever else it is doing."""

import asyncio

import jax
import numpy as np
import pytest
from flax import nnx

from codjax import models, types
from codjax.rollout import decoding, engine, sampler
from tests import small

CONFIG = small.decoder_config(vocab_size=23, hidden_size=32, intermediate_size=48)


@pytest.fixture(scope="module")
def model():
    return models.init(CONFIG, seed=0)


def make_engine(model, **changes):
    graphdef, variables = nnx.split(model)
    cached = decoding.CachedModel(
        init_cache=lambda rows, length: models.init_cache(CONFIG, rows, length),
        extend=lambda weights, *args: models.extend(nnx.merge(graphdef, weights), *args),
        unembedding=lambda weights: nnx.merge(graphdef, weights).unembedding,
        score=lambda weights, tokens: models.score_rows(graphdef, weights, tokens),
    )
    sizes = {
        "num_slots": 4,
        "max_tokens": 40,
        "prefill_chunks": (4, 8),
        "prefill_rows": 3,
        "decode_steps": 3,
        "min_shared_prefix": 4,
    }
    made = engine.Engine(cached, **(sizes | changes))
    made.load_weights(nnx.to_pure_dict(variables), policy_version=7)
    return made


def params(**changes):
    plain = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_tokens": 10, "stop_tokens": (5,)}
    return sampler.SamplingParams(**(plain | changes))


def prompts(count, *, seed=0, low=3, high=20):
    rng = np.random.default_rng(seed)
    return [rng.integers(6, 23, rng.integers(low, high)).astype(np.int32) for _ in range(count)]


def generate(made, requests):
    async def run():
        return await asyncio.gather(*(made.generate(p, a, seed=s) for p, a, s in requests))

    return asyncio.run(run())


def test_logprobs_are_those_of_the_model(model):
    made = make_engine(model)
    requests = [(p, params(), i) for i, p in enumerate(prompts(9))]

    for (prompt, _, _), answer in zip(requests, generate(made, requests), strict=True):
        tokens = np.concatenate([prompt, answer.tokens])
        expected = np.asarray(models.score(model, tokens[None]))[0, len(prompt) - 1 :]
        np.testing.assert_allclose(answer.logprobs, expected, atol=2e-5)
        assert answer.policy_version == 7
        assert answer.version_spans == (types.VersionSpan(7, 0, len(answer.tokens)),)


def test_an_answer_does_not_depend_on_what_else_is_in_the_batch(model):
    requests = [(p, params(), i) for i, p in enumerate(prompts(12, seed=1))]
    together = generate(make_engine(model, num_slots=5), requests)
    alone = [generate(make_engine(model), [request])[0] for request in requests[:4]]

    for one, other in zip(together[:4], alone, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


def test_equal_rollouts_are_equal_bit_for_bit(model):
    requests = [(p, params(), i) for i, p in enumerate(prompts(12, seed=2))]
    first = generate(make_engine(model), requests)
    second = generate(make_engine(model), requests)

    for one, other in zip(first, second, strict=True):
        assert one.tokens.tobytes() == other.tokens.tobytes()
        assert one.logprobs.tobytes() == other.logprobs.tobytes()


def test_what_the_engine_did_before_leaves_no_trace(model):
    first = [(p, params(), i) for i, p in enumerate(prompts(9, seed=4))]
    second = [(p, params(), i) for i, p in enumerate(prompts(12, seed=2))]
    used = make_engine(model, num_slots=5)
    generate(used, first)
    used.load_weights(nnx.to_pure_dict(nnx.split(model)[1]), policy_version=8)

    after, fresh = generate(used, second), generate(make_engine(model, num_slots=5), second)

    for one, other in zip(after, fresh, strict=True):
        assert one.tokens.tobytes() == other.tokens.tobytes()
        assert one.logprobs.tobytes() == other.logprobs.tobytes()


def test_a_failed_program_is_told_to_every_caller_and_the_engine_goes_on(model, monkeypatch):
    made = make_engine(model)
    working, broken = made._decode, iter([RuntimeError("no such device")])

    def decode(*args, **options):
        for error in broken:
            raise error
        return working(*args, **options)

    monkeypatch.setattr(made, "_decode", decode)
    requests = [(p, params(), i) for i, p in enumerate(prompts(6))]

    async def run():
        return await asyncio.gather(
            *(made.generate(p, a, seed=s) for p, a, s in requests), return_exceptions=True
        )

    assert {str(error) for error in asyncio.run(run())} == {"no such device"}
    answers, fresh = generate(made, requests[:2]), generate(make_engine(model), requests[:2])
    assert [a.tokens.tolist() for a in answers] == [a.tokens.tolist() for a in fresh]


def test_an_event_loop_torn_down_leaves_an_engine_that_works(model):
    made = make_engine(model)

    async def run():
        leaves = asyncio.create_task(made.generate(prompts(1)[0], params(), seed=0))
        await asyncio.sleep(0)
        return leaves

    assert asyncio.run(run()).cancelled()
    made.load_weights(nnx.to_pure_dict(nnx.split(model)[1]), policy_version=8)
    assert generate(made, [(prompts(1)[0], params(), 0)])[0].policy_version == 8


def test_another_seed_gives_another_answer(model):
    prompt = prompts(1)[0]
    answers = generate(make_engine(model), [(prompt, params(), seed) for seed in range(8)])
    assert len({answer.tokens.tobytes() for answer in answers}) > 4


def test_the_next_turn_feeds_only_what_is_new(model):
    made = make_engine(model)
    prompt = prompts(1, low=15, high=16)[0]
    answer = generate(made, [(prompt, params(max_tokens=5, stop_tokens=()), 0)])[0]
    fed = made.stats["fed_tokens"]
    longer = np.concatenate([prompt, answer.tokens, prompts(1, seed=5, low=4, high=5)[0]])

    follow_up = generate(made, [(longer, params(), 1)])[0]

    # The last sampled token was never fed, nor is the last token of a prompt.
    assert made.stats["fed_tokens"] - fed == 4
    fresh = generate(make_engine(model), [(longer, params(), 1)])[0]
    assert follow_up.tokens.tolist() == fresh.tokens.tolist()
    np.testing.assert_allclose(follow_up.logprobs, fresh.logprobs, atol=1e-5)


def test_a_group_shares_its_first_prompt(model):
    made = make_engine(model)
    prompt = prompts(1, low=18, high=19)[0]
    answers = generate(made, [(prompt, params(), seed) for seed in range(4)])

    assert made.stats["fed_tokens"] == 17  # once, but for the last token
    for seed, answer in enumerate(answers):
        alone = generate(make_engine(model), [(prompt, params(), seed)])[0]
        assert answer.tokens.tolist() == alone.tokens.tolist()


def test_new_weights_forget_what_was_cached(model):
    made = make_engine(model)
    prompt = prompts(1, low=15, high=16)[0]
    generate(made, [(prompt, params(), 0)])
    other = models.init(CONFIG, seed=1)
    made.load_weights(nnx.to_pure_dict(nnx.split(other)[1]), policy_version=8)

    answer = generate(made, [(prompt, params(), 0)])[0]

    fresh = generate(make_engine(other), [(prompt, params(), 0)])[0]
    assert answer.tokens.tolist() == fresh.tokens.tolist()
    assert answer.policy_version == 8


@pytest.fixture(scope="module")
def other():
    return models.init(CONFIG, seed=1)


def weights_of(model):
    return nnx.to_pure_dict(nnx.split(model)[1])


async def when(condition):
    """Until the engine, which goes on between any two steps of its callers, has come so far."""
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0)


def generate_while(made, requests, swaps):
    """Answers, while new weights come after the calls of the decoder: (calls, weights, version)."""

    async def run():
        tasks = [asyncio.create_task(made.generate(p, a, seed=s)) for p, a, s in requests]
        for num_calls, weights, version in swaps:
            await when(lambda: made.stats["decode_calls"] >= num_calls)  # noqa: B023
            assert made.stats["decode_calls"] == num_calls
            made.load_weights(weights, policy_version=version)
        return await asyncio.gather(*tasks)

    return asyncio.run(run())


def assert_sampled_by(answer, prompt, weights):
    """Every span has the log-probs of its weights: version → model."""
    tokens = np.concatenate([prompt, answer.tokens])
    for span in answer.version_spans:
        scored = np.asarray(models.score(weights[span.version], tokens[None]))[0]
        expected = scored[len(prompt) - 1 :][span.start : span.end]
        np.testing.assert_allclose(answer.logprobs[span.start : span.end], expected, atol=2e-5)


def test_new_weights_take_over_in_the_middle_of_an_answer(model, other):
    requests = [(p, params(stop_tokens=()), i) for i, p in enumerate(prompts(3))]
    made = make_engine(model)

    answers = generate_while(made, requests, [(2, weights_of(other), 8)])

    before = generate(make_engine(model), requests)
    for (prompt, _, _), answer, old in zip(requests, answers, before, strict=True):
        assert answer.version_spans == (types.VersionSpan(7, 0, 6), types.VersionSpan(8, 6, 10))
        assert answer.policy_version == 7
        assert answer.tokens[:6].tolist() == old.tokens[:6].tolist()
        assert answer.tokens.dtype == np.int32
        assert_sampled_by(answer, prompt, {7: model, 8: other})
    assert [a.tokens.tolist() for a in answers] != [b.tokens.tolist() for b in before]
    # Nothing of the old weights is reused: what is fed again is whole texts but their last tokens.
    whole = sum(len(prompt) - 1 + len(prompt) + 6 - 1 for prompt, _, _ in requests)
    assert made.stats["fed_tokens"] == whole
    assert made.stats["sampled_tokens"] == 30


def test_the_same_weights_again_change_no_token(model):
    requests = [
        *((p, params(stop_tokens=tuple(range(4))), i) for i, p in enumerate(prompts(5))),
        (prompts(1, seed=8)[0], params(stop_tokens=(), top_p=0.8, temperature=1.5), 11),
        (prompts(1, seed=9)[0], params(stop_tokens=(), temperature=0.0), 12),
    ]
    again = [(calls, weights_of(model), 7 + calls) for calls in (1, 2, 4)]

    answers = generate_while(make_engine(model), requests, again)

    for answer, plain in zip(answers, generate(make_engine(model), requests), strict=True):
        assert answer.tokens.tolist() == plain.tokens.tolist()
        assert answer.stop_reason is plain.stop_reason
        np.testing.assert_allclose(answer.logprobs, plain.logprobs, atol=1e-5)
        ends = [0, *(span.end for span in answer.version_spans)]
        assert [span.start for span in answer.version_spans] == ends[:-1]
        assert ends[-1] == len(answer.tokens)
        assert answer.policy_version == answer.version_spans[0].version


def test_spans_of_one_version_are_joined_and_three_stay_apart(model, other):
    request = (prompts(1)[0], params(stop_tokens=()), 0)
    old, new = weights_of(model), weights_of(other)

    (joined,) = generate_while(make_engine(model), [request], [(1, old, 7), (2, new, 8)])
    assert joined.version_spans == (types.VersionSpan(7, 0, 6), types.VersionSpan(8, 6, 10))

    (apart,) = generate_while(make_engine(model), [request], [(1, new, 8), (3, old, 9)])
    assert apart.version_spans == (
        types.VersionSpan(7, 0, 3),
        types.VersionSpan(8, 3, 9),
        types.VersionSpan(9, 9, 10),
    )
    assert_sampled_by(apart, request[0], {7: model, 8: other, 9: model})

    # Two swaps between two calls of the decoder: nothing was sampled by the first.
    (twice,) = generate_while(make_engine(model), [request], [(1, new, 8), (1, old, 9)])
    assert twice.version_spans == (types.VersionSpan(7, 0, 3), types.VersionSpan(9, 3, 10))
    assert_sampled_by(twice, request[0], {7: model, 9: model})


def test_answers_under_way_go_on_before_requests_that_wait(model, other):
    requests = [(p, params(stop_tokens=()), i) for i, p in enumerate(prompts(5))]
    made = make_engine(model, num_slots=2)
    order = []

    async def ask(index):
        prompt, answer_params, seed = requests[index]
        answer = await made.generate(prompt, answer_params, seed=seed)
        order.append(index)
        return answer

    async def run():
        tasks = [asyncio.create_task(ask(index)) for index in range(5)]
        await when(lambda: made.stats["decode_calls"] == 2)
        made.load_weights(weights_of(other), policy_version=8)
        return await asyncio.gather(*tasks)

    answers = asyncio.run(run())

    assert sorted(order[:2]) == [0, 1]
    assert [len(answer.version_spans) for answer in answers] == [2, 2, 1, 1, 1]
    fresh = generate(make_engine(other), requests)
    for (prompt, _, _), answer, new in zip(requests[2:], answers[2:], fresh[2:], strict=True):
        assert answer.policy_version == 8
        assert answer.tokens.tolist() == new.tokens.tolist()
        assert_sampled_by(answer, prompt, {8: other})


def test_a_request_that_only_waits_is_answered_by_the_new_weights_alone(model, other):
    made = make_engine(model)
    prompt = prompts(1)[0]

    async def run():
        task = asyncio.create_task(made.generate(prompt, params(), seed=0))
        await asyncio.sleep(0)
        assert made.stats["decode_calls"] == 0
        made.load_weights(weights_of(other), policy_version=8)
        return await task

    answer = asyncio.run(run())
    (fresh,) = generate(make_engine(other), [(prompt, params(), 0)])
    assert answer.version_spans == (types.VersionSpan(8, 0, len(answer.tokens)),)
    assert answer.tokens.tobytes() == fresh.tokens.tobytes()
    assert answer.logprobs.tobytes() == fresh.logprobs.tobytes()


def test_a_caller_that_left_is_not_gone_on_with(model, other):
    made = make_engine(model)
    requests = [(p, params(stop_tokens=()), i) for i, p in enumerate(prompts(2))]

    async def run():
        leaves, stays = (asyncio.create_task(made.generate(p, a, seed=s)) for p, a, s in requests)
        await when(lambda: made.stats["decode_calls"] == 1)
        leaves.cancel()
        made.load_weights(weights_of(other), policy_version=8)
        answer = await stays
        assert leaves.cancelled()
        return answer

    answer = asyncio.run(run())
    assert made.stats["sampled_tokens"] == 3 + 10  # of the one that left, only those before
    assert answer.version_spans == (types.VersionSpan(7, 0, 3), types.VersionSpan(8, 3, 10))
    assert_sampled_by(answer, requests[1][0], {7: model, 8: other})


def test_a_response_up_to_the_end_of_the_cache_survives_new_weights(model, other):
    prompt = np.arange(6, 21, dtype=np.int32)
    request = (prompt, params(max_tokens=25, stop_tokens=()), 0)
    (answer,) = generate_while(make_engine(model), [request], [(8, weights_of(other), 8)])
    assert answer.version_spans == (types.VersionSpan(7, 0, 24), types.VersionSpan(8, 24, 25))
    assert_sampled_by(answer, prompt, {7: model, 8: other})


def test_how_an_answer_ends(model):
    stopped, cut = generate(
        make_engine(model),
        [
            (prompts(1)[0], params(stop_tokens=tuple(range(4)), temperature=5.0, max_tokens=20), 3),
            (prompts(1)[0], params(stop_tokens=(), max_tokens=6), 0),
        ],
    )
    assert stopped.stop_reason is types.StopReason.STOP_TOKEN
    assert stopped.tokens[-1] in range(4)
    assert not set(stopped.tokens[:-1].tolist()) & set(range(4))
    assert cut.stop_reason is types.StopReason.LENGTH
    assert len(cut.tokens) == 6


def test_greedy_takes_the_most_probable_token(model):
    prompt = prompts(1)[0]
    answer = generate(make_engine(model), [(prompt, params(temperature=0.0, stop_tokens=()), 0)])[0]
    tokens = prompt
    for token in answer.tokens:
        candidates = np.stack([np.append(tokens, v) for v in range(23)])
        assert int(np.asarray(models.score(model, candidates))[:, -1].argmax()) == token
        tokens = np.append(tokens, token)


def sampled_frequencies(logits, count=4000, **changes):
    rows = np.tile(np.asarray(logits, np.float32), (count, 1))
    slots = engine._idle_slots(count)
    for name, value in changes.items():
        getattr(slots, name)[:] = value
    slots.is_active[:] = True
    slots.seed[:] = np.arange(count)
    tokens, logprobs = decoding.sample(
        jax.numpy.asarray(rows), jax.tree.map(jax.numpy.asarray, slots), use_filter=True
    )
    return np.bincount(np.asarray(tokens), minlength=len(logits)) / count, np.asarray(logprobs)


def test_temperature_top_k_and_top_p_draw_from_what_they_leave():
    probabilities = np.array([0.5, 0.3, 0.15, 0.05])
    logits = np.log(probabilities)

    plain, logprobs = sampled_frequencies(logits)
    np.testing.assert_allclose(plain, probabilities, atol=0.03)
    assert set(np.exp(logprobs).round(3).astype(str)) == {"0.5", "0.3", "0.15", "0.05"}

    hot, _ = sampled_frequencies(logits, temperature=2.0)
    np.testing.assert_allclose(hot, probabilities**0.5 / (probabilities**0.5).sum(), atol=0.03)

    top_k, _ = sampled_frequencies(logits, top_k=2)
    np.testing.assert_allclose(top_k, [0.625, 0.375, 0, 0], atol=0.03)

    top_p, _ = sampled_frequencies(logits, top_p=0.6)
    np.testing.assert_allclose(top_p, [0.625, 0.375, 0, 0], atol=0.03)

    only_one, _ = sampled_frequencies(logits, top_p=1e-6)
    assert only_one.tolist() == [1, 0, 0, 0]


def test_score_is_the_models_own(model):
    tokens = prompts(1, low=19, high=20)[0]
    scored = asyncio.run(make_engine(model).score(tokens))
    np.testing.assert_allclose(scored, np.asarray(models.score(model, tokens[None]))[0], atol=1e-5)


def test_a_prompt_that_cannot_fit_is_refused_alone(model):
    made = make_engine(model)

    async def run():
        return await asyncio.gather(
            made.generate(np.arange(6, 20, dtype=np.int32), params(), seed=0),
            made.generate(np.full(35, 7, np.int32), params(), seed=0),
            return_exceptions=True,
        )

    good, bad = asyncio.run(run())
    assert isinstance(good, sampler.Generation)
    assert isinstance(bad, sampler.PromptTooLongError)
    assert "engine.max_tokens = 40" in str(bad)


def test_a_caller_that_leaves_disturbs_nobody(model):
    made = make_engine(model)

    async def run():
        leaves = asyncio.create_task(made.generate(prompts(1)[0], params(), seed=0))
        stays = asyncio.create_task(made.generate(prompts(1)[0], params(), seed=1))
        await asyncio.sleep(0)
        leaves.cancel()
        return await stays

    answer = asyncio.run(run())
    expected = generate(make_engine(model), [(prompts(1)[0], params(), 1)])[0]
    assert answer.tokens.tolist() == expected.tokens.tolist()


def test_many_turns_over_few_slots(model):
    made = make_engine(model, num_slots=3)

    async def episode(index):
        tokens = prompts(1, seed=index, low=3, high=6)[0]
        for turn in range(3):
            answer = await made.generate(tokens, params(max_tokens=4), seed=10 * index + turn)
            tokens = np.concatenate([tokens, answer.tokens, tokens[:2]])
        return tokens

    async def run():
        return await asyncio.gather(*(episode(i) for i in range(8)))

    crowded = asyncio.run(run())
    made = make_engine(model, num_slots=1)
    assert [t.tolist() for t in crowded[:2]] == [asyncio.run(episode(i)).tolist() for i in range(2)]


def test_nothing_is_compiled_twice(model):
    made = make_engine(model)
    generate(made, [(p, params(), i) for i, p in enumerate(prompts(6))])
    sizes = (made._prefill._cache_size(), made._decode._cache_size())
    generate(made, [(p, params(), i) for i, p in enumerate(prompts(9, seed=3))])
    assert made._decode._cache_size() == sizes[1] == 1
    assert made._prefill._cache_size() <= 2  # one per chunk length
