"""`codjax bench rollout`: what the rollout layer itself costs per model call.

Environment, prompts, tokenization, parsing, rewards, records and the event loop, for many runs of
the compact environment at once. The sampler is a script that looks at one token and returns an
array made before, so what is left is ours. Then the same with a server in another process, over
HTTP, and messages of two sizes (`served`).
"""

from __future__ import annotations

import random

import numpy as np

from codjax import chat as chats
from codjax.bench import material, served
from codjax.envs import frozen_lake_compact as lake
from codjax.rollout import scripted


def bench(
    *,
    num_packs: int = 16,
    group_size: int = 8,
    pack_size: int = 4,
    rounds: int = 9,
    num_served_packs: int = 125,
    num_requests: int = 1000,
    latency_s: float = 0.1,
    num_served_rounds: int = 7,
) -> dict[str, list[material.Row]]:
    """Microseconds per model call of the rollout of a step.

    Args:
        num_packs: P.
        group_size: G, runs of every pack; P times G runs are under way at once.
        pack_size: S.
        rounds: timed rollouts, after one that fills the caches of templates and texts.
        num_served_packs: P over HTTP.
        num_requests: messages of either size that are open at once.
        latency_s: seconds from a request to the server's answer.
        num_served_rounds: timed rollouts over HTTP, and timed sets of messages.

    Returns:
        Three tables: in process; in process and over HTTP; messages over HTTP.
    """
    return {
        "rollout": _in_process(num_packs, group_size, pack_size, rounds),
        "rollout, over HTTP": served.rollouts(
            num_packs=num_served_packs,
            group_size=group_size,
            pack_size=pack_size,
            latency_s=latency_s,
            rounds=num_served_rounds,
        ),
        "rollout, messages": served.messages(
            num_requests=num_requests, latency_s=latency_s, rounds=num_served_rounds
        ),
    }


def _in_process(num_packs: int, group_size: int, pack_size: int, rounds: int) -> list[material.Row]:
    """One row: runs, model calls, seconds of a rollout, and microseconds per call."""
    chat = chats.load_chat("builtin:symbols")
    config = material.compact_config(num_tasks=num_packs * pack_size)
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
