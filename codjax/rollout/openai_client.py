"""HTTP to an OpenAI-compatible endpoint: one question, asked as often as it takes.

    client = Client(settings_from("http://host:8000/v1", config.evaluation.endpoint))
    await client.open()
    models = await client.ask("GET", "/models", None, openai_wire.parse_models)
    await client.close()

Requests that fail for the moment (429, 5xx, no or a broken answer) are sent again, a counted
number of times. The API key comes from a variable of the environment and goes into no file and
no message.
"""

from __future__ import annotations

import asyncio
import dataclasses
import email.utils
import json
import os
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

import aiohttp
from ml_collections import ConfigDict

from codjax import checks
from codjax.rollout.sampler import RefusedError, SamplerError
from codjax.rollout.sglang.wire import BadAnswerError, error_text

T = TypeVar("T")

_CONNECT_TIMEOUT_S = 10.0


class AgainError(SamplerError):
    """No answer that could be used came; another try may bring one.

    Attributes:
        after_s: seconds that the endpoint asked to be left alone for.
    """

    def __init__(self, message: str, *, after_s: float = 0.0) -> None:
        super().__init__(message)
        self.after_s = after_s


@dataclasses.dataclass(frozen=True, kw_only=True)
class EndpointSettings:
    """How an endpoint is asked; see `config.evaluation.endpoint`.

    Attributes:
        url: its address without a route, such as "http://10.0.0.2:30000/v1".
        model: name of the model, or None for the only one that it lists.
        route: a name of `openai_wire.ROUTES`.
        api_key: sent as bearer token, or None.
        api_key_variable: where the key came from, for messages.
        max_in_flight: requests that are open at once.
        request_timeout_s: seconds of one request, from sending to the last byte.
        max_retries: tries of a request after its first.
        backoff_s: seconds before the first of them; doubled for each further one.
        max_backoff_s: longest of these pauses, unless the endpoint asks for a longer one.
    """

    url: str
    model: str | None
    route: str
    api_key: str | None = dataclasses.field(repr=False)
    api_key_variable: str | None
    max_in_flight: int
    request_timeout_s: float
    max_retries: int
    backoff_s: float = 0.5
    max_backoff_s: float = 15.0


def settings_from(url: str, endpoint: ConfigDict) -> EndpointSettings:
    """The settings of `config.evaluation.endpoint`, with the key from the environment.

    Raises:
        ConfigError: the variable is not set, or what it holds can be no key.
    """
    variable = endpoint.api_key_variable
    key = os.environ.get(variable, "").strip() if variable is not None else None
    if key is not None and not (key and key.isascii() and key.isprintable()):
        # What the config holds may be the key itself, by mistake, and is not shown.
        raise checks.ConfigError(
            "evaluation.endpoint.api_key_variable must name a variable of the environment that "
            "holds a key: the one it names is not set, is empty, or is no single line of ASCII. "
            "Export it, or leave evaluation.endpoint.api_key_variable unset to send no key."
        )
    return EndpointSettings(
        url=url.rstrip("/"),
        model=endpoint.model,
        route=endpoint.route,
        api_key=key,
        api_key_variable=variable,
        max_in_flight=endpoint.max_in_flight,
        request_timeout_s=endpoint.request_timeout_s,
        max_retries=endpoint.max_retries,
    )


@dataclasses.dataclass(kw_only=True)
class Counters:
    """Totals since the start.

    Attributes:
        requests: sent, each try counted.
        retries: those of them that repeat one that failed.
    """

    requests: int = 0
    retries: int = 0


class Client:
    """The connections to one endpoint, in one event loop; asks again where that may help.

    Attributes:
        counters: what happened so far.
    """

    def __init__(self, settings: EndpointSettings) -> None:
        self.counters = Counters()
        self._settings = settings
        self._places = asyncio.Semaphore(settings.max_in_flight)
        self._session: aiohttp.ClientSession | None = None

    async def open(self) -> None:
        """Gets ready to ask; nothing is sent yet."""
        key = self._settings.api_key
        self._session = aiohttp.ClientSession(
            # Its own queue would count as waiting for an answer.
            connector=aiohttp.TCPConnector(limit=0),
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )

    async def close(self) -> None:
        """Ends the connections, if there are any."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def ask(self, method: str, route: str, body: Any, parse: Callable[[Any], T]) -> T:
        """What `parse` makes of the answer.

        Raises:
            RefusedError: the endpoint will not answer this.
            SamplerError: no answer could be had in `max_retries` further tries.
        """
        limit = self._settings.max_retries
        for num_tries in range(1, limit + 2):
            async with self._places:
                self.counters.requests += 1
                self.counters.retries += num_tries > 1
                try:
                    return self._judged(route, await self._request(method, route, body), parse)
                except AgainError as error:
                    reason = error
            if num_tries <= limit:
                longest = self._settings.backoff_s * 2 ** (num_tries - 1)
                pause_s = min(longest, self._settings.max_backoff_s)
                # Drawn, so that requests that failed together part.
                await asyncio.sleep(max(pause_s * random.uniform(0.5, 1.0), reason.after_s))
        raise SamplerError(
            f"gave up after {limit + 1} tries (evaluation.endpoint.max_retries is {limit}), the "
            f"last: {reason}"
        ) from reason

    def _judged(self, route: str, content: bytes, parse: Callable[[Any], T]) -> T:
        where = self._settings.url + route
        try:
            answer = json.loads(content)
        except ValueError as error:
            raise AgainError(f"{where} sent {len(content)} bytes that are no whole JSON") from error
        try:
            return parse(answer)
        except BadAnswerError as error:
            raise AgainError(f"{where} cannot be believed: {error}") from error

    async def _request(self, method: str, route: str, body: Any) -> bytes:
        """The bytes of a 200."""
        if self._session is None:
            raise RuntimeError("the endpoint was asked before open, or after close.")
        where = self._settings.url + route
        timeout = aiohttp.ClientTimeout(
            total=self._settings.request_timeout_s, sock_connect=_CONNECT_TIMEOUT_S
        )
        try:
            # The key is for this address, and for none that it points to.
            async with self._session.request(
                method, where, json=body, timeout=timeout, allow_redirects=False
            ) as response:
                content = await response.read()
        except TimeoutError as error:
            raise AgainError(
                f"{where}: no connection within {_CONNECT_TIMEOUT_S:g} s"
                if isinstance(error, aiohttp.ConnectionTimeoutError)
                else f"{where}: no answer within {timeout.total:g} s "
                "(evaluation.endpoint.request_timeout_s)"
            ) from error
        except (aiohttp.ClientError, OSError) as error:
            raise AgainError(f"{where}: {type(error).__name__}: {error}") from error
        if response.status == 200:
            return content
        raise self._refusal(where, response.status, response.headers, content)

    def _refusal(self, where: str, status: int, headers: Any, content: bytes) -> SamplerError:
        """The error that an answer other than 200 is."""
        settings = self._settings
        text = content.decode(errors="replace")
        if settings.api_key:
            text = text.replace(settings.api_key, "[the key]")
        message = f"{where} answered {status}: {error_text(text)}"
        if status in (408, 409, 425, 429) or status >= 500:
            if status == 429:
                message += " (lower evaluation.endpoint.max_in_flight?)"
            longest = settings.request_timeout_s
            return AgainError(message, after_s=min(_retry_after(headers), longest))
        if status in (401, 403):
            variable = settings.api_key_variable
            message += (
                f" (the key in the variable {variable}, evaluation.endpoint.api_key_variable, is "
                "not one that it takes)"
                if variable
                else " (evaluation.endpoint.api_key_variable names no variable with a key for it)"
            )
        return RefusedError(message, status=status, text=text)


def _retry_after(headers: Any) -> float:
    """Seconds in a Retry-After header, which may be a date; 0 without one that can be read."""
    text = headers.get("Retry-After", "")
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return 0.0
