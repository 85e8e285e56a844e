"""Fake servers with a sampler over them, as most tests begin."""

import asyncio
import contextlib

import numpy as np

from codjax.rollout.sampler import SamplingParams
from codjax.rollout.sglang.replicas import ExpectedModel
from codjax.rollout.sglang.sampler import SGLangSampler
from codjax.rollout.sglang.server import ServerSettings
from tests.rollout.sglang.fake_server import FakeServer, counting

EXPECTED = ExpectedModel(architecture="Qwen3ForCausalLM", vocab_size=512, context_tokens=100)
PROMPT = np.array([10, 11, 12], np.int32)
# Pauses that a test can wait for.
QUICK = {
    "backoff_s": 0.001,
    "max_backoff_s": 0.004,
    "probe_interval_s": 0.005,
    "ready_timeout_s": 5.0,
    "request_timeout_s": 10.0,
    "replica_wait_s": 10.0,
    "drain_timeout_s": 5.0,
}


def run(scenario):
    """Runs a coroutine that must end by itself."""
    return asyncio.run(asyncio.wait_for(scenario, 120))


def params(max_tokens=8, stop_tokens=(), temperature=1.0):
    return SamplingParams(
        temperature=temperature, top_p=1.0, top_k=0, max_tokens=max_tokens, stop_tokens=stop_tokens
    )


def expected_answer(prompt=PROMPT, num_tokens=8):
    """(tokens, log-probs) that a server gives which nothing befalls."""
    script = counting(prompt.tolist())
    pairs = [next(script) for _ in range(num_tokens)]
    return [token for token, _ in pairs], [logprob for _, logprob in pairs]


def settings(servers, **changes):
    return ServerSettings(urls=tuple(server.url for server in servers), **(QUICK | changes))


@contextlib.asynccontextmanager
async def serving(num_servers=1, *, script=None, **changes):
    """(sampler, servers): connected, and every server serves version 0 of "run"."""
    async with contextlib.AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(FakeServer(script)) for _ in range(num_servers)]
        made = SGLangSampler(settings(servers, **changes), EXPECTED, run_id="run")
        sampler = await stack.enter_async_context(made)
        await sampler.connect()
        for server in servers:
            await sampler.readmit(server.url, policy_version=0)
            server.calls.clear()
        yield sampler, servers
