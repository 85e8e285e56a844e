"""What the benchmarks work on: real packs, played by a script.

Speed depends on the shape of the data (how long prompts are, how much runs share, how little of
it is sampled), so the groups come out of the real rollout: FrozenLake-Obscure with its full
prompts, hints and turns. Only the policy is a script, which reasons in a few sentences, walks at
random, and writes hints that can be read.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import random
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import tokenizers
import transformers
from ml_collections import ConfigDict

from codjax import build, packs, types
from codjax import chat as chats
from codjax.config import default_config, taskset
from codjax.rollout import prompts, runner, scripted
from codjax.rollout import sampler as samplers
from codjax.rollout import settings as rollout_settings

Row = dict[str, str | int | float | None]  # one line of a table
Group = list[types.Trajectory]

# Of a model for two cores; the vocabulary is its own argument, since it is what is compared.
MODEL_SIZES: Mapping[str, Any] = {
    "num_layers": 2,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 32,
    "dtype": "float32",
}

_THOUGHTS = (
    "The player stands at ({row}, {column}) and the goal is further down.",
    "The hints do not say yet where Direction {number} goes, so it is worth a try.",
    "Direction {number} seemed to move P up in the last step.",
    "There is a hole close by at ({row}, {column}), which I should keep away from.",
    "A move to the right would bring P nearer to G, if I knew which action that is.",
    "I have used several steps already and should take the shortest path from here.",
    "Nothing happened last time, so P must have been at the edge of the board.",
    "If the notes are right, Direction {number} is the safest choice now.",
)
_FACTS = (
    "- Direction {number} moved P {way}; seen once.",
    "- Direction {number} probably goes {way}, but this is uncertain.",
    "- Check the row and the column of G before the first move.",
    "- Trying an unknown action away from holes costs one step and teaches a lot.",
)
_WAYS = ("up", "down", "left", "right")
_NUM_WORDS = 1024  # of the tokenizer: about four characters a token, as published ones


@dataclasses.dataclass(frozen=True, kw_only=True)
class Player:
    """The scripted policy: walks at random, notes things down, and thinks before it does.

    Attributes:
        num_thoughts: most sentences of reasoning; the least is half of it.
    """

    num_thoughts: int

    def __call__(self, prompt: str, rng: random.Random) -> str:
        """Its answer to a prompt of the full style."""
        thoughts = self._some(_THOUGHTS, rng)
        if "## Record of the latest task" not in prompt:
            return f"{' '.join(thoughts)}\n<answer>Direction {rng.randint(1, 4)}</answer>"
        style = prompts.FULL
        facts = "\n".join(self._some(_FACTS, rng))
        return f"{' '.join(thoughts)}\n{style.start_delimiter}\n{facts}\n{style.end_delimiter}"

    def _some(self, sentences: tuple[str, ...], rng: random.Random) -> list[str]:
        count = rng.randint(-(-self.num_thoughts // 2), self.num_thoughts)
        return [
            rng.choice(sentences).format(
                number=rng.randint(1, 4),
                row=rng.randint(0, 4),
                column=rng.randint(0, 4),
                way=rng.choice(_WAYS),
            )
            for _ in range(count)
        ]


def config_of(env: str, *, num_tasks: int) -> ConfigDict:
    """The default config with one task set, of the first training rows of an environment."""
    config = default_config()
    config.tasksets.bench = taskset(env=env, split="train", num_records=num_tasks)
    config.rollout.tasksets = ("bench",)
    return config


def compact_config(*, num_tasks: int) -> ConfigDict:
    """The same of the compact environment, as tiny models are trained on it."""
    config = config_of("frozen_lake_compact", num_tasks=num_tasks)
    config.rollout.prompt_style = "compact"
    config.rollout.max_response_tokens = 12
    config.rollout.include_final_observation = True
    return config


def model_config(*, vocab_size: int, num_layers: int) -> dict[str, Any]:
    """Arguments of the decoder that the benchmarks run."""
    sizes = default_config().model.to_dict() | MODEL_SIZES | {"num_layers": num_layers}
    del sizes["source"]
    return sizes | {"vocab_size": vocab_size}


def lake_group(
    chat: chats.Chat, *, pack_size: int, group_size: int, max_turns: int, num_thoughts: int
) -> Group:
    """G runs of the first FrozenLake-Obscure training pack, full text, by the scripted player."""
    config = config_of("frozen_lake_obscure", num_tasks=pack_size)
    config.tasksets.bench.settings = ConfigDict({"agent_max_steps": max_turns})
    sampler = scripted.ScriptedSampler(scripted.speaks(Player(num_thoughts=num_thoughts), chat))
    (group,) = play(config, chat, sampler, num_packs=1, pack_size=pack_size, group_size=group_size)
    assert all(run.failure is None for run in group)
    return group


def play(
    config: ConfigDict,
    chat: chats.Chat,
    sampler: samplers.Sampler,
    *,
    num_packs: int,
    pack_size: int,
    group_size: int,
) -> list[Group]:
    """G runs of the first packs of the config's task set, in an event loop of their own."""
    playing_them = playing(
        config, chat, sampler, num_packs=num_packs, pack_size=pack_size, group_size=group_size
    )
    return asyncio.run(playing_them)


async def playing(
    config: ConfigDict,
    chat: chats.Chat,
    sampler: samplers.Sampler,
    *,
    num_packs: int,
    pack_size: int,
    group_size: int,
) -> list[Group]:
    """As `play`, for a sampler that lives in an event loop."""
    tasks = build.load_tasksets(config, ("bench",))["bench"]
    cut = packs.make_packs(
        tasks.tasks(num_packs * pack_size), size=pack_size, mode="cod", pad_to_full=False
    )
    return await runner.run_packs(
        cut,
        group_size=group_size,
        tasksets={"bench": tasks.rules()},
        sampler=sampler,
        chat=chat,
        settings=rollout_settings.settings_from(config.rollout, keep_env_memory=False),
        seed=0,
    )


@functools.cache
def word_chat() -> chats.Chat:
    """ChatML with a small byte-pair tokenizer, learned on the spot from texts of the rollout.

    One token a byte would make prompts four times as long as those of a published tokenizer, and
    the benchmark a benchmark of attention.
    """
    letters = chats.load_chat("builtin:bytes")
    group = lake_group(letters, pack_size=2, group_size=2, max_turns=8, num_thoughts=6)
    turns = [turn for run in group for episode in run.episodes for turn in episode.turns]
    texts = [letters.decode(np.append(t.prompt_tokens, t.response_tokens)) for t in turns]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=_NUM_WORDS,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = chats.CHATML
    return chats.Chat(tokenizer, name="the tokenizer of the benchmarks")


class Timing(NamedTuple):
    """Seconds of a variant over the rounds."""

    median_s: float
    fastest_s: float
    cpu_s: float  # median of the processor's time, over all cores: a busy machine moves it less


def in_turn(runs: Mapping[str, Callable[[], object]], *, rounds: int) -> dict[str, Timing]:
    """What each run takes; they go in turn, A B C A B C …, so that a busy spell hurts all."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            run()
            taken[name].append((time.perf_counter() - start, time.process_time() - cpu_start))
    return {
        name: Timing(
            median_s=float(np.median([wall for wall, _ in pairs])),
            fastest_s=min(wall for wall, _ in pairs),
            cpu_s=float(np.median([cpu for _, cpu in pairs])),
        )
        for name, pairs in taken.items()
    }


def compare(rows: list[Row], ratios: Mapping[str, str]) -> list[Row]:
    """The rows, each with how many times the first row's value it has: new key -> old key.

    >>> compare([{"s": 2.0}, {"s": 5.0}], {"x_s": "s"})
    [{'s': 2.0, 'x_s': 1.0}, {'s': 5.0, 'x_s': 2.5}]
    """

    def number(row: Row, key: str) -> float:
        value = row[key]
        assert isinstance(value, float)
        return value

    return [
        row | {new: number(row, old) / number(rows[0], old) for new, old in ratios.items()}
        for row in rows
    ]
