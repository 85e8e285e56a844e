"""Checks of what samples: tokenizer, packs, rollouts, the in-process sampler."""

from __future__ import annotations

import pathlib

from ml_collections import ConfigDict

from codjax import checks
from codjax.validation import names


def check_tokenizer(tokenizer: ConfigDict) -> None:
    """A built-in one, or a folder on this machine."""
    source = tokenizer.source
    builtin = " or ".join(names.BUILTIN_TOKENIZERS)
    why = f"it is one of {builtin}, or a Hugging Face folder on this machine"
    if source is None or not source:
        checks.require(False, "tokenizer.source", "be given", why, source)
    if source.startswith("builtin:"):
        checks.choice("tokenizer.source", source, names.BUILTIN_TOKENIZERS)
        return
    folder = pathlib.Path(source).expanduser()
    found = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    checks.require(found, "tokenizer.source", "name a tokenizer", why, source)


def check_packs(packs: ConfigDict) -> None:
    """Sizes, and modes that go with the memory of environments."""
    checks.at_least(packs, "packs.size", 1, "it counts the tasks of a pack")
    checks.require(
        not packs.keep_env_memory or packs.mode != "cod",
        "packs.keep_env_memory",
        "be false when packs.mode is cod",
        "only the attempts of a Ralph pack are at the same task",
        packs.keep_env_memory,
    )


def check_rollout(config: ConfigDict) -> None:
    """Task sets, groups and lengths of the rollouts."""
    rollout, packs = config.rollout, config.packs
    checks.require(
        len(rollout.tasksets) > 0,
        "rollout.tasksets",
        "name at least one task set",
        "training draws its tasks from them",
        rollout.tasksets,
    )
    for name in rollout.tasksets:
        checks.choice("rollout.tasksets", name, tuple(config.tasksets), "among config.tasksets:")
    unique = len(set(rollout.tasksets)) == len(rollout.tasksets)
    checks.require(unique, "rollout.tasksets", "name each once", "it is a set", rollout.tasksets)
    num_tasks = len(rollout.tasksets) * (1 if packs.mode == "ralph_full" else packs.size)
    checks.require(
        rollout.tasks_per_step >= num_tasks,
        "rollout.tasks_per_step",
        f"be at least {num_tasks}",
        "each of rollout.tasksets needs packs.size tasks for a pack",
        rollout.tasks_per_step,
    )
    checks.at_least(rollout, "rollout.group_size", 2, "the baseline is a mean over the group")
    checks.require(
        rollout.temperature > 0,
        "rollout.temperature",
        "be above 0",
        "greedy runs of a group are all the same and teach nothing",
        rollout.temperature,
    )
    checks.at_least(rollout, "rollout.max_response_tokens", 1, "it is a number of tokens")
    checks.at_least(rollout, "rollout.max_prompt_tokens", 1, "it is a number of tokens")
    request, cap = rollout.response_length_request, rollout.max_response_tokens
    checks.require(
        request is None or 1 <= request <= cap,
        "rollout.response_length_request",
        f"be from 1 to rollout.max_response_tokens = {cap}",
        "the prompt asks for what the cap allows",
        request,
    )
    _check_penalties(rollout.length_penalty, rollout.update_penalty)


def _check_penalties(length: ConfigDict, update: ConfigDict) -> None:
    checks.at_least(length, "rollout.length_penalty.coef", 0, "a penalty is taken off")
    checks.at_least(update, "rollout.update_penalty.coef", 0, "a penalty is taken off")
    both = (update.zero_tokens is None) == (update.full_tokens is None)
    pair = (update.zero_tokens, update.full_tokens)
    key = "rollout.update_penalty.zero_tokens and full_tokens"
    checks.require(both, key, "be both set or both unset", "they are the ends of one ramp", pair)
    checks.require(
        update.min_tokens is None or update.zero_tokens is not None,
        "rollout.update_penalty.min_tokens",
        "be unset while zero_tokens and full_tokens are",
        "it has no effect without them",
        update.min_tokens,
    )
    if update.min_tokens is not None:
        checks.at_least(update, "rollout.update_penalty.min_tokens", 1, "0 forbids nothing")
    for name, ramp in (("length_penalty", length), ("update_penalty", update)):
        if ramp.zero_tokens is None:
            continue
        checks.at_least(ramp, f"rollout.{name}.zero_tokens", 0, "it is a number of tokens")
        checks.require(
            ramp.zero_tokens < ramp.full_tokens,
            f"rollout.{name}.full_tokens",
            f"be above zero_tokens = {ramp.zero_tokens}",
            "the penalty rises from the one to the other",
            ramp.full_tokens,
        )


def check_engine(engine: ConfigDict, rollout: ConfigDict) -> None:
    """Cache rows that hold a sample; chunks of prompts that fit them."""
    for name in ("num_slots", "prefill_rows", "decode_steps", "min_shared_prefix"):
        checks.at_least(engine, f"engine.{name}", 1, "it is a count")
    sample = rollout.max_prompt_tokens + rollout.max_response_tokens
    checks.at_least(
        engine,
        "engine.max_tokens",
        sample,
        "a cache row holds rollout.max_prompt_tokens and rollout.max_response_tokens",
    )
    chunks = tuple(engine.prefill_chunks)
    integers = all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in chunks)
    checks.require(
        integers and len(chunks) > 0 and list(chunks) == sorted(set(chunks)),
        "engine.prefill_chunks",
        "be rising integers from 1",
        "the smallest chunk that fits is used",
        chunks,
    )
    checks.require(
        chunks[-1] <= engine.max_tokens,
        "engine.prefill_chunks",
        f"stay within engine.max_tokens = {engine.max_tokens}",
        "a chunk is written into a cache row",
        chunks,
    )
