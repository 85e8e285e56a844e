"""An OpenAI-compatible endpoint as a sampler for evaluation: it is asked, and never changed.

    settings = openai_client.settings_from("http://host:8000/v1", config.evaluation.endpoint)
    model = asyncio.run(find_model(settings))
    sampler = OpenAISampler(settings, model, chat)
    await sampler.open()
    generation = await sampler.generate(prompt, params, seed=0)
    await sampler.close()

A rollout sends token ids. An endpoint that takes messages only (route "chat") gets those that
`Chat.messages` reads back from the prompt; its text becomes tokens of our tokenizer.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from codjax import chat as chats
from codjax import checks, types
from codjax.rollout import openai_wire as wire
from codjax.rollout.openai_client import Client, Counters, EndpointSettings
from codjax.rollout.sampler import (
    Generation,
    PromptTooLongError,
    RefusedError,
    SamplerError,
    SamplingParams,
)

_TOO_LONG = re.compile(r"context[_ ](length|size|window)|(prompt|input) is too long", re.IGNORECASE)
_SHOWN_MODELS = 10


class OpenAISampler:
    """A `Sampler` for evaluation over an endpoint that somebody else runs.

    Owns connections between `open` and `close`, which belong into one event loop with all that is
    asked in between. Log-probs are 0 throughout: endpoints disagree on what theirs are of (vLLM's
    are at temperature 1, SGLang's at the sampling temperature), and evaluation reads none.

    Attributes:
        num_recounted: responses that came without token ids, and are in tokens of our tokenizer.

    Raises:
        ConfigError: messages cannot be read back from prompts, and the route needs them.
    """

    def __init__(self, settings: EndpointSettings, model: wire.Model, chat: chats.Chat) -> None:
        self.num_recounted = 0
        self._client = Client(settings)
        self._settings, self._model, self._chat = settings, model, chat
        self._route = wire.ROUTES[settings.route]
        self._limit_name = "max_tokens"
        if settings.route == "chat":
            try:
                chat.messages(chat.encode([chats.Message("system", ""), chats.Message("user", "")]))
            except ValueError as error:
                raise checks.ConfigError(
                    "evaluation.endpoint.route must be completions with this tokenizer.source: "
                    f"messages cannot be read back from a prompt, since {error}"
                ) from error

    @property
    def counters(self) -> Counters:
        """What happened so far."""
        return self._client.counters

    async def open(self) -> None:
        """Gets ready to ask; nothing is sent yet."""
        await self._client.open()

    async def close(self) -> None:
        """Ends the connections."""
        await self._client.close()

    async def generate(
        self, prompt: np.ndarray, params: SamplingParams, *, seed: int, group: int = 0
    ) -> Generation:
        """A response to the int32 `[n]` prompt; see `codjax.rollout.sampler.Sampler`.

        The seed is sent; whether equal ones give equal responses is the endpoint's affair. A
        response is shorter than `params.max_tokens` where the context ends.
        """
        del group
        if params.top_k and not self._model.is_extended:
            raise SamplerError(
                f"evaluation.top_k must be 0: {self._settings.url} is neither vLLM nor SGLang, and "
                f"others do not take it; got {params.top_k}."
            )
        context = self._model.context_tokens
        room = params.max_tokens if context is None else context - len(prompt)
        if room < 1:
            raise PromptTooLongError(
                f"a prompt of {len(prompt)} tokens leaves no room for a response: the endpoint "
                f"takes {context} in all."
            )
        max_tokens = min(params.max_tokens, room)
        body = self._route.body(
            prompt, params, model=self._model, chat=self._chat, seed=seed, max_tokens=max_tokens
        )
        parse = functools.partial(
            self._route.parse,
            prompt=prompt,
            params=params,
            chat=self._chat,
            max_tokens=max_tokens,
        )
        answer = await self._ask(body, parse)
        self.num_recounted += not answer.has_ids
        length = len(answer.tokens)
        return Generation(
            tokens=answer.tokens,
            logprobs=np.zeros(length, np.float32),
            policy_version=0,
            version_spans=(types.VersionSpan(0, 0, length),),
            stop_reason=types.StopReason.STOP_TOKEN if answer.is_stop else types.StopReason.LENGTH,
        )

    async def score(self, tokens: np.ndarray) -> np.ndarray:
        """Raises SamplerError: endpoints do not tell the log-probs of a prompt alike, if at all."""
        raise SamplerError(f"{self._settings.url} is read-only: it cannot score a text.")

    def load_weights(self, weights: Any, *, policy_version: int) -> None:
        """Raises SamplerError: its weights are not ours to change."""
        raise SamplerError(f"{self._settings.url} is read-only: it takes no weights.")

    async def _ask(self, body: dict[str, Any], parse: Callable[[Any], wire.Answer]) -> wire.Answer:
        """The answer to a body; models that know the limit by its newer name only are told that."""
        name = self._limit_name
        others = {key: value for key, value in body.items() if key != "max_tokens"}
        try:
            return await self._client.ask(
                "POST", self._route.path, others | {name: body["max_tokens"]}, parse
            )
        except RefusedError as error:
            if _TOO_LONG.search(error.text):
                raise PromptTooLongError(str(error)) from error
            if name != "max_tokens" or "max_completion_tokens" not in error.text:
                raise
        self._limit_name = "max_completion_tokens"
        return await self._ask(body, parse)


async def find_model(settings: EndpointSettings) -> wire.Model:
    """The model of the settings as the endpoint lists it, or the only one it lists.

    An endpoint without a list (404) is taken to have the model that is asked for.

    Raises:
        ConfigError: it cannot be reached, does not take the key, or has no such model.
    """
    client = Client(settings)
    await client.open()
    try:
        models = await client.ask("GET", "/models", None, wire.parse_models)
    except RefusedError as error:
        if error.status != 404 or settings.model is None:
            advice = "; does the address end in /v1?" if error.status == 404 else ""
            raise checks.ConfigError(f"--checkpoint: {error}{advice}") from error
        return wire.Model(name=settings.model, context_tokens=None, is_extended=False)
    except SamplerError as error:
        raise checks.ConfigError(f"--checkpoint: {error}") from error
    finally:
        await client.close()
    found = [model for model in models if settings.model in (model.name, None)]
    if len(found) == 1:
        return found[0]
    names = [model.name for model in models]
    more = f" and {len(names) - _SHOWN_MODELS} more" if len(names) > _SHOWN_MODELS else ""
    listed = ", ".join(names[:_SHOWN_MODELS]) + more if names else "none"
    near = checks.nearest(settings.model, names) if settings.model else ""
    raise checks.ConfigError(
        f"evaluation.endpoint.model must be a model of {settings.url}, which lists {listed}; "
        f"got {settings.model!r}{near}."
    )
