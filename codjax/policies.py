"""Who is evaluated: parameters, in this process or on servers, or an endpoint of somebody else.

policy = InProcess(engine, num_at_once=64)
await policy.open()
await policy.load(params)                  # before every entry of an evaluation
…                                          # policy.sampler answers
await policy.close()
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any, Protocol

from ml_collections import ConfigDict

from codjax import chat as chats
from codjax import distributed, serving
from codjax.rollout import engine, openai_client, openai_sampler
from codjax.rollout import sampler as samplers

_logger = logging.getLogger(__name__)


class Policy(Protocol):
    """A sampler, and how it comes by the parameters that it answers from.

    Its methods, and those of its sampler, run in one event loop: `open` once, then `load` and
    requests in any number, at the end `close`, also after a failure of `open`.
    """

    @property
    def sampler(self) -> samplers.Sampler:
        """Who answers, after `open`."""
        ...

    @property
    def num_at_once(self) -> int | None:
        """Packs to run side by side; None for all of them."""
        ...

    async def open(self) -> None:
        """Connects."""
        ...

    async def load(self, params: Any) -> None:
        """Answers from these parameters from now on, with nothing left in a cache.

        Called before every entry of an evaluation, so that none depends on what those before left;
        the same parameters may come again.

        Args:
            params: of the model of the config, on its mesh; None for a policy that has its own.
        """
        ...

    async def close(self) -> None:
        """Ends what `open` began."""
        ...


class InProcess:
    """Parameters of the config's model, in this process; owns nothing that must be closed.

    Attributes:
        sampler: the engine.
        num_at_once: its slots: each run then finds its own prefix in the cache again.
    """

    def __init__(self, sampler: engine.Engine, *, num_at_once: int) -> None:
        self.sampler, self.num_at_once = sampler, num_at_once
        self._given: Any = None
        self._local: Any = None

    async def open(self) -> None:
        """Nothing to connect to."""

    async def load(self, params: Any) -> None:
        """See `Policy.load`; all processes call it together."""
        if params is not self._given or self._local is None:
            is_alone = distributed.num_processes() == 1
            self._local = None  # before there is a second copy
            self._local = params if is_alone else distributed.local_weights(params)
            self._given = params
        self.sampler.load_weights(self._local, policy_version=0)

    async def close(self) -> None:
        """Nothing to end."""


class Served:
    """Parameters of the config's model on SGLang servers; owns what they need while it is open.

    Attributes:
        num_at_once: None; the servers bound requests.
    """

    num_at_once = None

    def __init__(self, made: serving.Serving) -> None:
        self._serving = made
        self._stack = contextlib.AsyncExitStack()
        self._given: Any = None
        self._version = -1

    @property
    def sampler(self) -> samplers.Sampler:
        """See `Policy.sampler`."""
        return self._serving.sampler

    async def open(self) -> None:
        """Connects; local servers are started with the first parameters."""
        await self._stack.enter_async_context(self._serving.opened())

    async def load(self, params: Any) -> None:
        """See `Policy.load`; all processes call it together."""
        if params is self._given:  # they keep nothing but prefixes, under the same weights
            return
        self._given, self._version = params, self._version + 1
        staged = self._serving.stage(params, version=self._version)
        await self._serving.load(staged, self._version)

    async def close(self) -> None:
        """Ends what `open` began."""
        await self._stack.aclose()


class Endpoint:
    """An OpenAI-compatible endpoint, asked as `config.evaluation.endpoint` says.

    Attributes:
        sampler: its client.
        num_at_once: None; the client bounds requests.
        label: address and model, for reports.

    Raises:
        ConfigError: it cannot be reached, does not take the key, has no such model, or cannot be
            asked with this tokenizer.
    """

    num_at_once = None

    def __init__(self, address: str, endpoint: ConfigDict, chat: chats.Chat) -> None:
        settings = openai_client.settings_from(address, endpoint)
        model = asyncio.run(openai_sampler.find_model(settings))
        self.label = f"{model.name} at {settings.url}"
        self.sampler = openai_sampler.OpenAISampler(settings, model, chat)

    async def open(self) -> None:
        """Gets ready to ask."""
        await self.sampler.open()

    async def load(self, params: Any) -> None:
        """Nothing: its parameters are its own."""

    async def close(self) -> None:
        """Ends the connections, and says how it went."""
        await self.sampler.close()
        counters = self.sampler.counters
        _logger.info(
            "%s: %d requests, %d of them repeated ones; %d answers came without token ids and were "
            "counted by tokenizer.source.",
            self.label,
            counters.requests,
            counters.retries,
            self.sampler.num_recounted,
        )
