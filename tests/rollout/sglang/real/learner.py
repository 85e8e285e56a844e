"""The learner's side of the tests: tiny policies, what they say, and their way to the servers.

Policy 0, 1, 2… are as far apart as random models are: log-probs differ by whole units, and by less
than 1e-3 between learner and server of equal weights.
"""

import asyncio
import contextlib
import dataclasses
import functools
import uuid
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from codjax import models
from codjax.models import hf_tensors
from codjax.rollout.sglang import push, weights
from codjax.rollout.sglang.replicas import ExpectedModel
from codjax.rollout.sglang.sampler import SGLangSampler
from codjax.rollout.sglang.server import ServerClient
from tests import small

CONFIG = small.decoder_config(
    vocab_size=512, hidden_size=128, intermediate_size=256, head_dim=32, num_layers=3, init_std=0.2
)
EXPECTED = ExpectedModel(architecture="Qwen3ForCausalLM", vocab_size=512, context_tokens=4000)
PROBE = np.random.default_rng(0).integers(0, 512, 40).astype(np.int32)
DECODE_GAP, PREFILL_GAP = 1e-3, 1e-4  # largest allowed, in float32
BUCKET_BYTES = 500_000  # of the bytes route: several payloads


def texts(lengths, seed=0):
    """Random tokens."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, CONFIG.vocab_size, length).astype(np.int32) for length in lengths]


@functools.cache
def policy(version, family="qwen3"):
    """A random model; norms too."""
    model = models.init(dataclasses.replace(CONFIG, family=family), seed=version)
    rng = np.random.default_rng(version)
    params = jax.tree.map(
        lambda x: x + jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype), nnx.state(model)
    )
    nnx.update(model, params)
    return model


# What a policy says.


def score(version, tokens):
    """Log-probability of each next token at temperature 1: int32 `[n]` -> float32 `[n-1]`."""
    return np.asarray(models.score(policy(version), _padded(tokens)))[0, : len(tokens) - 1]


def logits(version, tokens):
    """Of what follows each token: int32 `[n]` -> float32 `[n, V]`."""
    row = jnp.asarray(_padded(tokens))
    model = policy(version)
    hidden = model(row, jnp.arange(row.size)[None], jnp.full(row.shape, row.size))
    return np.asarray(hidden[0] @ model.unembedding.T)[: len(tokens)]


def gap(version, prompt, generation, span=slice(None)):
    """Largest difference between log-probs of a response, or a part of it, and the policy's."""
    scored = score(version, np.concatenate([prompt, generation.tokens]))[len(prompt) - 1 :]
    return float(np.max(np.abs(scored - generation.logprobs)[span]))


def _padded(tokens):
    """As one row, of few lengths: each compiles once. What follows changes nothing before it."""
    length = max(64, 1 << (len(tokens) - 1).bit_length())
    return np.pad(tokens, (0, length - len(tokens)))[None]


# Its weights, ready to be pushed.


def named_weights(version, run_id, **changes):
    """All of the policy, and its probe."""
    made = {
        "run_id": run_id,
        "policy_version": version,
        "layouts": hf_tensors.layouts(CONFIG, "float32"),
        "tensors": hf_tensors.tensors(
            CONFIG, nnx.to_pure_dict(nnx.state(policy(version))), "float32"
        ),
        "config": CONFIG.to_hf(),
        "probe": weights.Probe(tokens=PROBE, logprobs=score(version, PROBE)),
    }
    return weights.NamedWeights(**(made | changes))


def start_folder(where):
    """A Hugging Face folder of policy 0."""
    return weights.stage_folder(named_weights(0, "start"), folder=where).folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Owner:
    """A run, as far as servers meet it: who asks them and who gives them weights.

    Attributes:
        sampler: connected.
        pusher: sets a server aside as soon as its weights are in doubt.
        by_disk, by_bytes: policy version -> staged weights.
    """

    sampler: SGLangSampler
    pusher: push.Pusher
    by_disk: Callable[[int], weights.Staged]
    by_bytes: Callable[[int], weights.Staged]

    async def push(self, staged):
        """To all servers, which serve them from then on."""
        clients = [self.sampler.client(replica.url) for replica in self.sampler.replicas.all]
        outcomes = await self.pusher.push(staged, clients)
        assert [outcome.error for outcome in outcomes] == [None] * len(clients)
        for outcome in outcomes:
            version = int(staged.version.rpartition("-")[2])
            await self.sampler.readmit(outcome.server, policy_version=version)
        return outcomes


@contextlib.asynccontextmanager
async def owning(running, where, **changes):
    """The `Owner` of a new run, whose servers serve policy 0."""
    run_id = uuid.uuid4().hex
    made = SGLangSampler(running.reach(**changes), EXPECTED, run_id=run_id)
    async with made as sampler:
        await sampler.connect()
        owner = Owner(
            sampler=sampler,
            pusher=push.Pusher(
                push.PushSettings(tolerance=PREFILL_GAP),
                start_folders=dict.fromkeys(running.urls, running.folder),
                on_failure=lambda url, error: sampler.set_aside(url, error, distrust=True),
            ),
            by_disk=lambda version: weights.stage_folder(
                named_weights(version, run_id), folder=where, max_shard_bytes=BUCKET_BYTES
            ),
            by_bytes=lambda version: weights.stage_payloads(
                named_weights(version, run_id), bucket_bytes=BUCKET_BYTES
            ),
        )
        await owner.push(owner.by_disk(0))
        yield owner


async def all_running(sampler, *, num_requests, urls=None):
    """Waits until servers, by default all, are sampling so many responses each."""
    for url in [replica.url for replica in sampler.replicas.all] if urls is None else urls:
        async with asyncio.timeout(60.0):
            while (await sampler.client(url).load()).num_running != num_requests:
                await asyncio.sleep(0.02)


async def until(is_so, limit_s=60.0):
    async with asyncio.timeout(limit_s):
        while not is_so():
            await asyncio.sleep(0.02)


async def calm(url, settings):
    """Ends what another test left on a server: a pause and requests."""
    async with ServerClient(url, settings) as client:
        await client.continue_()
        await client.abort_all()
