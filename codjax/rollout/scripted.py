"""A sampler whose model is a Python function: for tests, demonstrations and calibrations.

def answer(prompt: str, rng: random.Random) -> str:
    return "<answer>Direction 1</answer>"

sampler = ScriptedSampler(speaks(answer, chat))
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import numpy as np

from codjax import chat as chats
from codjax import types
from codjax.rollout import sampler as samplers

# (prompt tokens, random numbers of the request) → response tokens with their log-probs.
TokenScript = Callable[[np.ndarray, random.Random], tuple[np.ndarray, np.ndarray]]
# (prompt text with its special tokens, random numbers of the request) → response text.
TextScript = Callable[[str, random.Random], str]


def speaks(script: TextScript, chat: chats.Chat) -> TokenScript:
    """A token script that reads and writes texts, is always sure (log-prob 0) and ends its turn."""

    def tokens(prompt: np.ndarray, rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
        response = chat.respond(script(chat.show(prompt), rng))
        return response, np.zeros(len(response), np.float32)

    return tokens


class ScriptedSampler:
    """A `Sampler` that asks a script. It owns nothing and need not be closed.

    A response is cut where the limits of the request cut a model's: after the first stop token,
    or at `max_tokens`. A `SamplerError` that the script raises is what the caller sees.

    Attributes:
        policy_version: what its responses carry; set by `load_weights`.
        num_requests: requests so far.
        peak_in_flight: most requests that were open at once.
    """

    def __init__(self, script: TokenScript, *, max_context: int | None = None) -> None:
        self.policy_version = 0
        self.num_requests = 0
        self.peak_in_flight = 0
        self._in_flight = 0
        self._script = script
        self._max_context = max_context

    async def generate(
        self, prompt: np.ndarray, params: samplers.SamplingParams, *, seed: int, group: int = 0
    ) -> samplers.Generation:
        """What the script answers, given random numbers that depend on `seed` alone."""
        del group
        if self._max_context is not None and len(prompt) + params.max_tokens > self._max_context:
            raise samplers.PromptTooLongError(
                f"{len(prompt)} prompt tokens and {params.max_tokens} new ones do not fit into "
                f"{self._max_context}."
            )
        self.num_requests += 1
        self._in_flight += 1
        self.peak_in_flight = max(self.peak_in_flight, self._in_flight)
        try:
            await asyncio.sleep(0)  # as a real one, it lets the other runs go on meanwhile
            tokens, logprobs = self._script(prompt, random.Random(seed))
        finally:
            self._in_flight -= 1
        head = tokens[: params.max_tokens].tolist()
        ends = [index + 1 for index, token in enumerate(head) if token in params.stop_tokens]
        made = np.asarray(tokens[: ends[0] if ends else params.max_tokens], np.int32)
        return samplers.Generation(
            tokens=made,
            logprobs=np.asarray(logprobs[: len(made)], np.float32),
            policy_version=self.policy_version,
            version_spans=(types.VersionSpan(self.policy_version, 0, len(made)),),
            stop_reason=types.StopReason.STOP_TOKEN if ends else types.StopReason.LENGTH,
        )

    async def score(self, tokens: np.ndarray) -> np.ndarray:
        """Zeros: a script is sure of everything."""
        return np.zeros(len(tokens) - 1, np.float32)

    def load_weights(self, weights: Any, *, policy_version: int) -> None:
        """Answers carry `policy_version` from now on; a script has no weights to take."""
        del weights
        self.policy_version = policy_version
