"""What the rollout asks of a language model, whoever runs it.

A sampler takes token ids and returns token ids with their log-probabilities. Two really implement
it: the in-process engine (`codjax.rollout.engine`) and SGLang servers (`codjax.rollout.sglang`).
How weights get there is another matter, and another for each (`codjax.serving`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from codjax import checks, types


class SamplerError(checks.ServerError):
    """The sampler could not answer, after its own retries; the run that asked is dropped."""


class RefusedError(SamplerError):
    """A server will not do what it was asked over HTTP, now or later.

    Attributes:
        status: of the HTTP answer.
        text: what it said.
    """

    def __init__(self, message: str, *, status: int, text: str) -> None:
        super().__init__(message)
        self.status, self.text = status, text


class PromptTooLongError(SamplerError):
    """Prompt and response cannot fit into the sampler's context."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn.

    Attributes:
        temperature: logits are divided by it; 0 takes the most probable token.
        top_p: smallest set of tokens with at least this probability; 1 keeps all.
        top_k: number of most probable tokens to keep; 0 keeps all.
        max_tokens: longest response.
        stop_tokens: ids that end the response; the sampled one is part of it.
    """

    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    stop_tokens: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """One response.

    Attributes:
        tokens: int32 `[m]`, m >= 1, with the stop token if one was sampled.
        logprobs: float32 `[m]`, natural log, of the distribution at the sampling temperature over
            the whole vocabulary (before top-p and top-k); at temperature 0, at temperature 1.
        policy_version: of the oldest weights that sampled a token of it.
        version_spans: which weights sampled which tokens; in order, covering all `m`.
        stop_reason: `STOP_TOKEN` or `LENGTH`.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    policy_version: int
    version_spans: tuple[types.VersionSpan, ...]
    stop_reason: types.StopReason


class Sampler(Protocol):
    """A language model that answers many requests at once."""

    async def generate(
        self, prompt: np.ndarray, params: SamplingParams, *, seed: int, group: int = 0
    ) -> Generation:
        """A response to the int32 `[n]` prompt.

        Args:
            prompt: token ids.
            params: how tokens are drawn.
            seed: of the draws; in process, equal arguments and weights give equal responses.
            group: any number that requests with shared prefixes have in common; among several
                servers it keeps them on one, and changes nothing else.

        Raises:
            PromptTooLongError: prompt and response do not fit into the context.
            SamplerError: no answer could be had.
        """
        ...

    async def score(self, tokens: np.ndarray) -> np.ndarray:
        """Log-probability of each next token at temperature 1: int32 `[n]` -> float32 `[n-1]`."""
        ...


def join_spans(
    parts: Sequence[tuple[types.VersionSpan, ...]],
) -> tuple[types.VersionSpan, ...]:
    """Spans over the parts, one after the other; neighbours of one version become one span.

    >>> span = types.VersionSpan
    >>> join_spans([(span(3, 0, 2),), (span(3, 0, 4), span(4, 4, 5))])
    (VersionSpan(version=3, start=0, end=6), VersionSpan(version=4, start=6, end=7))
    """
    joined: list[types.VersionSpan] = []
    for part in parts:
        offset = joined[-1].end if joined else 0
        for span in part:
            start, end = offset + span.start, offset + span.end
            if joined and joined[-1].version == span.version:
                start = joined.pop().start
            joined.append(types.VersionSpan(span.version, start, end))
    return tuple(joined)
