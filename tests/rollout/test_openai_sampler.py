"""An endpoint as a sampler: both routes, what it may do wrong, and where the key does not go."""

import asyncio
import dataclasses
import email.utils
import logging
import time

import numpy as np
import pytest

from codjax import chat as chats
from codjax import checks, types
from codjax import config as config_lib
from codjax.rollout import openai_client, openai_sampler
from codjax.rollout import openai_wire as wire
from codjax.rollout.sampler import PromptTooLongError, SamplerError, SamplingParams
from tests.rollout.fake_endpoint import FakeEndpoint, served

CHAT = chats.load_chat("builtin:bytes")
MESSAGES = [chats.Message("system", "Be brief."), chats.Message("user", "Where <|im_end|> to?")]
PROMPT = CHAT.encode(MESSAGES)
END = CHAT.end_of_turn
KEY = "sk-very-secret"


def says(text="left"):
    return lambda prompt, rng: text


def params(**changes):
    made = SamplingParams(
        temperature=0.7, top_p=0.9, top_k=0, max_tokens=20, stop_tokens=CHAT.stop_tokens
    )
    return dataclasses.replace(made, **changes)


def settings(endpoint, **changes):
    made = openai_client.EndpointSettings(
        url=endpoint.url,
        model=None,
        route="completions",
        api_key=None,
        api_key_variable=None,
        max_in_flight=8,
        request_timeout_s=5.0,
        max_retries=3,
        backoff_s=0.001,
    )
    return dataclasses.replace(made, **changes)


def asked(endpoint, *, num=1, sampling=None, prompt=PROMPT, **changes):
    """(generations, sampler) of `num` requests at once."""

    async def inner():
        made = settings(endpoint, **changes)
        model = await openai_sampler.find_model(made)
        sampler = openai_sampler.OpenAISampler(made, model, CHAT)
        await sampler.open()
        try:
            requests = [
                sampler.generate(prompt, sampling or params(), seed=2**40 + index)
                for index in range(num)
            ]
            return await asyncio.gather(*requests), sampler
        finally:
            await sampler.close()

    return asyncio.run(inner())


def answer_of(endpoint, **changes):
    (generation,), _ = asked(endpoint, **changes)
    return generation


# Both routes.


def test_completions_take_and_give_token_ids():
    with served(FakeEndpoint(says(), CHAT)) as endpoint:
        (generation,), sampler = asked(endpoint)
    assert generation.tokens.tolist() == [*b"left", END]
    assert generation.tokens.dtype == np.int32
    assert generation.logprobs.tolist() == [0.0] * 5
    assert generation.stop_reason is types.StopReason.STOP_TOKEN
    assert generation.version_spans == (types.VersionSpan(0, 0, 5),)
    assert endpoint.bodies == [
        {
            "model": "tiny",
            "prompt": PROMPT.tolist(),
            "max_tokens": 20,
            "temperature": 0.7,
            "top_p": 0.9,
            "seed": 0,  # 2**40, below 2**31
            "stream": False,
            # Said, since else they are the model's own defaults.
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": [END],
            "return_token_ids": True,
        }
    ]
    assert (sampler.counters.requests, sampler.num_recounted) == (1, 0)


def test_completions_of_a_plain_endpoint_are_counted_by_our_tokenizer():
    with served(FakeEndpoint(says(), CHAT, kind="somebody")) as endpoint:
        (generation,), sampler = asked(endpoint)
    assert generation.tokens.tolist() == [*b"left", END]
    assert generation.stop_reason is types.StopReason.STOP_TOKEN
    (body,) = endpoint.bodies
    assert body["stop"] == ["<|im_end|>"]
    assert not body.keys() & {"top_k", "min_p", "stop_token_ids", "return_token_ids"}
    assert sampler.num_recounted == 1


def test_chat_sends_the_messages_of_the_prompt():
    later = CHAT.extend(PROMPT, CHAT.respond("hm"), "And now?")
    for kind in ("vllm", "somebody"):
        with served(FakeEndpoint(says("é"), CHAT, kind=kind)) as endpoint:
            generation = answer_of(endpoint, route="chat", prompt=later)
        assert generation.tokens.tolist() == [*"é".encode(), END]
        (body,) = endpoint.bodies
        assert endpoint.paths == ["/v1/chat/completions"]
        assert body["messages"] == [
            *({"role": role, "content": content} for role, content in MESSAGES),
            {"role": "assistant", "content": "hm"},
            {"role": "user", "content": "And now?"},
        ]
        assert not body.keys() & {"prompt", "stop", "stop_token_ids"}
        thinks = {"enable_thinking": False} if kind == "vllm" else None
        assert body.get("chat_template_kwargs") == thinks


@pytest.mark.parametrize("route", ["completions", "chat"])
@pytest.mark.parametrize("kind", ["vllm", "somebody"])
def test_an_answer_that_was_cut_has_no_end(route, kind):
    with served(FakeEndpoint(says("0123456789"), CHAT, kind=kind)) as endpoint:
        generation = answer_of(endpoint, route=route, sampling=params(max_tokens=4))
    assert generation.tokens.tolist() == [*b"0123"]
    assert generation.stop_reason is types.StopReason.LENGTH


def parsed(choice, *, route="completions", max_tokens=20):
    return wire.ROUTES[route].parse(
        {"choices": [choice]}, prompt=PROMPT, params=params(), chat=CHAT, max_tokens=max_tokens
    )


def test_odd_answers_that_are_answers():
    cases = [
        # Stop tokens that the endpoint did not know, or writes out.
        ("completions", {"text": "", "token_ids": [97, END, 98], "finish_reason": "length"}, "a!"),
        ("completions", {"text": "a<|im_end|>b", "finish_reason": "length"}, "a!"),
        # It stopped at an end-of-text token of its own, which has no place in ours.
        ("completions", {"text": "ab", "token_ids": [97, 98], "finish_reason": "stop"}, "ab"),
        ("completions", {"text": "", "finish_reason": "stop"}, "!"),
        # Cut while it was thinking; a response has at least one token.
        ("chat", {"message": {"content": None}, "finish_reason": "length"}, "!"),
        ("chat", {"message": {"content": None, "refusal": "No."}, "finish_reason": "stop"}, "No.!"),
        # Of a character cut in half everyone shows what he likes.
        (
            "completions",
            {"text": "a", "token_ids": [97, 195], "finish_reason": "length"},
            "a\ufffd",
        ),
    ]
    for route, choice, expected in cases:
        answer = parsed(choice, route=route)
        assert CHAT.show(answer.tokens).replace("<|im_end|>", "!") == expected
        is_cut = choice["finish_reason"] == "length" and not expected.endswith("a!")
        assert answer.is_stop is not is_cut


def test_a_wish_that_only_some_endpoints_grant_is_refused_elsewhere():
    with served(FakeEndpoint(says(), CHAT)) as endpoint:
        answer_of(endpoint, sampling=params(top_k=5))
        assert endpoint.bodies[0]["top_k"] == 5
        endpoint.kind = "somebody"
        with pytest.raises(SamplerError, match=r"evaluation\.top_k must be 0: .*; got 5\."):
            answer_of(endpoint, sampling=params(top_k=5))


def test_models_that_know_the_limit_by_its_newer_name():
    class Newer(FakeEndpoint):
        async def _generation(self, request, body, ids, text):
            if "max_tokens" in body:
                self.faults = [400]
                self.text = "Unsupported parameter: use 'max_completion_tokens' instead."
            return await super()._generation(request, body, ids, text)

    with served(Newer(says(), CHAT, kind="somebody")) as endpoint:
        generations, _ = asked(endpoint, num=4, route="chat")
        assert [g.tokens.tolist() for g in generations] == [[*b"left", END]] * 4
        assert sum("max_completion_tokens" in body for body in endpoint.bodies) == 4


def test_it_is_read_only():
    with served(FakeEndpoint(says(), CHAT)) as endpoint:
        _, sampler = asked(endpoint)
        with pytest.raises(SamplerError, match="is read-only: it cannot score"):
            asyncio.run(sampler.score(PROMPT))
        with pytest.raises(SamplerError, match="is read-only: it takes no weights"):
            sampler.load_weights(None, policy_version=1)
        with pytest.raises(RuntimeError, match="before open, or after close"):
            asyncio.run(sampler.generate(PROMPT, params(), seed=0))


def test_a_template_that_hides_messages_needs_completions():
    symbols = chats.load_chat("builtin:symbols")
    model = wire.Model(name="tiny", context_tokens=None, is_extended=True)
    with served(FakeEndpoint(says(), CHAT)) as endpoint:
        openai_sampler.OpenAISampler(settings(endpoint), model, symbols)
        with pytest.raises(checks.ConfigError, match=r"endpoint\.route must be completions .*mark"):
            openai_sampler.OpenAISampler(settings(endpoint, route="chat"), model, symbols)


# What goes wrong for a while.

PASSING = [429, 500, 502, 503, 408, "closed", "truncated", "no object", "no choices"]
PASSING += ["choice is text", "null", "number", "no reason", "tools", "aborted"]
OF_IDS = ["no tokens", "too many tokens", "float tokens", "negative tokens", "other prompt"]


@pytest.mark.parametrize("route", ["completions", "chat"])
def test_what_passes_is_asked_again(route):
    faults = PASSING + (OF_IDS if route == "completions" else [])
    with served(FakeEndpoint(says(), CHAT)) as endpoint:
        for fault in faults:
            endpoint.faults = [fault, fault]
            (generation,), sampler = asked(endpoint, route=route)
            assert generation.tokens.tolist() == [*b"left", END], fault
            assert (sampler.counters.requests, sampler.counters.retries) == (3, 2), fault


def test_a_storm_of_429_ends(caplog):
    with served(FakeEndpoint(says(), CHAT)) as endpoint:
        endpoint.faults = [429] * 40
        generations, sampler = asked(endpoint, num=20, max_retries=8)
    assert len(generations) == 20
    assert (sampler.counters.requests, sampler.counters.retries) == (60, 40)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (429, r"answered 429: told to \(lower evaluation\.endpoint\.max_in_flight\?\)"),
        (500, r"/v1/completions answered 500: told to"),
        ("truncated", r"sent \d+ bytes that are no whole JSON"),
        ("no object", r"choices should be list, and is None"),
        ("no choices", r"it sent no choices"),
        ("null", r"cannot be believed: text should be str, and is None"),
        ("tools", r"finished for a reason that nobody asked for: 'tool_calls'"),
        ("no tokens", r"it sent 0 tokens when asked for 1 to 20"),
        ("other prompt", r"it read other tokens than it was sent"),
    ],
)
def test_what_does_not_pass_is_given_up(fault, words):
    with served(FakeEndpoint(says(), CHAT)) as endpoint:
        endpoint.always = fault
        message = r"^gave up after 3 tries \(evaluation\.endpoint\.max_retries is 2\), the last: "
        with pytest.raises(SamplerError, match=f"{message}.*{words}"):
            answer_of(endpoint, max_retries=2)
        assert len(endpoint.bodies) == 3


def test_an_answer_that_comes_too_late_is_asked_for_again():
    with served(FakeEndpoint(says(), CHAT)) as endpoint:
        endpoint.faults = ["late"]
        assert answer_of(endpoint, request_timeout_s=0.2).tokens.tolist() == [*b"left", END]
        endpoint.always = "late"
        with pytest.raises(
            SamplerError, match=r"no answer within 0\.1 s \(evaluation\.endpoint\.re"
        ):
            answer_of(endpoint, request_timeout_s=0.1, max_retries=1)


def test_an_endpoint_that_wants_to_be_left_alone_is():
    with served(FakeEndpoint(says(), CHAT)) as endpoint:
        endpoint.faults, endpoint.headers = [429], {"Retry-After": "0.3"}
        start = time.monotonic()
        answer_of(endpoint)
        assert time.monotonic() - start >= 0.3
        endpoint.faults, endpoint.headers = [503], {"Retry-After": "10000"}
        start = time.monotonic()
        answer_of(endpoint, request_timeout_s=0.2)  # no longer than that
        assert time.monotonic() - start < 5


def test_times_to_be_left_alone_for():
    in_a_minute = email.utils.formatdate(time.time() + 60, usegmt=True)
    assert 50 < openai_client._retry_after({"Retry-After": in_a_minute}) <= 60
    for text in ("-1", "nan", "soon", "", "Wed, 21 Oct 2015 07:28:00 GMT"):
        assert openai_client._retry_after({"Retry-After": text}) == 0.0
    assert openai_client._retry_after({}) == 0.0


def test_no_more_requests_are_open_than_allowed():
    with served(FakeEndpoint(says(), CHAT)) as endpoint:
        asked(endpoint, num=30, max_in_flight=3)
        assert endpoint.peak_in_flight == 3


# What does not pass.


def test_what_is_refused_is_not_asked_again():
    with served(FakeEndpoint(says(), CHAT)) as endpoint:
        for status in (400, 404, 422, 301):
            endpoint.always = status
            with pytest.raises(SamplerError, match=rf"/v1/completions answered {status}: told to$"):
                answer_of(endpoint)
        assert len(endpoint.bodies) == 4


@pytest.mark.parametrize(
    "text",
    [
        "This model's maximum context length is 2048 tokens. However, you requested 3000.",
        "The input (3000 tokens) is longer than the model's context length (2048 tokens).",
        "the request exceeds the available context size, try increasing it",
        "'max_tokens' or 'max_completion_tokens' is too large: 9. This model's maximum context "
        "length is 5 tokens.",
        "prompt is too long: 210000 tokens > 200000 maximum",
    ],
)
def test_a_context_that_is_full_ends_the_episode(text):
    with served(FakeEndpoint(says(), CHAT)) as endpoint:
        endpoint.always, endpoint.text = 400, text
        with pytest.raises(PromptTooLongError):
            answer_of(endpoint)
        assert len(endpoint.bodies) == 1


def test_a_known_context_limits_what_is_asked_for():
    with served(FakeEndpoint(says("x" * 99), CHAT, context=len(PROMPT) + 7)) as endpoint:
        generation = answer_of(endpoint)
        assert (len(generation.tokens), endpoint.bodies[0]["max_tokens"]) == (7, 7)
        endpoint.context = len(PROMPT)
        with pytest.raises(PromptTooLongError, match="leaves no room for a response"):
            answer_of(endpoint)


def test_another_tokenizer_is_found_out():
    message = r"reads 'hi there' in tokens in which tokenizer.source reads 'a'; set it to the fold"
    for ids in ([97], [97, END], [97, 4000]):  # the last is none of ours
        with pytest.raises(wire.OtherTokenizerError, match=message):
            parsed({"text": "hi there", "token_ids": ids, "finish_reason": "stop"})


def test_texts_that_do_not_tell_tokenizers_apart():
    cases = [("a b", "ab "), ("", "hi"), ("ab", "ab"), ("a\ufffd", "hi")]
    for text, ours in cases:
        ids = CHAT.respond(ours).tolist()
        assert parsed({"text": text, "token_ids": ids, "finish_reason": "stop"}).has_ids
    # An unused id of a vocabulary that was filled up to a round number.
    assert len(parsed({"text": "a", "token_ids": [97, 300], "finish_reason": "length"}).tokens) == 2


# Finding the model.


def found(endpoint, **changes):
    return asyncio.run(openai_sampler.find_model(settings(endpoint, **changes)))


def test_the_only_model_need_not_be_named():
    with served(FakeEndpoint(says(), CHAT, context=2048)) as endpoint:
        assert found(endpoint) == wire.Model(name="tiny", context_tokens=2048, is_extended=True)
        assert found(endpoint, model="tiny") == found(endpoint)


def test_models_that_are_not_there():
    cases = [
        (["qwen3-8b", "qwen3-32b"], None, r"which lists qwen3-8b, qwen3-32b; got None\.$"),
        (["qwen3-8b"], "qwen3-8", r"lists qwen3-8b; got 'qwen3-8' \(did you mean qwen3-8b\?\)\.$"),
        ([f"m{index}" for index in range(12)], "x", r"lists m0, m1, .*, m9 and 2 more; got 'x'\.$"),
        ([], None, r"which lists none; got None\.$"),
        (None, None, r"/models answered 404: Not Found; does the address end in /v1\?$"),
    ]
    with served(FakeEndpoint(says(), CHAT)) as endpoint:
        for models, name, message in cases:
            endpoint.models = models
            with pytest.raises(checks.ConfigError, match=message):
                found(endpoint, model=name)


def test_an_endpoint_without_a_list_is_believed():
    with served(FakeEndpoint(says(), CHAT, models=None)) as endpoint:
        assert found(endpoint, model="mine") == wire.Model(
            name="mine", context_tokens=None, is_extended=False
        )


def test_lists_of_models():
    assert [m.name for m in wire.parse_models([{"id": "a"}, {"id": "b"}])] == ["a", "b"]
    for answer in ({}, {"data": 3}, {"data": [{"name": "a"}]}, "a"):
        with pytest.raises(SamplerError):
            wire.parse_models(answer)


def test_an_endpoint_that_is_not_there():
    with served(FakeEndpoint(says(), CHAT)) as endpoint:
        gone = settings(endpoint, max_retries=1)
    with pytest.raises(checks.ConfigError, match=r"^--checkpoint: gave up after 2 tries .*Connect"):
        asyncio.run(openai_sampler.find_model(gone))


# The key.


def endpoint_section(**changes):
    section = config_lib.default_config().evaluation.endpoint
    section.update(changes)
    return section


def test_the_key_is_sent_and_shown_nowhere(monkeypatch, caplog):
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")
    caplog.set_level(logging.DEBUG)
    with served(FakeEndpoint(says(), CHAT, api_key=KEY)) as endpoint:
        made = openai_client.settings_from(
            endpoint.url + "/", endpoint_section(api_key_variable="MY_KEY", model="tiny")
        )
        assert (made.api_key, made.url) == (KEY, endpoint.url)
        assert KEY not in repr(made)
        answer_of(endpoint, api_key=made.api_key, api_key_variable="MY_KEY")
        assert set(endpoint.keys) == {f"Bearer {KEY}"}
        endpoint.api_key = "another"
        with pytest.raises(checks.ConfigError, match=r"401: .*variable MY_KEY, ev.* not one") as no:
            answer_of(endpoint, api_key=made.api_key, api_key_variable="MY_KEY")
        assert KEY not in str(no.value)
        assert "Incorrect API key provided: Bearer [the key]" in str(no.value)
        with pytest.raises(checks.ConfigError, match=r"api_key_variable names no variable with a"):
            answer_of(endpoint)
        assert endpoint.keys[-1] is None
    assert KEY not in caplog.text


@pytest.mark.parametrize("value", [None, "", "  ", "two\nlines", "schlüssel"])
def test_a_variable_without_a_key(value, monkeypatch):
    if value is not None:
        monkeypatch.setenv("MY_KEY", value)
    with pytest.raises(checks.ConfigError, match="is not set, is empty, or is no single") as error:
        openai_client.settings_from("http://a/v1", endpoint_section(api_key_variable="MY_KEY"))
    assert "MY_KEY" not in str(error.value)  # it may be the key, by mistake
