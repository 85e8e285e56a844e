"""Checks of what is played: task sets, evaluations, the scripted player of the warm-up."""

from __future__ import annotations

import re
import urllib.parse

from ml_collections import ConfigDict

from codjax import checks
from codjax.validation import learner_side, names


def check_warmup(config: ConfigDict) -> None:
    """Fractions, and environments that the scripted player knows."""
    warmup, rollout, batching = config.warmup, config.rollout, config.batching
    checks.at_least(warmup, "warmup.num_steps", 0, "it counts steps; 0 is no warm-up")
    checks.at_least(warmup, "warmup.batch_episodes", 1, "it counts demonstrations")
    checks.at_least(
        warmup, "warmup.num_demos", warmup.batch_episodes, "a step draws warmup.batch_episodes"
    )
    for name in ("follow_frac", "true_hint_in_frac", "true_hint_out_frac"):
        checks.fraction(warmup, f"warmup.{name}")
    if warmup.num_steps > 0:
        learner_side.check_optimizer(warmup.optimizer, "warmup.optimizer", warmup.num_steps)
        if batching.scored_per_row is not None:
            checks.at_least(
                batching,
                "batching.scored_per_row",
                rollout.max_prompt_tokens + rollout.max_response_tokens,
                "the warm-up scores every token of a conversation",
            )
        for name in rollout.tasksets:
            env = config.tasksets[name].env
            checks.require(
                env in names.COMPACT_ENVS,
                f"tasksets.{name}.env",
                f"be {' or '.join(names.COMPACT_ENVS)} with a warm-up",
                "the scripted player plays nothing else; set warmup.num_steps to 0",
                env,
            )


def check_evaluation(config: ConfigDict) -> None:
    """How it samples, and task sets that have the packs asked for."""
    evaluation = config.evaluation
    checks.at_least(evaluation, "evaluation.temperature", 0, "0 is greedy")
    ok = 0 < evaluation.top_p <= 1
    checks.require(ok, "evaluation.top_p", "be in (0, 1]", "it is a probability", evaluation.top_p)
    checks.at_least(evaluation, "evaluation.top_k", 0, "0 keeps all tokens")
    checks.at_least(evaluation, "evaluation.seed", 0, "seeds are hashed as such")
    _check_endpoint(evaluation.endpoint)
    for name, entry in evaluation.matrix.items():
        key = f"evaluation.matrix.{name}"
        tasksets = tuple(config.tasksets)
        checks.choice(f"{key}.taskset", entry.taskset, tasksets, "among config.tasksets:")
        checks.choice(f"{key}.mode", entry.mode, names.NAMES["packs.mode"])
        checks.choice(f"{key}.condition", entry.condition, names.CONDITIONS)
        checks.at_least(entry, f"{key}.pack_size", 1, "it counts the tasks of a pack")
        swapped = entry.condition == "hint_swapped"
        why = "hints are swapped between packs" if swapped else "it counts packs"
        checks.at_least(entry, f"{key}.num_packs", 2 if swapped else 1, why)
        num_records = config.tasksets[entry.taskset].num_records
        checks.require(
            num_records is None or _num_tasks(entry) <= num_records,
            f"{key}.num_packs",
            f"need no more than tasksets.{entry.taskset}.num_records = {num_records} tasks",
            f"these packs take {_num_tasks(entry)}",
            entry.num_packs,
        )


def is_address(checkpoint: str) -> bool:
    """Whether `--checkpoint` is the address of an endpoint, and no checkpoint of ours."""
    return checkpoint.startswith(("http://", "https://"))


def check_address(checkpoint: str) -> None:
    """The address of an endpoint, to which routes are appended."""
    try:
        parts = urllib.parse.urlsplit(checkpoint)
        ok = bool(parts.hostname) and parts.port != 0 and not (parts.query or parts.fragment)
    except ValueError:  # a port that is no number, a broken IPv6 address
        ok, parts = False, urllib.parse.SplitResult("", "", "", "", "")
    if "@" in parts.netloc:  # not shown: it may hold a password
        raise checks.ConfigError(
            "--checkpoint must hold no user and password: addresses are written into eval.json; "
            "name the variable that holds the key with evaluation.endpoint.api_key_variable."
        )
    why = "routes such as /completions are appended to it"
    checks.require(ok, "--checkpoint", "be an address as http://host:8000/v1", why, checkpoint)


def _check_endpoint(endpoint: ConfigDict) -> None:
    """Limits, and a variable that is a name and not the key itself."""
    variable = endpoint.api_key_variable
    if variable is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):
        # Not shown: it may be the key.
        raise checks.ConfigError(
            "evaluation.endpoint.api_key_variable must be the name of a variable of the "
            "environment, as OPENAI_API_KEY: the key itself belongs into that variable, not here."
        )
    model = endpoint.model
    why = "it names a model; leave it unset for the only one of the endpoint"
    checks.require(model is None or model != "", "evaluation.endpoint.model", "say one", why, model)
    checks.at_least(endpoint, "evaluation.endpoint.max_in_flight", 1, "it counts requests")
    checks.positive(endpoint, "evaluation.endpoint.request_timeout_s")
    checks.at_least(endpoint, "evaluation.endpoint.max_retries", 0, "it counts further tries")


def check_tasksets(config: ConfigDict) -> None:
    """The task sets, last: their environments are other modules, which may import JAX."""
    for name, entry in config.tasksets.items():
        checks.choice(f"tasksets.{name}.split", entry.split, names.SPLITS)
        if entry.num_records is not None:
            needed = config.packs.size if name in config.rollout.tasksets else 1
            key = f"tasksets.{name}.num_records"
            checks.at_least(entry, key, needed, "a pack takes packs.size records")
        _check_alphabet(config, f"tasksets.{name}.env", entry.env)
    from codjax import envs

    for name, entry in config.tasksets.items():
        settings, data = entry.settings.to_dict(), entry.data.to_dict()
        try:
            envs.check(entry.env, settings, data, entry.split, entry.num_records)
        except ValueError as error:
            message = str(error).removeprefix(f"{entry.env}: ")
            is_key = message.startswith(("settings.", "data.", "num_records "))
            raise checks.ConfigError(
                f"tasksets.{name}{'.' if is_key else ': '}{message}"
            ) from error
    for name, entry in config.evaluation.matrix.items():
        source, num_tasks = config.tasksets[entry.taskset], _num_tasks(entry)
        settings, data = source.settings.to_dict(), source.data.to_dict()
        try:
            envs.check(source.env, settings, data, source.split, num_tasks)
        except ValueError as error:
            key = f"evaluation.matrix.{name}.num_packs"
            raise checks.ConfigError(
                f"{key} = {entry.num_packs} asks for too many: {error}"
            ) from error


def _num_tasks(entry: ConfigDict) -> int:
    """Rows of the task set that the packs of an evaluation take."""
    per_pack: int = 1 if entry.mode == "ralph_full" else entry.pack_size
    return entry.num_packs * per_pack


def _check_alphabet(config: ConfigDict, key: str, env: str) -> None:
    """Compact environments and the tokenizer of symbols go together, with compact prompts."""
    if env not in names.COMPACT_ENVS:
        checks.require(
            config.tokenizer.source != "builtin:symbols",
            key,
            f"be {' or '.join(names.COMPACT_ENVS)} when tokenizer.source is builtin:symbols",
            "the symbols cannot spell the texts of any other",
            env,
        )
        return
    wanted = {"tokenizer.source": "builtin:symbols", "rollout.prompt_style": "compact"}
    for other, value in wanted.items():
        section, name = other.split(".")
        found = config[section][name]
        why = f"{key} is {env}, which speaks in symbols of one character"
        checks.require(found == value, other, f"be {value}", why, found)
