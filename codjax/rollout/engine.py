"""The in-process sampler: continuous batching over one key-value cache, with prefix reuse.

The engine owns a cache of `num_slots` rows. A request takes a slot, its prompt is fed except for
the last token, and from there all busy slots decode together. A slot that falls idle keeps its
tokens, so that the next turn of the same episode, whose prompt begins with them, feeds only what
is new; a prefix that another slot holds (the first prompt of a group's runs) is copied.

Scheduling is a function of the order of the requests alone: the engine runs in the event loop of
its callers, and lets every caller that can go on do so before it admits and decodes. Two equal
rollouts therefore see equal batches, bit for bit.

New weights may come while answers are under way. Those keep the tokens that they have, are fed
again with them, since cached keys are of the old weights, and go on from there.

Nothing needs closing: the scheduler is a task that ends when there is nothing to do.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from codjax import types
from codjax.rollout import decoding
from codjax.rollout.sampler import (
    Generation,
    PromptTooLongError,
    SamplerError,
    SamplingParams,
    join_spans,
)

_NUM_STOP_TOKENS = 4  # room for stop tokens per request; a fixed shape, so that nothing recompiles


@dataclasses.dataclass(kw_only=True, eq=False)
class _Request:
    """A request on its way: waiting, then in a slot, then answered through its future.

    New weights send it from its slot back to waiting.
    """

    number: int  # in the order of arrival
    text: np.ndarray  # to feed: the prompt, and what earlier weights sampled
    params: SamplingParams
    seed: int
    future: asyncio.Future[Generation]
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    spans: tuple[types.VersionSpan, ...] = ()  # of those tokens that are in the text

    @property
    def num_fed(self) -> int:
        """How many of its tokens are in the text."""
        return self.spans[-1].end if self.spans else 0

    @functools.cached_property
    def key(self) -> bytes:
        """Sorts as the text does."""
        return self.text.astype(">u4").tobytes()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Feed:
    """A text to feed into a slot: its tokens from `start` on, after a prefix held by `source`."""

    request: _Request
    slot: int
    source: int
    start: int


class Engine:
    """A `Sampler` that runs the model in this process.

    May be called from one event loop at a time. `load_weights` may be called at any time, in that
    loop while requests are being answered.

    Attributes:
        stats: totals since the start: prompt tokens asked for, prompt tokens fed (the rest was
            reused), tokens sampled, decode steps. An answer that goes on with new weights counts
            as asked for again, its prompt with its tokens so far.
    """

    def __init__(
        self,
        model: decoding.CachedModel,
        *,
        num_slots: int,
        max_tokens: int,
        prefill_chunks: tuple[int, ...],
        prefill_rows: int,
        decode_steps: int,
        min_shared_prefix: int,
        cache_sharding: jax.sharding.Sharding | None = None,
    ):
        """Allocate the cache; see `config.engine` for the sizes."""
        self._model = model
        self._num_slots, self._max_tokens = num_slots, max_tokens
        self._chunks, self._prefill_rows = tuple(sorted(prefill_chunks)), prefill_rows
        self._min_shared_prefix = min_shared_prefix
        make_cache = functools.partial(model.init_cache, num_slots, max_tokens)
        self._cache = jax.jit(make_cache, out_shardings=cache_sharding)()
        self._prefill = jax.jit(
            functools.partial(decoding.prefill, model),
            donate_argnums=(1,),
            out_shardings=cache_sharding,
        )
        self._decode = jax.jit(
            functools.partial(decoding.decode, model, num_steps=decode_steps),
            static_argnames=("use_filter",),
            donate_argnums=(1,),
            out_shardings=(cache_sharding, None, None),
        )
        self._score = jax.jit(model.score)
        self._weights: Any = None
        self._policy_version = -1
        self._held = np.zeros((num_slots, max_tokens), np.int32)  # tokens whose keys are cached
        self._num_held = np.zeros(num_slots, np.int64)
        self._last_used = np.zeros(num_slots, np.int64)
        self._clock = 0
        self._requests: list[_Request | None] = [None] * num_slots
        self._slots = _idle_slots(num_slots)
        self._waiting: list[_Request] = []
        self._num_requests = 0
        self._scheduler: asyncio.Task[None] | None = None
        self.stats = {"prompt_tokens": 0, "fed_tokens": 0, "sampled_tokens": 0, "decode_calls": 0}

    def load_weights(self, weights: Any, *, policy_version: int) -> None:
        """Answer from these weights from now on; cached keys and values are forgotten.

        Answers under way keep their tokens and go on with the new weights, before any request
        that still waits; the draws stay those of the seed and the token's index.
        """
        under_way = sorted(filter(None, self._requests), key=lambda request: request.number)
        self._waiting = [self._sent_back(request) for request in under_way] + self._waiting
        self._requests = [None] * self._num_slots
        self._weights, self._policy_version = weights, policy_version
        self._forget()

    async def generate(
        self, prompt: np.ndarray, params: SamplingParams, *, seed: int, group: int = 0
    ) -> Generation:
        """A response to the int32 `[n]` prompt; see `codjax.rollout.sampler.Sampler`."""
        del group  # there is one cache, and all prefixes are in it
        self._check(prompt, params)
        request = _Request(
            number=self._num_requests,
            text=prompt,
            params=params,
            seed=seed,
            future=asyncio.get_running_loop().create_future(),
        )
        self._num_requests += 1
        self._waiting.append(request)
        if self._scheduler is None or self._scheduler.done():
            self._scheduler = asyncio.get_running_loop().create_task(self._run())
        return await request.future

    async def score(self, tokens: np.ndarray) -> np.ndarray:
        """Log-probability of each next token at temperature 1: int32 `[n]` -> float32 `[n-1]`."""
        # Lengths are rounded up to powers of two, so that few programs are compiled.
        length = max(16, 1 << (len(tokens) - 1).bit_length())
        padded = np.zeros((1, length), np.int32)
        padded[0, : len(tokens)] = tokens
        return np.asarray(self._score(self._weights, padded))[0, : len(tokens) - 1]

    def _check(self, prompt: np.ndarray, params: SamplingParams) -> None:
        if self._weights is None:
            raise RuntimeError("generate was called before load_weights.")
        if len(prompt) == 0:
            raise ValueError("a prompt needs at least one token; got none.")
        if len(params.stop_tokens) > _NUM_STOP_TOKENS:
            raise ValueError(
                f"at most {_NUM_STOP_TOKENS} stop tokens are supported; got {params.stop_tokens}."
            )
        if len(prompt) + params.max_tokens > self._max_tokens:
            raise PromptTooLongError(
                f"a prompt of {len(prompt)} tokens and a response of up to {params.max_tokens} "
                f"exceed engine.max_tokens = {self._max_tokens}."
            )

    async def _run(self) -> None:
        """Admit, decode, answer, until nothing is left; a failure is given to every caller."""
        try:
            while True:
                await self._let_callers_go_on()
                if self._waiting:
                    self._admit()
                if not any(self._requests):
                    return
                self._decode_some()
        except BaseException as error:  # a failed program, or the event loop being torn down
            for request in [*self._waiting, *filter(None, self._requests)]:
                if not request.future.done():
                    request.future.set_exception(
                        SamplerError("the engine was stopped while it answered")
                        if isinstance(error, asyncio.CancelledError)
                        else error
                    )
                    request.future.exception()  # a caller that is gone has nothing to retrieve
            self._waiting.clear()
            self._requests = [None] * self._num_slots
            self._forget()
            raise

    def _forget(self) -> None:
        """As after construction: no slot holds anything, and none was used before another.

        Which slot a request gets decides its row of the batch, and with it the last bits.
        """
        self._num_held[:] = 0
        self._last_used[:] = 0
        self._clock = 0
        self._slots.is_active[:] = False

    def _sent_back(self, request: _Request) -> _Request:
        """The request as it waits to go on with other weights."""
        spans = self._spans(request)
        new = request.tokens[request.num_fed :]
        text = np.concatenate([request.text, np.array(new, np.int32)])
        return dataclasses.replace(request, text=text, spans=spans)

    def _spans(self, request: _Request) -> tuple[types.VersionSpan, ...]:
        """Which weights sampled the tokens that the request has; the last ones, these."""
        now = types.VersionSpan(self._policy_version, 0, len(request.tokens) - request.num_fed)
        return join_spans([request.spans, (now,)])

    async def _let_callers_go_on(self) -> None:
        """Yield until no caller adds a request any more."""
        before = -1
        while before != len(self._waiting):
            before = len(self._waiting)
            await asyncio.sleep(0)

    def _admit(self) -> None:
        """Give waiting requests free slots, in waves: who shares a prefix waits for its leader."""
        self._waiting = [r for r in self._waiting if not r.future.done()]  # callers that left
        while self._waiting:
            free = [s for s in range(self._num_slots) if self._requests[s] is None]
            wave = self._next_wave(len(free))
            if not wave:
                return
            feeds = self._assign(wave, free)
            self._feed(feeds)
            for feed in feeds:
                self._occupy(feed)
            taken = {id(request) for request in wave}
            self._waiting = [r for r in self._waiting if id(r) not in taken]

    def _next_wave(self, num_free: int) -> list[_Request]:
        """Waiting requests, first come first served, that gain nothing by waiting for another."""
        candidates = sorted(self._waiting[:num_free], key=lambda request: request.key)
        wave: list[_Request] = []
        previous: _Request | None = None
        for request in candidates:
            # The last token of a text is never held: the decoder feeds it.
            shared = _common_prefix(previous.text, request.text[:-1]) if previous else 0
            held = int(self._held_prefix(request.text).max())
            if shared - held < self._min_shared_prefix:
                wave.append(request)
            previous = request
        return wave

    def _held_prefix(self, text: np.ndarray) -> np.ndarray:
        """Per slot, how many tokens of the text but for the last it holds at its start: `[S]`."""
        length = len(text) - 1
        differs = self._held[:, :length] != text[:length]
        differs |= np.arange(length) >= self._num_held[:, None]
        return (
            np.where(differs.any(axis=1), differs.argmax(axis=1), length)
            if length
            else (np.zeros(self._num_slots, np.int64))
        )

    def _assign(self, wave: list[_Request], free: list[int]) -> list[_Feed]:
        """A free slot for every request; who can reuse most chooses first."""
        held = {id(request): self._held_prefix(request.text) for request in wave}
        is_free = np.zeros(self._num_slots, bool)
        is_free[free] = True
        is_taken = np.zeros(self._num_slots, bool)
        feeds = []
        order = sorted(wave, key=lambda r: (-int(held[id(r)][is_free].max()), r.key, r.seed))
        for request in order:
            # Feeds run in this order: a slot taken before is overwritten before this one reads.
            reusable = np.where(is_taken, 0, held[id(request)])
            slot = self._choose_slot(reusable, is_free)
            source = int(reusable.argmax())
            if reusable[source] - reusable[slot] < self._min_shared_prefix:
                source = slot
            is_free[slot], is_taken[slot] = False, True
            start = int(reusable[source])
            feeds.append(_Feed(request=request, slot=slot, source=source, start=start))
        return feeds

    def _choose_slot(self, reusable: np.ndarray, is_free: np.ndarray) -> int:
        """The free slot to use: most to reuse if that is worth it, else the longest unused."""
        free = np.flatnonzero(is_free)
        best = free[reusable[free].argmax()]
        if reusable[best] >= min(self._min_shared_prefix, self._num_held[best]) > 0:
            return int(best)
        return int(free[self._last_used[free].argmin()])

    def _feed(self, feeds: list[_Feed]) -> None:
        """Run the texts, but for their last tokens, through the model."""
        work = [(feed, feed.start, feed.source) for feed in feeds]
        work = [w for w in work if w[0].source != w[0].slot or w[1] < len(w[0].request.text) - 1]
        self.stats["prompt_tokens"] += sum(len(feed.request.text) for feed in feeds)
        while work:
            batch, work = work[: self._prefill_rows], work[self._prefill_rows :]
            longest = max(len(f.request.text) - 1 - start for f, start, _ in batch)
            chunk = next((c for c in self._chunks if c >= longest), self._chunks[-1])
            self._feed_chunk(batch, chunk)
            rest = [(f, start + chunk, f.slot) for f, start, _ in batch]
            work += [w for w in rest if w[1] < len(w[0].request.text) - 1]

    def _feed_chunk(self, batch: list[tuple[_Feed, int, int]], chunk: int) -> None:
        tokens = np.zeros((self._prefill_rows, chunk), np.int32)
        start = np.full(self._prefill_rows, self._max_tokens, np.int32)
        source = np.zeros(self._prefill_rows, np.int32)
        slot = np.full(self._prefill_rows, self._num_slots, np.int32)
        for row, (feed, begin, origin) in enumerate(batch):
            new = feed.request.text[begin : min(begin + chunk, len(feed.request.text) - 1)]
            tokens[row, : len(new)] = new
            start[row] = begin if len(new) else self._max_tokens
            source[row], slot[row] = origin, feed.slot
            self.stats["fed_tokens"] += len(new)
        self._cache = self._prefill(self._weights, self._cache, tokens, start, source, slot)

    def _occupy(self, feed: _Feed) -> None:
        """Write the request into its slot, ready to decode from its text's last token."""
        request, slot = feed.request, feed.slot
        length = len(request.text) - 1
        self._held[slot, :length] = request.text[:-1]
        self._num_held[slot] = length
        self._requests[slot] = request
        params, slots = request.params, self._slots
        slots.token[slot], slots.position[slot] = request.text[-1], length
        slots.num_sampled[slot], slots.is_active[slot] = len(request.tokens), True
        slots.seed[slot], slots.max_tokens[slot] = request.seed, params.max_tokens
        slots.temperature[slot] = params.temperature
        slots.top_p[slot], slots.top_k[slot] = params.top_p, params.top_k
        slots.stop_tokens[slot] = -1
        slots.stop_tokens[slot, : len(params.stop_tokens)] = params.stop_tokens

    def _decode_some(self) -> None:
        """One call of `decode`, then the answers of the requests that it finished."""
        use_filter = bool(
            np.any(self._slots.is_active & ((self._slots.top_p < 1) | (self._slots.top_k > 0)))
        )
        self._cache, slots, decoded = self._decode(
            self._weights,
            self._cache,
            jax.tree.map(jnp.asarray, self._slots),
            use_filter=use_filter,
        )
        before = self._slots
        self._slots = decoding.Slots(*map(np.array, jax.device_get(slots)))
        decoded = jax.device_get(decoded)
        self._clock += 1
        self.stats["decode_calls"] += 1
        for slot in np.flatnonzero(before.is_active):
            self._collect(int(slot), int(before.token[slot]), decoded)

    def _collect(self, slot: int, fed: int, decoded: decoding.Decoded) -> None:
        """Take in what a slot sampled, and answer its request if that ended it."""
        request = self._requests[slot]
        assert request is not None
        count = int(decoded.is_valid[:, slot].sum())
        tokens = decoded.tokens[:count, slot]
        held = int(self._num_held[slot])
        self._held[slot, held : held + count] = [fed, *tokens[: count - 1]]
        self._num_held[slot] = held + count
        request.tokens += tokens.tolist()
        request.logprobs += decoded.logprobs[:count, slot].tolist()
        self.stats["sampled_tokens"] += count
        if self._slots.is_active[slot]:
            return
        self._requests[slot] = None
        self._last_used[slot] = self._clock
        is_stop = request.tokens[-1] in request.params.stop_tokens
        if request.future.done():  # its caller was cancelled
            return
        spans = self._spans(request)
        request.future.set_result(
            Generation(
                tokens=np.array(request.tokens, np.int32),
                logprobs=np.array(request.logprobs, np.float32),
                policy_version=min(span.version for span in spans),
                version_spans=spans,
                stop_reason=types.StopReason.STOP_TOKEN if is_stop else types.StopReason.LENGTH,
            )
        )


def _idle_slots(num_slots: int) -> decoding.Slots:
    """Slots of NumPy arrays, none active."""

    def zeros(dtype: type) -> np.ndarray:
        return np.zeros(num_slots, dtype)

    return decoding.Slots(
        token=zeros(np.int32),
        position=zeros(np.int32),
        num_sampled=zeros(np.int32),
        is_active=zeros(bool),
        seed=zeros(np.uint32),
        max_tokens=zeros(np.int32),
        temperature=np.ones(num_slots, np.float32),
        top_p=np.ones(num_slots, np.float32),
        top_k=zeros(np.int32),
        stop_tokens=np.full((num_slots, _NUM_STOP_TOKENS), -1, np.int32),
    )


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    length = min(len(a), len(b))
    differs = np.flatnonzero(a[:length] != b[:length])
    return int(differs[0]) if len(differs) else length
