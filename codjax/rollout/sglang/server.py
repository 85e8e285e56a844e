"""One SGLang server: its routes as methods, and three ways in which asking it can fail.

    async with ServerClient(url, settings) as client:
        info = await client.info()
        answer = await client.generate(prompt, params, max_new_tokens=64, …)

Nothing here is tried twice: whether and where to try again is the sampler's business.
"""

from __future__ import annotations

import dataclasses
import io
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import aiohttp
import numpy as np

from codjax.rollout.sampler import RefusedError, SamplerError, SamplingParams
from codjax.rollout.sglang import wire

T = TypeVar("T")
# A server closes connections that idle for 5 s; to send on one that it just closes is a failure.
_KEEP_ALIVE_S = 2.0
_LARGE = 2**16  # bytes of a request that are not sent at once


class NoAnswerError(SamplerError):
    """No whole answer came: refused, closed, late, cut short, or a fault of the server (5xx)."""


class BusyError(SamplerError):
    """The server asks to be asked again later, and is well."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """How servers are reached, and how long they are waited for. Times are in seconds.

    Attributes:
        urls: of the replicas, such as "http://10.0.0.2:30000", without a path.
        router: of an sglang-router before them, through which answers are asked for; None: they
            are asked for directly.
        api_key: sent as bearer token where the servers ask for one (--api-key).
        admin_api_key: the same for weights, pauses and aborts (--admin-api-key).
        connect_timeout_s: until a connection stands.
        request_timeout_s: of one generation or scoring, from sending to the last byte.
        control_timeout_s: of every other request but weight updates.
        weights_timeout_s: of one weight update; without a pause it lasts as long as the longest
            running request.
        ready_timeout_s: until every server is ready at start; loading weights takes minutes.
        max_in_flight: requests that are open at once, over all replicas.
        max_retries: tries of a request after its first.
        backoff_s: before the first retry on the same replica; doubled for each further one.
        max_backoff_s: longest of these pauses.
        max_failures: failed requests in a row after which a replica is set aside.
        max_imbalance: requests that a group's replica may have more than the least busy one
            before the group moves.
        replica_wait_s: until a request fails because no replica serves.
        probe_interval_s: between questions whether a replica that was set aside is back.
        drain_timeout_s: until a server that was told to drop its requests is idle.
    """

    urls: tuple[str, ...]
    router: str | None = None
    api_key: str | None = dataclasses.field(default=None, repr=False)
    admin_api_key: str | None = dataclasses.field(default=None, repr=False)
    connect_timeout_s: float = 10.0
    request_timeout_s: float = 600.0
    control_timeout_s: float = 30.0
    weights_timeout_s: float = 600.0
    ready_timeout_s: float = 600.0
    max_in_flight: int = 512
    max_retries: int = 5
    backoff_s: float = 0.5
    max_backoff_s: float = 15.0
    max_failures: int = 3
    max_imbalance: int = 8
    replica_wait_s: float = 600.0
    probe_interval_s: float = 2.0
    drain_timeout_s: float = 60.0


class ServerClient:
    """The connections to one server; use it as a context manager, or call `close`.

    Must be made, used and closed in one running event loop. Its methods may be called concurrently.

    Raises, from every method, `NoAnswerError`, `BusyError` and `RefusedError`, with the address
    and what happened; methods that read an answer also raise `wire.BadAnswerError`.
    """

    def __init__(self, url: str, settings: ServerSettings) -> None:
        self.url = url.rstrip("/")
        self._settings = settings
        # The sampler bounds what is open at once; a queue here would count as waiting for answers.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S)
        self._session = aiohttp.ClientSession(connector=connector)
        self._info: wire.ServerInfo | None = None

    async def __aenter__(self) -> ServerClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the connections; the server aborts what it was answering."""
        await self._session.close()

    @property
    def name(self) -> str:
        """Its address, for messages."""
        return self.url

    @property
    def tp_size(self) -> int:
        """Tensor-parallel ranks that share one copy of the model; known after `info`."""
        return self._told().tp_size

    @property
    def dp_size(self) -> int:
        """Copies of the model behind the address; known after `info`."""
        return self._told().dp_size

    # Questions.

    async def is_ready(self, route: str = "/ready") -> bool:
        """Whether it takes requests; False while it loads, and while it is paused.

        Where the route is not known, /health tells.
        """
        try:
            await self._get(route, older="/health")
        except (NoAnswerError, BusyError):
            return False
        return True

    async def wake(self) -> bool:
        """Whether it takes requests, after it was told to go on if it was left paused.

        That is how a trainer leaves it that is killed during a push.
        """
        try:
            if await self.is_ready():
                return True
            await self.model_info()  # it answers, so it neither loads nor is gone
            await self.continue_()
            return await self.is_ready()
        except (NoAnswerError, BusyError, wire.BadAnswerError):
            return False

    async def info(self) -> wire.ServerInfo:
        """What it says about itself, but for the vocabulary."""
        server = await self._get_json("/server_info", older="/get_server_info")
        models = await self._get_json("/v1/models")
        model = await self.model_info()
        self._info = self._judged(wire.parse_info, server, model, models)
        return self._info

    async def model_info(self) -> Mapping[str, Any]:
        """What `/model_info` answers: the weights' folder and `weight_version`, among others."""
        return await self._get_json("/model_info", older="/get_model_info")

    async def vocab_size(self) -> int | None:
        """V, or None if it does not tell. Not while it is paused: it would wait."""
        try:
            await self._post("/generate", wire.vocabulary_body(uuid.uuid4().hex))
        except RefusedError as error:
            return wire.vocab_size(error.text)
        return None

    async def tokenize(self, text: str) -> list[int] | None:
        """Its tokens of a text, without special ones; None if it does not know the route."""
        body = {"prompt": text, "add_special_tokens": False}
        try:
            content = await self._post("/v1/tokenize", body)
        except RefusedError as error:
            if error.status == 404:
                return None
            raise
        return self._judged(wire.parse_tokens, self._json("/v1/tokenize", content))

    async def load(self) -> wire.Load:
        """What is running and waiting."""
        return self._judged(wire.parse_load, await self._get_json("/v1/loads"))

    # Tokens.

    async def generate(
        self,
        prompt: np.ndarray,
        params: SamplingParams,
        *,
        max_new_tokens: int,
        vocab_size: int,
        run_id: str,
        oldest_version: int,
    ) -> wire.Answer:
        """One answer, checked; see `wire.generate_body` and `wire.parse_generation`."""
        rid = uuid.uuid4().hex  # not r1, r2, …: aborting r1 would also abort r10
        body = wire.generate_body(prompt, params, rid=rid, max_new_tokens=max_new_tokens)
        return self._judged(
            wire.parse_generation,
            await self._post_json("/generate", body, self._settings.request_timeout_s),
            rid=rid,
            max_new_tokens=max_new_tokens,
            vocab_size=vocab_size,
            run_id=run_id,
            oldest_version=oldest_version,
        )

    async def score(self, tokens: np.ndarray) -> np.ndarray:
        """Log-probability of each next token at temperature 1: int32 `[n]` -> float32 `[n-1]`."""
        rid = uuid.uuid4().hex
        body = wire.score_body(tokens, rid=rid)
        answer = await self._post_json("/generate", body, self._settings.request_timeout_s)
        return self._judged(wire.parse_score, answer, tokens, rid=rid)

    async def abort_all(self) -> None:
        """Tells it to end all requests; they are answered with the tokens that they have."""
        await self._post("/abort_request", {"abort_all": True})

    # Pauses.

    async def pause(self, mode: str) -> None:
        """Stops generation; new requests wait. `mode` is abort, retract or in_place."""
        await self._post("/pause_generation", {"mode": mode})

    async def continue_(self) -> None:
        """Goes on after `pause`."""
        await self._post("/continue_generation", {})

    async def flush(self) -> None:
        """Forgets cached prefixes; refused while requests hold some."""
        await self._post("/flush_cache", {})

    # Weights. What to send when, and whether to believe it, is in `push`.

    async def update_from_disk(self, path: str, version: str) -> None:
        """Loads the safetensors of a folder, and forgets cached prefixes.

        Unless it is paused, it waits for all running requests first.
        """
        body = {
            "model_path": path,
            "weight_version": version,
            "flush_cache": True,
            "abort_all_requests": False,
        }
        await self._update("/update_weights_from_disk", body)

    async def begin_update(self) -> bool:
        """Opens a session for `update_from_bytes`; False: an older server, which needs none."""
        try:
            await self._update("/begin_weight_update", {})
        except RefusedError as error:
            if error.status == 404:
                return False
            raise
        return True

    async def update_from_bytes(
        self, payload: Sequence[str], version: str | None, flush: bool
    ) -> None:
        """Loads tensors: exactly one base64 payload per tensor-parallel rank.

        The last of several calls has the version and flushes.
        """
        body: dict[str, Any] = {
            "serialized_named_tensors": list(payload),
            "flush_cache": flush,
        }
        if version is not None:
            body["weight_version"] = version
        await self._update("/update_weights_from_tensor", body)

    async def end_update(self) -> None:
        """Closes the session of `begin_update`."""
        await self._update("/end_weight_update", {})

    async def set_version(self, version: str) -> None:
        """Renames the weights it has; running requests go on."""
        body = {"new_version": version, "abort_all_requests": False}
        await self._update("/update_weight_version", body)

    def _told(self) -> wire.ServerInfo:
        if self._info is None:
            raise RuntimeError(f"{self.url} was not asked for its info yet.")
        return self._info

    async def _update(self, route: str, body: dict[str, Any] | bytes) -> None:
        answer = await self._post_json(route, body, self._settings.weights_timeout_s)
        if not (isinstance(answer, dict) and answer.get("success") is True):
            text = wire.error_text(wire.encoded(answer).decode())
            message = f"{self.url}{route} did not succeed: {text}"
            raise RefusedError(message, status=200, text=text)

    # HTTP.

    async def _get(self, route: str, *, older: str | None = None) -> bytes:
        """The answer to GET; a server that does not know the route is asked by its older name."""
        try:
            return await self._request("GET", route, None, self._settings.control_timeout_s)
        except RefusedError as error:
            if error.status != 404 or older is None:
                raise
        return await self._request("GET", older, None, self._settings.control_timeout_s)

    async def _get_json(self, route: str, *, older: str | None = None) -> Any:
        return self._json(route, await self._get(route, older=older))

    async def _post(self, route: str, body: Any) -> bytes:
        return await self._request("POST", route, body, self._settings.control_timeout_s)

    async def _post_json(self, route: str, body: Any, timeout_s: float) -> Any:
        return self._json(route, await self._request("POST", route, body, timeout_s))

    async def _request(self, method: str, route: str, body: Any, timeout_s: float) -> bytes:
        """The bytes of a 200; everything else is one of the three errors.

        The body is anything that JSON can hold, or JSON already.
        """
        where = f"{self.url}{route}"
        data: Any = None
        if body is not None:
            data = body if isinstance(body, bytes) else wire.encoded(body)
            if len(data) > _LARGE:
                data = io.BytesIO(data)  # a file is sent in pieces; bytes would hold up all else
        timeout = aiohttp.ClientTimeout(
            total=timeout_s, sock_connect=self._settings.connect_timeout_s
        )
        try:
            async with self._session.request(
                method, where, data=data, headers=self._headers(route), timeout=timeout
            ) as response:
                content = await response.read()
        except TimeoutError as error:
            limit = (
                f"no connection within {self._settings.connect_timeout_s:g}"
                if isinstance(error, aiohttp.ConnectionTimeoutError)
                else f"no answer within {timeout_s:g}"
            )
            raise NoAnswerError(f"{where}: {limit} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise NoAnswerError(f"{where}: {type(error).__name__}: {error}") from error
        if response.status == 200:
            return content
        text = wire.error_text(content.decode(errors="replace"))
        message = f"{where} answered {response.status}: {text}"
        if response.status >= 500:
            raise NoAnswerError(message)
        if response.status in (408, 429) or "Duplicate request ID" in text:
            raise BusyError(message)
        if response.status in (401, 403):
            message += (
                " (is the key right to which server.api_key_variable, or for weights and pauses "
                "server.admin_api_key_variable, points?)"
            )
        raise RefusedError(message, status=response.status, text=text)

    def _headers(self, route: str) -> dict[str, str]:
        """Of a request; the key of a route is the user's where there is no other, as there."""
        settings = self._settings
        of_user = ("/generate", "/v1/", "/get_", "/model", "/server", "/ready", "/health")
        is_open = route.startswith(of_user)
        key = settings.api_key if is_open else settings.admin_api_key or settings.api_key
        headers = {"Content-Type": "application/json"}
        return headers | {"Authorization": f"Bearer {key}"} if key else headers

    def _json(self, route: str, content: bytes) -> Any:
        try:
            return wire.decoded(content)
        except ValueError as error:
            raise NoAnswerError(
                f"{self.url}{route} sent {len(content)} bytes that are no whole JSON"
            ) from error

    def _judged(self, parse: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """What `parse` makes of an answer; its complaint is given the address."""
        try:
            return parse(*args, **kwargs)
        except wire.BadAnswerError as error:
            raise type(error)(f"{self.url} cannot be believed: {error}") from error
