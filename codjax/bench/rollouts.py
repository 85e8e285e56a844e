"""`codjax bench rollout`: what the rollout layer itself costs per model call.

Environment, prompts, tokenization, parsing, rewards, records and the event loop, for many runs of
the compact environment at once. The sampler is a script that looks at one token and returns an
array made before, so what is left is ours.
"""

from __future__ import annotations

import random

import numpy as np

from codjax import chat as chats
from codjax.bench import material
from codjax.envs import frozen_lake_compact as lake
from codjax.rollout import scripted


def bench(
    *, num_packs: int = 16, group_size: int = 8, pack_size: int = 4, rounds: int = 9
) -> list[material.Row]:
    """Microseconds per model call of the rollout of a step.

    Args:
        num_packs: P.
        group_size: G, runs of every pack; P times G runs are under way at once.
        pack_size: S.
        rounds: timed rollouts, after one that fills the caches of templates and texts.

    Returns:
        One row: runs, model calls, a rollout's median and fastest time and its median time of the
        processor, and microseconds per call.
    """
    chat = chats.load_chat("builtin:symbols")
    config = material.config_of("frozen_lake_compact", num_tasks=num_packs * pack_size)
    config.rollout.prompt_style = "compact"
    config.rollout.max_response_tokens = 12
    config.rollout.include_final_observation = True
    calls = []

    def rollout() -> None:
        sampler = scripted.ScriptedSampler(_presser(chat))
        groups = material.play(
            config,
            chat,
            sampler,
            num_packs=num_packs,
            pack_size=pack_size,
            group_size=group_size,
        )
        assert not any(
            run.failure or episode.has_format_error
            for group in groups
            for run in group
            for episode in run.episodes
        )
        calls.append(sampler.num_requests)

    rollout()
    timing = material.in_turn({"rollout": rollout}, rounds=rounds)["rollout"]
    return [
        {
            "variant": "compact, scripted sampler",
            "runs": num_packs * group_size,
            "calls": calls[0],
            "rollout_s": timing.median_s,
            "fastest_s": timing.fastest_s,
            "cpu_s": timing.cpu_s,
            "us_per_call": 1e6 * timing.median_s / calls[0],
            "cpu_us_per_call": 1e6 * timing.cpu_s / calls[0],
        }
    ]


def _presser(chat: chats.Chat) -> scripted.TokenScript:
    """Presses codes at random; after the mark that asks for a note, writes always the same one."""
    presses = [chat.respond(code) for code in lake.CODES]
    note, mark = chat.respond("<aUbD>"), int(chat.respond("#")[0])

    def answer(prompt: np.ndarray, rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
        tokens = note if prompt[-1] == mark else rng.choice(presses)
        return tokens, np.zeros(len(tokens), np.float32)

    return answer
