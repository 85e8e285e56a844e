"""`codjax bench engine`: the in-process sampler with and without prefix reuse.

The model calls of a scripted group are asked for again: runs all at once, calls of a run in order,
each prompt as it was, each response as long as it was. The answers are the model's own and not
those that the next prompts hold, so what is reused is a little less than in a real rollout: the
response of the turn before has to be fed.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from codjax import build, models, seeds, sharding
from codjax.bench import material
from codjax.config import default_config
from codjax.rollout import engine
from codjax.rollout import sampler as samplers

_NEVER = 1 << 30  # as min_shared_prefix: no prefix is worth copying
_LENGTH_MULTIPLE = 64  # cache rows are as long as the longest call, rounded up
_TOLERANCE = 1e-4  # of log-probs: prompts fed in other chunks are summed in another order


@dataclasses.dataclass(kw_only=True)
class _Contender:
    """An engine with its way to be asked; `answers` are those of the last replay."""

    sampler: engine.Engine
    weights: Any
    before_call: Callable[[], None]
    group: material.Group
    answers: list[samplers.Generation] = dataclasses.field(default_factory=list)
    spent: dict[str, int] = dataclasses.field(default_factory=dict)

    def replay(self) -> None:
        """All calls of the group, beginning with an empty cache."""
        self.sampler.load_weights(self.weights, policy_version=0)
        before = dict(self.sampler.stats)
        self.answers = asyncio.run(self._ask())
        self.spent = {key: value - before[key] for key, value in self.sampler.stats.items()}

    async def _ask(self) -> list[samplers.Generation]:
        async def ask_run(run: int) -> list[samplers.Generation]:
            answers = []
            turns = [turn for episode in self.group[run].episodes for turn in episode.turns]
            for number, turn in enumerate(turns):
                params = samplers.SamplingParams(
                    temperature=1.0,
                    top_p=1.0,
                    top_k=0,
                    max_tokens=len(turn.response_tokens),
                    stop_tokens=(),
                )
                self.before_call()
                seed = seeds.derive_seed(0, "bench", run, number)
                answers.append(await self.sampler.generate(turn.prompt_tokens, params, seed=seed))
            return answers

        replays = await asyncio.gather(*map(ask_run, range(len(self.group))))
        return [answer for answers in replays for answer in answers]


def bench(
    *,
    pack_size: int = 2,
    group_size: int = 8,
    max_turns: int = 5,
    num_thoughts: int = 4,
    vocab_size: int = 32768,
    num_layers: int = 2,
    rounds: int = 3,
) -> list[material.Row]:
    """Tokens per second with prefix reuse, and without.

    Args:
        pack_size: S.
        group_size: G, runs of the one pack; each has a slot of the engine.
        max_turns: of a solve episode; published are 8, for a machine with more time.
        num_thoughts: most sentences of reasoning in a response.
        vocab_size: V, at least that of the tokenizer.
        num_layers: L.
        rounds: timed replays of each variant, taken in turn, after one that compiles.

    Returns:
        A row a variant: calls; tokens of prompts, those of them that were fed to the model, and
        sampled tokens; calls of the decode program; a replay's median and fastest time and its
        median time of the processor; sampled tokens, and all tokens of the calls, per second;
        and, as `x_…`, what is a multiple of the first variant's.

    Raises:
        RuntimeError: the answers of the variants differ.
    """
    group = material.lake_group(
        material.word_chat(),
        pack_size=pack_size,
        group_size=group_size,
        max_turns=max_turns,
        num_thoughts=num_thoughts,
    )
    sizes = material.model_config(vocab_size=vocab_size, num_layers=num_layers)
    model = models.init(models.DecoderConfig(**sizes), seed=0)
    contenders = {
        "prefix reuse (codjax)": _contender(model, group, reuses=True),
        "every prompt whole": _contender(model, group, reuses=False),
    }
    for one in contenders.values():
        one.replay()
    times = material.in_turn({name: one.replay for name, one in contenders.items()}, rounds=rounds)
    first, second = contenders.values()
    _check_same(first.answers, second.answers)
    rows = [_row(name, one, times[name]) for name, one in contenders.items()]
    return material.compare(rows, {"x_seconds": "replay_s", "x_cpu": "cpu_s"})


def _contender(model: models.Decoder, group: material.Group, *, reuses: bool) -> _Contender:
    turns = [turn for run in group for episode in run.episodes for turn in episode.turns]
    longest = max(len(turn.prompt_tokens) + len(turn.response_tokens) for turn in turns)
    config = default_config()
    config.engine.num_slots = len(group)
    config.engine.max_tokens = -(-longest // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
    if not reuses:
        config.engine.min_shared_prefix = _NEVER
    sampler = build.make_engine(config, model, sharding.one_device())
    return _Contender(
        sampler=sampler,
        weights=build.params_of(model),
        before_call=(lambda: None) if reuses else functools.partial(_forget_idle, sampler),
        group=group,
    )


def _forget_idle(sampler: engine.Engine) -> None:
    """Make idle slots hold nothing, so that not even a slot's own last prompt is found again."""
    is_idle = np.array([request is None for request in sampler._requests])
    sampler._num_held[is_idle] = 0


def _check_same(answers: list[samplers.Generation], others: list[samplers.Generation]) -> None:
    for number, (answer, other) in enumerate(zip(answers, others, strict=True)):
        gap = np.inf
        if np.array_equal(answer.tokens, other.tokens):
            gap = float(np.abs(answer.logprobs - other.logprobs).max())
        if gap > _TOLERANCE:
            raise RuntimeError(
                f"call {number} is answered differently with and without prefix reuse (gap of "
                f"log-probs {gap:.3g}, at most {_TOLERANCE} allowed): their times mean nothing."
            )


def _row(name: str, contender: _Contender, timing: material.Timing) -> material.Row:
    spent = contender.spent
    return {
        "variant": name,
        "calls": len(contender.answers),
        "prompt_tokens": spent["prompt_tokens"],
        "fed_tokens": spent["fed_tokens"],
        "sampled_tokens": spent["sampled_tokens"],
        "decode_calls": spent["decode_calls"],
        "replay_s": timing.median_s,
        "fastest_s": timing.fastest_s,
        "cpu_s": timing.cpu_s,
        "sampled_per_s": spent["sampled_tokens"] / timing.median_s,
        "tokens_per_s": (spent["prompt_tokens"] + spent["sampled_tokens"]) / timing.median_s,
    }
