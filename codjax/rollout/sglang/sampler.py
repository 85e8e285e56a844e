"""The sampler of production: SGLang servers over HTTP, one or many.

    sampler = SGLangSampler(settings, expected, run_id=run_id)
    await sampler.connect()
    …                                                    # push weights to every replica
    await sampler.readmit(url, policy_version=0)         # for each: from here on it serves
    generation = await sampler.generate(prompt, params, seed=0, group=pack.seed)

A response that a server aborted goes on from the tokens it has, there or on another replica; a
request that failed is sent again, elsewhere if there is an elsewhere, a counted number of times.
An answer is believed only when everything in it agrees (`wire`).
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from codjax import types
from codjax.rollout.sampler import (
    Generation,
    PromptTooLongError,
    RefusedError,
    SamplerError,
    SamplingParams,
    join_spans,
)
from codjax.rollout.sglang import wire
from codjax.rollout.sglang.replicas import ExpectedModel, Replica, Replicas
from codjax.rollout.sglang.router import Router
from codjax.rollout.sglang.server import (
    BusyError,
    NoAnswerError,
    ServerClient,
    ServerSettings,
)

T = TypeVar("T")
# Statuses by which a server refuses every request, whatever is in it.
_REFUSES_ALL = (401, 403, 404, 405)


@dataclasses.dataclass(kw_only=True)
class Counters:
    """Totals since the start.

    Attributes:
        requests: sent, each try counted.
        retries: those of them that repeat one that failed.
        resumed: those of them that go on from the tokens of an aborted one.
        aborted: answers that a server cut short.
        wait_s: seconds, summed over requests, between tries, for a free place and for a replica.
    """

    requests: int = 0
    retries: int = 0
    resumed: int = 0
    aborted: int = 0
    wait_s: float = 0.0


class SGLangSampler:
    """A `Sampler` over SGLang servers that are already running.

    Owns the connections, not the servers; use it as a context manager, or call `close`. Must be
    made, used and closed in one running event loop. Weights come by another way (`push`); after
    each push the owner calls `readmit` for every replica that has them.

    Attributes:
        counters: what happened so far.
        replicas: who serves, who was set aside and why.
    """

    def __init__(self, settings: ServerSettings, expected: ExpectedModel, *, run_id: str) -> None:
        self.counters = Counters()
        self.replicas = Replicas(settings, expected, run_id)
        self._settings, self._expected, self._run_id = settings, expected, run_id
        self._router = Router(settings) if settings.router else None
        self._places = asyncio.Semaphore(settings.max_in_flight)

    async def __aenter__(self) -> SGLangSampler:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the connections; the servers abort what they were answering."""
        await self.replicas.close()
        if self._router is not None:
            await self._router.client.close()

    async def connect(self) -> None:
        """Waits for the servers and checks what they run; `readmit` makes them serve."""
        await self.replicas.connect()
        if self._router is not None:
            await self._router.ready()

    def why_stuck(self) -> tuple[float, str] | None:
        """Since when, on the monotonic clock, nothing can be asked, and why; None if it can."""
        if self._router is not None and self._router.down is not None:
            return self._router.down_since, self._router.down
        since = [replica.aside_since for replica in self.replicas.all if replica.aside is not None]
        if len(since) < len(self.replicas.all):
            return None
        return max(since), self.replicas.why_aside()

    async def readmit(self, url: str, *, policy_version: int | None) -> None:
        """See `Replicas.readmit`."""
        await self.replicas.readmit(url, policy_version=policy_version)

    async def serve_as_they_are(self) -> None:
        """Lets servers score with the weights that they have, also after they were gone.

        For a teacher, whose weights nobody pushes: a task of the owner beside `score`, which never
        ends by itself. `generate` is refused.
        """
        while True:
            url = await self.returned()
            try:
                await self.readmit(url, policy_version=None)
            except SamplerError:  # it is aside, with this reason
                await asyncio.sleep(self._settings.probe_interval_s)

    def set_aside(self, url: str, reason: str, *, distrust: bool = False) -> None:
        """See `Replicas.set_aside`."""
        self.replicas.set_aside(url, reason, distrust=distrust)

    async def returned(self) -> str:
        """See `Replicas.returned`."""
        return await self.replicas.returned()

    async def drain(self, urls: Sequence[str] | None = None) -> None:
        """See `Replicas.drain`; None: all of them."""
        await self.replicas.drain([r.url for r in self.replicas.all] if urls is None else urls)

    def client(self, url: str) -> ServerClient:
        """The connection to one replica, for pushes."""
        return self.replicas.of(url).client

    def metrics(self) -> dict[str, float]:
        """`sampler/name` -> number: totals since the start, and what is in flight now."""
        counts = {f"sampler/{k}": float(v) for k, v in dataclasses.asdict(self.counters).items()}
        flying = {
            f"sampler/in_flight_{index}": float(replica.in_flight)
            for index, replica in enumerate(self.replicas.all)
        }
        if self._router is not None:  # which does not say whom it asks
            flying["sampler/in_flight_router"] = float(self._router.in_flight)
        return counts | flying | {"sampler/set_aside": float(self.replicas.num_set_aside)}

    async def generate(
        self, prompt: np.ndarray, params: SamplingParams, *, seed: int, group: int = 0
    ) -> Generation:
        """A response to the int32 `[n]` prompt; see `codjax.rollout.sampler.Sampler`.

        The seed is not used: a server draws from its own generator, in an order that depends on
        what else it does. A response is shorter than `params.max_tokens` where the context ends.
        """
        del seed
        budget = self._budget(prompt, params)
        parts: list[wire.Answer] = []
        num_empty = 0
        while True:
            done = _join([part.tokens for part in parts], np.int32)
            text, room = np.concatenate([prompt, done]).astype(np.int32), budget - len(done)
            if room == 0 or (parts and len(text) > self._prompt_limit()):
                return _generation(parts, types.StopReason.LENGTH)
            self.counters.resumed += bool(parts)
            answer = None
            if self._router is not None:
                answer = await self._ask_router(self._router, text, params, room)
            if answer is None:
                answer = await self._ask(group, self._generating(text, params, room))
            if len(answer.tokens):
                parts.append(answer)
                num_empty = 0
            if answer.finish is not wire.Finish.ABORT:
                is_stop = answer.finish is wire.Finish.STOP
                reason = types.StopReason.STOP_TOKEN if is_stop else types.StopReason.LENGTH
                return _generation(parts, reason)
            self.counters.aborted += 1
            if not len(answer.tokens):
                num_empty += 1
                if num_empty > self._settings.max_retries:
                    raise SamplerError(
                        f"a request was aborted {num_empty} times before its next token: do the "
                        "servers have enough memory (--mem-fraction-static), or is another "
                        "process aborting them?"
                    )
                await self._pause(num_empty)

    async def score(self, tokens: np.ndarray) -> np.ndarray:
        """Log-probability of each next token at temperature 1: int32 `[n]` -> float32 `[n-1]`."""
        self._check_ids(tokens)
        limit = self._prompt_limit()
        if len(tokens) > limit:
            raise PromptTooLongError(
                f"a text of {len(tokens)} tokens exceeds the servers' {limit}."
            )

        async def call(replica: Replica) -> np.ndarray:
            return await replica.client.score(tokens)

        return await self._ask(0, call)

    def _generating(
        self, text: np.ndarray, params: SamplingParams, room: int
    ) -> Callable[[Replica], Awaitable[wire.Answer]]:
        """One try of a generation, on a replica."""

        async def call(replica: Replica) -> wire.Answer:
            if replica.policy_version < 0:
                raise SamplerError(
                    f"{replica.url} serves the weights that it has: it scores texts, and answers "
                    "nothing for this run before the run's weights were pushed there."
                )
            return await replica.client.generate(
                text,
                params,
                max_new_tokens=room,
                vocab_size=self._expected.vocab_size,
                run_id=self._run_id,
                oldest_version=replica.policy_version,
            )

        return call

    async def _ask(self, group: int, call: Callable[[Replica], Awaitable[T]]) -> T:
        """What `call` returns, from one replica or another.

        Raises:
            SamplerError: refused, or failed more often than `server.max_retries` allows.
        """
        failed: Replica | None = None
        reason: SamplerError
        for num_tries in range(1, self._settings.max_retries + 2):
            start = time.monotonic()
            async with self._places:
                replica = await self.replicas.choose(group, avoid=failed)
                self.counters.wait_s += time.monotonic() - start
                self.counters.requests += 1
                self.counters.retries += num_tries > 1
                admission = replica.admission
                replica.in_flight += 1
                try:
                    answer = await call(replica)
                except BusyError as error:
                    reason = error
                except (NoAnswerError, wire.BadAnswerError) as error:
                    self.replicas.failed(replica, error, admission=admission)
                    reason = error
                except RefusedError as error:
                    if error.status not in _REFUSES_ALL:
                        raise
                    self.replicas.set_aside(replica.url, str(error))
                    reason = error
                else:
                    newest = _newest(answer)
                    if await self.replicas.settled(replica, newest, admission=admission):
                        self.replicas.succeeded(replica)
                        return answer
                    reason = SamplerError(f"{replica.url} is not believed: {replica.aside}")
                finally:
                    replica.in_flight -= 1
                failed = replica
            is_first = num_tries == 1 and not isinstance(reason, BusyError)
            is_at_once = is_first and self.replicas.has_other(replica)
            if num_tries <= self._settings.max_retries and not is_at_once:
                await self._pause(num_tries)
        raise SamplerError(
            f"gave up after {num_tries} tries (server.max_retries is "
            f"{self._settings.max_retries}), the last: {reason}"
        ) from reason

    async def _ask_router(
        self, router: Router, text: np.ndarray, params: SamplingParams, room: int
    ) -> wire.Answer | None:
        """An answer of any server, or None where the servers themselves are to be asked.

        Whose an answer is, nobody says, and the router may ask a server that was set aside, by its
        policy even each time. So no server is blamed for a failure, an answer must be as new as the
        oldest weights that serve, what is not believed is not asked for here again, and while a
        server is in doubt, whose answers look as all others do, nothing is.

        Raises:
            SamplerError: the router, or whom it asked, failed more often than `server.max_retries`
                allows.
        """
        reason: SamplerError
        for num_tries in range(1, self._settings.max_retries + 2):
            start = time.monotonic()
            async with self._places:
                await self._router_ready(router)
                self.counters.wait_s += time.monotonic() - start
                self.counters.retries += num_tries > 1
                oldest = self.replicas.oldest_version()
                if self.replicas.is_in_doubt() or oldest < 0:  # -1: a teacher's, who refuses
                    return None
                self.counters.requests += 1
                num_distrusted = self.replicas.num_distrusted
                router.in_flight += 1
                try:
                    answer = await router.client.generate(
                        text,
                        params,
                        max_new_tokens=room,
                        vocab_size=self._expected.vocab_size,
                        run_id=self._run_id,
                        oldest_version=oldest,
                    )
                    router.num_failures = 0
                    if await self.replicas.reached(_newest(answer), since=num_distrusted):
                        return answer
                except BusyError as error:
                    reason = error
                except NoAnswerError as error:
                    router.failed(error)
                    reason = error
                except wire.BadAnswerError:
                    self.counters.retries += 1
                    return None
                else:
                    self.counters.retries += 1
                    return None
                finally:
                    router.in_flight -= 1
            if num_tries <= self._settings.max_retries:
                await self._pause(num_tries)
        raise SamplerError(
            f"gave up after {num_tries} tries by server.router (server.max_retries is "
            f"{self._settings.max_retries}), the last: {reason}"
        ) from reason

    async def _router_ready(self, router: Router) -> None:
        """Waits until the router can be asked and a server serves, both at once."""
        while True:
            await self.replicas.choose(0, avoid=None)
            await router.ready()
            if any(replica.aside is None for replica in self.replicas.all):
                return

    async def _pause(self, num_failures: int) -> None:
        """Longer after each failure; drawn, so that requests that failed together part."""
        longest = self._settings.backoff_s * 2 ** (num_failures - 1)
        pause_s = min(longest, self._settings.max_backoff_s) * random.uniform(0.5, 1.0)
        self.counters.wait_s += pause_s
        await asyncio.sleep(pause_s)

    def _budget(self, prompt: np.ndarray, params: SamplingParams) -> int:
        """New tokens to ask for: `max_tokens`, or what the context has left."""
        self._check_ids(prompt)
        context = min(replica.context_tokens for replica in self._infos())
        room = context - len(prompt)
        if len(prompt) > self._prompt_limit() or room < 1:
            raise PromptTooLongError(
                f"a prompt of {len(prompt)} tokens leaves no room for a response: the servers "
                f"take prompts of {self._prompt_limit()} tokens and {context} in all."
            )
        return min(params.max_tokens, room)

    def _prompt_limit(self) -> int:
        return min(info.prompt_tokens for info in self._infos())

    def _infos(self) -> list[wire.ServerInfo]:
        infos = [replica.info for replica in self.replicas.all if replica.info is not None]
        if len(infos) < len(self.replicas.all):
            raise RuntimeError("generate or score was called before connect.")
        return infos

    def _check_ids(self, tokens: np.ndarray) -> None:
        """An id outside the vocabulary would end the server, not the request."""
        if len(tokens) == 0:
            raise ValueError("a prompt needs at least one token; got none.")
        if tokens.min() < 0 or tokens.max() >= self._expected.vocab_size:
            raise ValueError(
                f"token ids must lie in [0, {self._expected.vocab_size}), the vocabulary of the "
                f"model; got ids from {tokens.min()} to {tokens.max()}."
            )


def _newest(answer: Any) -> int:
    """Version of the newest weights behind an answer; scores do not tell theirs."""
    spans = answer.spans if isinstance(answer, wire.Answer) else ()
    return max((span.version for span in spans), default=-1)


def _generation(parts: Sequence[wire.Answer], reason: types.StopReason) -> Generation:
    """The parts of a response as one, and who sampled what of the whole."""
    spans = join_spans([part.spans for part in parts])
    return Generation(
        tokens=_join([part.tokens for part in parts], np.int32),
        logprobs=_join([part.logprobs for part in parts], np.float32),
        policy_version=min(span.version for span in spans),
        version_spans=spans,
        stop_reason=reason,
    )


def _join(arrays: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *arrays]).astype(dtype)
