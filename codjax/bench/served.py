"""`codjax bench rollout`, over HTTP: what a model call costs when a server answers it.

The server is a script in another process (`scripted_server`), so all that is measured is ours or
aiohttp's. Beside every variant stands the bare exchange: bodies and answers of the same bytes,
posted and read with aiohttp by the shortest code that does it. Nothing that uses aiohttp can cost
less; what ours costs beside it is encoding, decoding, checks and records.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import random
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import aiohttp
import numpy as np

from codjax import chat as chats
from codjax import types
from codjax.bench import material, scripted_server
from codjax.envs import frozen_lake_compact as lake
from codjax.rollout import sampler as samplers
from codjax.rollout import scripted
from codjax.rollout.sglang import replicas, server, wire
from codjax.rollout.sglang import sampler as sglang

SCRIPTED, HTTP, BARE = "scripted sampler", "SGLangSampler", "bare HTTP exchange"
FROZEN = "SGLangSampler, gc.freeze"
# (prompt tokens, response tokens)
MESSAGES = {"short": (100, 20), "long": (8000, 1000)}
_NUM_IN_TURN = 4  # messages of a client, one after the other
_RUN_ID = "bench"
_ARCHITECTURE = "Qwen3ForCausalLM"
_CONTEXT_TOKENS = 32_768
_VOCAB_SIZE = 151_936  # so that most ids have five or six digits, as those of published models


class Response(NamedTuple):
    """A response made before: int32 and float32 `[m]`."""

    tokens: np.ndarray
    logprobs: np.ndarray


class _Clients(NamedTuple):
    """The two clients of one server, and the event loop that they live in."""

    runner: asyncio.Runner
    server: scripted_server.Server
    sampler: sglang.SGLangSampler
    session: aiohttp.ClientSession

    def post(self, chains: Sequence[Sequence[bytes]]) -> None:
        """Posts bodies and reads the answers: chains side by side, the bodies of each in turn."""
        self.runner.run(self._post(chains))

    async def _post(self, chains: Sequence[Sequence[bytes]]) -> None:
        url, headers = f"{self.server.url}/generate", {"Content-Type": "application/json"}

        async def chain(bodies: Sequence[bytes]) -> None:
            for body in bodies:
                async with self.session.post(url, data=body, headers=headers) as response:
                    await response.read()

        await asyncio.gather(*map(chain, chains))


def rollouts(
    *, num_packs: int, group_size: int, pack_size: int, latency_s: float, rounds: int
) -> list[material.Row]:
    """The same rollouts of the compact environment in process, over HTTP, and as bare exchanges.

    Returns:
        A row for each: runs, model calls, seconds, calls per second, microseconds of the client's
        processor per call, and most requests that the server had at once. Of the sampler over
        HTTP also the share of its time that the one in process does not need (`http_frac`), and
        that time in multiples of the bare exchange (`x_bare`). Over HTTP once more with what is
        in memory before, some libraries of machine learning, kept from the garbage collector.
    """
    chat = chats.load_chat("builtin:symbols")
    config = material.compact_config(num_tasks=num_packs * pack_size)
    responses = _responses(chat)

    def play(sampler: samplers.Sampler) -> Coroutine[Any, Any, list[material.Group]]:
        return material.playing(
            config,
            chat,
            sampler,
            num_packs=num_packs,
            pack_size=pack_size,
            group_size=group_size,
        )

    def in_process() -> scripted.ScriptedSampler:
        return scripted.ScriptedSampler(_script(responses))

    counting = in_process()
    expected = asyncio.run(play(counting))
    texts = {
        last: [_answer(response, stops=True) for response in choices]
        for last, choices in responses.items()
    }
    with _clients(texts, latency_s, vocab_size=chat.vocab_size) as clients:

        def over_http() -> None:
            clients.runner.run(play(clients.sampler))

        _check_same(expected, clients.runner.run(play(clients.sampler)))
        peak = clients.server.peak_in_flight()
        chains = [[_body(turn.prompt_tokens) for turn in turns] for turns in _turns(expected)]
        clients.post(chains)
        bare_peak = clients.server.peak_in_flight()
        timings = material.in_turn(
            {
                SCRIPTED: lambda: clients.runner.run(play(in_process())),
                HTTP: over_http,
                BARE: lambda: clients.post(chains),
                FROZEN: lambda: _frozen(over_http),
            },
            rounds=rounds,
        )
    cpu = {name: timing.cpu_s for name, timing in timings.items()}
    extra_s = cpu[HTTP] - cpu[SCRIPTED]
    ratios: dict[str, material.Row] = {
        SCRIPTED: {"http_frac": 0.0, "x_bare": None, "peak_in_flight": counting.peak_in_flight},
        HTTP: {
            "http_frac": extra_s / cpu[HTTP],
            "x_bare": extra_s / cpu[BARE],
            "peak_in_flight": peak,
        },
        BARE: {"http_frac": 1.0, "x_bare": 1.0, "peak_in_flight": bare_peak},
        FROZEN: {"http_frac": None, "x_bare": None, "peak_in_flight": None},
    }
    runs: material.Row = {"runs": num_packs * group_size}
    return [
        {"variant": name} | runs | _numbers(timing, counting.num_requests) | ratios[name]
        for name, timing in timings.items()
    ]


def messages(*, num_requests: int, latency_s: float, rounds: int) -> list[material.Row]:
    """Requests of two sizes through the sampler and as bare exchanges.

    Args:
        num_requests: that are open at once; each is sent again when it was answered, some times.
        latency_s: seconds from a request to its answer.
        rounds: to take medians of.

    Returns:
        A row for each: tokens and KiB of a request and its answer, seconds, calls per second,
        microseconds of the client's processor per call, and those in multiples of the bare ones.
    """
    return [
        row
        for name, (prompt, response) in MESSAGES.items()
        for row in _messages(
            name, prompt, response, num_requests=num_requests, latency_s=latency_s, rounds=rounds
        )
    ]


def _messages(
    size: str,
    num_prompt: int,
    num_response: int,
    *,
    num_requests: int,
    latency_s: float,
    rounds: int,
) -> list[material.Row]:
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, _VOCAB_SIZE, (num_requests, num_prompt), np.int32)
    response = _response(rng.integers(0, _VOCAB_SIZE, num_response, np.int32), rng)
    text = _answer(response, stops=False)
    params = _params(num_response)

    with _clients({scripted_server.ANY: [text]}, latency_s, vocab_size=_VOCAB_SIZE) as clients:
        generations: list[samplers.Generation] = []

        async def in_turn(prompt: np.ndarray) -> samplers.Generation:
            for _ in range(_NUM_IN_TURN):
                generation = await clients.sampler.generate(prompt, params, seed=0)
            return generation

        async def generate() -> None:  # a result would be shown by the event loop, which takes time
            generations[:] = await asyncio.gather(*map(in_turn, prompts))

        clients.runner.run(generate())
        for generation in generations:
            if not _is_same(generation.tokens, generation.logprobs, response):
                raise RuntimeError(f"the {size} answers were not read as they were sent.")
        chains = [[_body(prompt, num_response)] * _NUM_IN_TURN for prompt in prompts]
        clients.post(chains)
        timings = material.in_turn(
            {HTTP: lambda: clients.runner.run(generate()), BARE: lambda: clients.post(chains)},
            rounds=rounds,
        )
    sizes = {
        "prompt_tokens": num_prompt,
        "response_tokens": num_response,
        "sent_kib": len(chains[0][0]) / 2**10,
        "received_kib": len(text) / 2**10,
    }
    return [
        {"variant": f"{size}, {name}"}
        | sizes
        | _numbers(timing, num_requests * _NUM_IN_TURN)
        | {"x_bare": timing.cpu_s / timings[BARE].cpu_s}
        for name, timing in timings.items()
    ]


def _frozen(run: Callable[[], None]) -> None:
    gc.freeze()
    try:
        run()
    finally:
        gc.unfreeze()


def _numbers(timing: material.Timing, num_calls: int) -> material.Row:
    return {
        "calls": num_calls,
        "seconds": timing.median_s,
        "fastest_s": timing.fastest_s,
        "calls_per_s": num_calls / timing.median_s,
        "cpu_us_per_call": 1e6 * timing.cpu_s / num_calls,
    }


@contextlib.contextmanager
def _clients(
    answers: Mapping[str, Sequence[str]], latency_s: float, *, vocab_size: int
) -> Iterator[_Clients]:
    """A server with both clients connected to it, until the block ends."""
    with (
        scripted_server.serving(answers, _info(), latency_s=latency_s) as serving,
        asyncio.Runner() as runner,
    ):
        made = _Clients(runner, serving, *runner.run(_connected(serving.url, vocab_size)))
        try:
            yield made
        finally:
            runner.run(made.sampler.close())
            runner.run(made.session.close())


async def _connected(
    url: str, vocab_size: int
) -> tuple[sglang.SGLangSampler, aiohttp.ClientSession]:
    settings = server.ServerSettings(urls=(url,), max_in_flight=2**20)
    expected = replicas.ExpectedModel(
        architecture=_ARCHITECTURE, vocab_size=vocab_size, context_tokens=_CONTEXT_TOKENS
    )
    sampler = sglang.SGLangSampler(settings, expected, run_id=_RUN_ID)
    await sampler.connect()
    await sampler.readmit(url, policy_version=0)
    return sampler, aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))


def _info() -> dict[str, Any]:
    """What a server says of itself, by route."""
    version = wire.version_name(_RUN_ID, 0)
    longest = _CONTEXT_TOKENS + 1
    return {
        "/ready": {},
        "/server_info": {
            "version": "0.5.23",
            "tp_size": 1,
            "dp_size": 1,
            "skip_tokenizer_init": True,
            "max_req_input_len": longest,
        },
        "/model_info": {
            "model_path": "/bench",
            "weight_version": version,
            "architectures": [_ARCHITECTURE],
        },
        "/v1/models": {"object": "list", "data": [{"max_model_len": _CONTEXT_TOKENS}]},
    }


def _responses(chat: chats.Chat) -> dict[str, list[Response]]:
    """Presses of every code; after the mark that asks for a note, always the same one."""
    rng = np.random.default_rng(0)
    return {
        str(int(chat.respond("#")[0])): [_response(chat.respond("<aUbD>"), rng)],
        scripted_server.ANY: [_response(chat.respond(code), rng) for code in lake.CODES],
    }


def _response(tokens: np.ndarray, rng: np.random.Generator) -> Response:
    return Response(tokens, -rng.exponential(size=len(tokens)).astype(np.float32))


def _script(responses: Mapping[str, Sequence[Response]]) -> scripted.TokenScript:
    """The server's script, in process."""

    def answer(prompt: np.ndarray, rng: random.Random) -> Response:
        del rng  # the server has none
        last = prompt[-scripted_server.NUM_KEY_TOKENS :].tolist()
        choices = responses.get(str(last[-1])) or responses[scripted_server.ANY]
        return choices[scripted_server.chosen(last, len(choices))]

    return answer


def _answer(response: Response, *, stops: bool) -> str:
    """JSON as sglang 0.5.23 writes it, with everything that it sends unasked."""
    tokens, logprobs = response.tokens.tolist(), response.logprobs.tolist()
    length = {"type": "length", "length": len(tokens)}
    version = wire.version_name(_RUN_ID, 0)
    answer = {
        "output_ids": tokens,
        "meta_info": {
            "id": scripted_server.RID,
            "finish_reason": {"type": "stop", "matched": tokens[-1]} if stops else length,
            "prompt_tokens": 0,
            "completion_tokens": len(tokens),
            "cached_tokens": 0,
            "weight_version": version,
            "weight_versions": [{"version": version, "start": 0, "end": len(tokens)}],
            "num_retractions": 0,
            "input_token_logprobs": [],
            "output_token_logprobs": [
                [logprob, token, None] for logprob, token in zip(logprobs, tokens, strict=True)
            ],
            "output_token_logprobs_length": len(tokens),
            "reasoning_tokens": 0,
            "cached_tokens_details": None,
            "dp_rank": None,
            "e2e_latency": 0.05170869827270508,
            "response_sent_to_client_ts": 1795332887.6235654,
        },
    }
    return json.dumps(answer, separators=(",", ":"))


def _params(max_tokens: int) -> samplers.SamplingParams:
    return samplers.SamplingParams(
        temperature=1.0, top_p=1.0, top_k=0, max_tokens=max_tokens, stop_tokens=(0,)
    )


def _body(prompt: np.ndarray, max_tokens: int = 12) -> bytes:
    """What the sampler would send."""
    rid = "0" * 32
    body = wire.generate_body(prompt, _params(max_tokens), rid=rid, max_new_tokens=max_tokens)
    return wire.encoded(body)


def _turns(groups: Sequence[material.Group]) -> list[list[types.Turn]]:
    """The model calls of every run, in order."""
    return [
        [turn for episode in run.episodes for turn in episode.turns]
        for group in groups
        for run in group
    ]


def _check_same(expected: Sequence[material.Group], found: Sequence[material.Group]) -> None:
    """Raises unless two rollouts made the same calls and got the same answers."""
    for one, other in zip(_turns(expected), _turns(found), strict=True):
        for turn, again in zip(one, other, strict=True):
            response = Response(turn.response_tokens, turn.sampler_logprobs)
            if not np.array_equal(turn.prompt_tokens, again.prompt_tokens) or not _is_same(
                again.response_tokens, again.sampler_logprobs, response
            ):
                raise RuntimeError("the rollouts in process and over HTTP are not the same.")


def _is_same(tokens: np.ndarray, logprobs: np.ndarray, response: Response) -> bool:
    return np.array_equal(tokens, response.tokens) and np.array_equal(logprobs, response.logprobs)
