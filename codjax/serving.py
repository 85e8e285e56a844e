"""Where the run's tokens come from, and how its weights get there: one object, whichever it is.

    serving = make(config, model, mesh, folder=…)
    staged = serving.stage(params, version=3)        # on the learner's thread, on every process
    async with serving.opened():                     # on the loop of the rollouts
        await serving.load(staged, 3)
        generation = await serving.sampler.generate(…)

In this process the weights are a copy on the devices; for SGLang servers they are a folder or the
bodies of requests, made where the learner is and loaded by each server.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import pathlib
import secrets
import shutil
from collections.abc import AsyncIterator
from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from codjax import build, checks, distributed, learner, models, seeds
from codjax import chat as chats
from codjax.models import hf_tensors
from codjax.rollout import engine
from codjax.rollout import sampler as samplers
from codjax.rollout.sglang import fleet, processes, replicas, settings, weights

_PROBE_TOKENS = 32
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


class Serving(Protocol):
    """A sampler whose weights follow the learner's."""

    @property
    def sampler(self) -> samplers.Sampler:
        """Answers from the weights loaded last; while `opened`."""
        ...

    def opened(self) -> contextlib.AbstractAsyncContextManager[Any]:
        """What it needs while it samples; entered once, on the loop that samples."""
        ...

    def stage(self, params: learner.Params, *, version: int) -> Any:
        """What `load` takes: a copy that later updates leave alone. On all processes at once."""
        ...

    async def load(self, staged: Any, version: int) -> None:
        """Answer from these weights from now on."""
        ...

    def metrics(self) -> dict[str, float]:
        """`sampler/name` → number; from any thread."""
        ...


def make(
    config: ConfigDict,
    chat: chats.Chat,
    model: models.Decoder,
    mesh: jax.sharding.Mesh,
    *,
    folder: pathlib.Path,
) -> Serving:
    """The serving of `rollout.sampler`.

    Args:
        config: of the run.
        chat: its tokenizer, which servers may have too.
        model: its structure.
        mesh: of the learner.
        folder: the workdir.

    Raises:
        ConfigError: fewer servers than processes.
    """
    if config.rollout.sampler == "engine":
        made = build.make_engine(config, model, distributed.sampling_mesh(mesh))
        return InProcess(made)
    return Servers(config, chat, model, mesh, folder=folder)


class InProcess:
    """The engine on this process's devices."""

    def __init__(self, made: engine.Engine) -> None:
        self._engine = made

    @property
    def sampler(self) -> engine.Engine:
        """The engine."""
        return self._engine

    def opened(self) -> contextlib.AbstractAsyncContextManager[None]:
        """It needs nothing."""
        return contextlib.nullcontext()

    def stage(self, params: learner.Params, *, version: int) -> learner.Params:
        """A copy on the devices."""
        del version
        return distributed.local_weights(params)

    async def load(self, staged: learner.Params, version: int) -> None:
        """Swaps the weights; answers that are under way go on from them."""
        self._engine.load_weights(staged, policy_version=version)

    def metrics(self) -> dict[str, float]:
        """None of its own."""
        return {}


class Servers:
    """SGLang servers: this process's share of those that run, or its own local ones."""

    def __init__(
        self,
        config: ConfigDict,
        chat: chats.Chat,
        model: models.Decoder,
        mesh: jax.sharding.Mesh,
        *,
        folder: pathlib.Path,
    ) -> None:
        """Nothing is connected yet; what an earlier start of the run staged is removed."""
        self._server, self._model = config.server, model
        # A server may keep weights of the run before it was killed, under numbers that come again.
        run = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]
        self._run_id = f"{run}.{secrets.token_hex(4)}"
        self._folder = _weights_folder(config, folder)
        for left in self._folder.glob(f"weights-{run}.*"):
            shutil.rmtree(left, ignore_errors=True)
        self._fleet = fleet.Fleet(
            settings.server_settings(config.server, _urls(config)),
            settings.push_settings(config.server),
            _expected(config, chat, model),
            run_id=self._run_id,
            local=_local(config, model_folder=self._folder, log_folder=folder / "servers"),
        )
        self._tokenizer_files = _tokenizer_files(config.tokenizer.source)
        self._probe = _probe_tokens(model.config.vocab_size)
        self._score = jax.jit(
            functools.partial(models.score_rows, nnx.split(model)[0], implementation="xla"),
            out_shardings=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()),
        )

    @property
    def sampler(self) -> samplers.Sampler:
        """Of all servers of this process."""
        return self._fleet.sampler

    @contextlib.asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Connected; local servers are started with the first weights."""
        async with self._fleet.opened():
            yield

    def stage(self, params: learner.Params, *, version: int) -> weights.Staged:
        """The weights as the servers load them, and what they must then answer.

        Raises:
            WriteError: the disk is full, or fails.
            WeightsError: a value is not finite in `server.dtype`.
        """
        dtype, shape = self._server.dtype, self._model.config
        scores = self._score(params, self._probe[None])
        named = weights.NamedWeights(
            run_id=self._run_id,
            policy_version=version,
            layouts=hf_tensors.layouts(shape, dtype),
            tensors=hf_tensors.tensors(shape, params, dtype),
            config=shape.to_hf() | {"torch_dtype": dtype},
            files=self._tokenizer_files,
            probe=weights.Probe(tokens=self._probe, logprobs=np.asarray(scores)[0]),
        )
        if self._server.route == "disk":
            return weights.stage_folder(named, folder=self._folder)
        return weights.stage_payloads(named, bucket_bytes=self._server.bucket_mb << 20)

    async def load(self, staged: weights.Staged, version: int) -> None:
        """Pause, load, flush, go on, verify; on every server that does it."""
        del version  # `staged` knows it
        await self._fleet.load(staged)

    def metrics(self) -> dict[str, float]:
        """Counts of requests, retries and servers."""
        return self._fleet.metrics()


async def check(config: ConfigDict, chat: chats.Chat, model: models.Decoder) -> None:
    """Asks this process's servers that should be running what they are, and leaves them alone.

    Raises:
        SamplerError: one of them is not there, or runs another model.
    """
    if config.rollout.sampler == "sglang" and config.server.urls:
        servers = settings.server_settings(config.server, _urls(config))
        pushes = settings.push_settings(config.server)
        async with fleet.Fleet(servers, pushes, _expected(config, chat, model), run_id="").opened():
            pass


def _urls(config: ConfigDict) -> tuple[str, ...]:
    """Addresses of this process's servers."""
    urls = tuple(distributed.share(config.server.urls))
    checks.require(
        bool(urls) or bool(config.server.local.num),
        "server.urls",
        f"name at least {distributed.num_processes()} servers",
        "each of the processes that train together asks its own",
        tuple(config.server.urls),
    )
    return urls or settings.local_urls(config.server)


def _local(
    config: ConfigDict, *, model_folder: pathlib.Path, log_folder: pathlib.Path
) -> list[processes.ProcessSettings]:
    """Servers to start; none where others run already."""
    if config.server.urls:
        return []
    return settings.process_settings(
        config.server, model_folder=model_folder, log_folder=log_folder
    )


def _expected(
    config: ConfigDict, chat: chats.Chat, model: models.Decoder
) -> replicas.ExpectedModel:
    return settings.expected_model(
        config,
        chat,
        architecture=model.config.to_hf()["architectures"][0],
        vocab_size=model.config.vocab_size,
    )


def _weights_folder(config: ConfigDict, folder: pathlib.Path) -> pathlib.Path:
    """Of this process alone: others stage the same weights for their own servers."""
    chosen = config.server.weights_folder
    base = pathlib.Path(chosen).expanduser() if chosen else folder / "weights"
    return (base / f"process_{distributed.process_index()}").resolve()


def _tokenizer_files(source: str) -> tuple[pathlib.Path, ...]:
    """Of a Hugging Face folder, for servers that are started with a tokenizer."""
    folder = pathlib.Path(source).expanduser()
    return tuple(path for path in map(folder.joinpath, _TOKENIZER_FILES) if path.is_file())


def _probe_tokens(vocab_size: int) -> np.ndarray:
    """A text that no model has seen: the same for every run of a vocabulary."""
    rng = np.random.default_rng(seeds.derive_seed(0, "probe"))
    return rng.integers(0, vocab_size, _PROBE_TOKENS).astype(np.int32)
