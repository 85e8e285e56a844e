"""Every check of a config, before any device or server is touched.

`validate(config)` looks first at the shape of the tree (keys and types, against
`default_config()`), then at each section in turn, and raises at the first thing that cannot work.
Every message says, in one breath, which key, what it must be, why, and what was found:

    rollout.group_size must be at least 2: the baseline is a mean over the group; got 1.

The names that a key may take are listed here and not imported from the modules that look them up,
since those import JAX; `tests/test_validation.py` holds the two equal.
"""

from __future__ import annotations

import functools
import operator
import pathlib

from ml_collections import ConfigDict

from codjax import checks
from codjax import config as config_lib

# What a key may be set to; key -> names.
NAMES = {
    "model.dtype": ("float32", "bfloat16"),
    "model.param_dtype": ("float32", "bfloat16"),
    "model.family": ("qwen3", "qwen2", "llama", "qwen3_moe"),
    "model.remat": ("none", "dots", "full"),
    "packs.mode": ("cod", "ralph_sample", "ralph_full"),
    "rollout.prompt_style": ("full", "compact"),
    "rollout.context_compression": ("keep_all", "keep_answer", "remove_think"),
    "rollout.on_parse_failure": ("wipe", "keep_previous"),
    "rollout.steps_ahead": (0, 1),
    "credit.scheme": ("episodes", "coarse"),
    "credit.style": ("mean", "window_mean", "discounted"),
    "credit.baseline": ("group_mean", "leave_one_out"),
    "credit.reweight": ("off", "fixed", "adaptive", "shift"),
    "credit.reweight_group": ("batch", "taskset", "pack"),
    "loss.clip_mode": ("none", "one_side", "two_side", "ring", "sequence_one_side"),
    "loss.weight_mode": ("none", "importance", "truncated", "sequence", "advantage"),
    "loss.aggregation": (
        "token_mean",
        "sample_mean_token_sum",
        "sample_mean_token_mean",
        "constant",
    ),
    "loss.regulariser": ("none", "squared_log_ratio", "forward_kl"),
    "loss.kl_estimator": ("k1", "k2", "k3"),
    "optimizer.schedule": ("constant", "cosine", "linear"),
    "optimizer.momentum_dtype": ("float32", "bfloat16"),
    "optimizer.second_moment": ("full", "factored"),
    "warmup.optimizer.schedule": ("constant", "cosine", "linear"),
    "warmup.optimizer.momentum_dtype": ("float32", "bfloat16"),
    "warmup.optimizer.second_moment": ("full", "factored"),
}
BUILTIN_TOKENIZERS = ("builtin:bytes", "builtin:symbols")
SPLITS = ("train", "test")
CONDITIONS = ("none", "hint_blanked", "hint_swapped")

# Environments that speak the alphabet of "builtin:symbols", and nothing else.
COMPACT_ENVS = ("frozen_lake_compact",)

# What callers catch.
ConfigError = checks.ConfigError


def validate(config: ConfigDict) -> None:
    """Raises at the first thing in `config` that cannot work.

    Args:
        config: what the `get_config` of a config file returned, with the command line's values.

    Raises:
        ConfigError: with the key, the limit, the reason and the value.
    """
    _check_tree(config)
    for key, names in NAMES.items():
        checks.choice(key, functools.reduce(operator.getitem, key.split("."), config), names)
    checks.at_least(config, "seed", 0, "seeds are hashed as such")
    checks.at_least(config, "num_steps", 0, "it counts rollout steps")
    _check_model(config.model)
    checks.require(
        config.model.param_dtype == "float32" or config.num_steps == 0,
        "model.param_dtype",
        'be "float32" to train',
        "steps of the usual size round to nothing in bfloat16; model.dtype may be bfloat16",
        config.model.param_dtype,
    )
    _check_tokenizer(config.tokenizer)
    _check_mesh(config.mesh, config.model)
    if config.kernels.implementation is not None:
        # Here, since it brings JAX, which most checks do without.
        from codjax_kernels import IMPLEMENTATIONS

        name = config.kernels.implementation
        checks.choice("kernels.implementation", name, tuple(IMPLEMENTATIONS))
    _check_packs(config.packs)
    _check_rollout(config)
    _check_engine(config.engine, config.rollout)
    _check_credit(config.credit)
    _check_loss(config.loss, config.credit)
    _check_optimizer(config.optimizer, "optimizer", config.num_steps)
    _check_batching(config.batching, config.rollout, config.mesh)
    _check_warmup(config)
    checks.at_least(config.checkpoint, "checkpoint.every_steps", 1, "it is a distance in steps")
    checks.at_least(config.checkpoint, "checkpoint.keep", 1, "a run resumes from the newest one")
    _check_evaluation(config)
    checks.at_least(config.metrics, "metrics.packs_per_step", 0, "it counts groups; 0 is none")
    checks.at_least(config.metrics, "metrics.packs_every_steps", 1, "it is a distance in steps")
    _check_tasksets(config)


def _check_tree(config: ConfigDict) -> None:
    """Keys and types, including those of the task sets and evaluations that a config file adds."""
    if not isinstance(config, ConfigDict):
        raise ConfigError(
            "get_config() must return a ConfigDict: what default_config() gave, with some values "
            f"set; got {config!r:.100}."
        )
    checks.matches(config, config_lib.default_config(), "", _is_open)
    tasksets = checks.entries(config.tasksets, "tasksets", "taskset")
    for name, entry in tasksets.items():
        template = config_lib.taskset(env="", split="")
        checks.matches(entry, template, f"tasksets.{name}.", _is_open)
    matrix = checks.entries(config.evaluation.matrix, "evaluation.matrix", "evaluation")
    for name, entry in matrix.items():
        template = config_lib.evaluation(taskset="", num_packs=0)
        checks.matches(entry, template, f"evaluation.matrix.{name}.", _is_open)


def _is_open(key: str) -> bool:
    """Whether the config file chooses the keys of a section; others check what is in it."""
    return key in ("tasksets", "evaluation.matrix") or key.endswith((".data", ".settings"))


def _check_model(model: ConfigDict) -> None:
    if model.source != "init":
        why = 'it is "init" or a Hugging Face or converted folder here, with a config.json'
        found = (pathlib.Path(model.source).expanduser() / "config.json").is_file()
        checks.require(found, "model.source", "name a model", why, model.source)
        return
    for name in ("num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads"):
        checks.at_least(model, f"model.{name}", 1, "it is a size")
    if model.vocab_size is not None:
        checks.at_least(model, "model.vocab_size", 1, "it is a size")
    for name in ("rope_theta", "norm_eps", "init_std", "embedding_std"):
        checks.positive(model, f"model.{name}")
    checks.require(
        model.num_heads % model.num_kv_heads == 0,
        "model.num_heads",
        f"be a multiple of model.num_kv_heads = {model.num_kv_heads}",
        "each key-value head serves equally many heads",
        model.num_heads,
    )
    checks.require(
        model.head_dim >= 2 and model.head_dim % 2 == 0,
        "model.head_dim",
        "be even and at least 2",
        "rotary embedding turns pairs of channels",
        model.head_dim,
    )
    _check_experts(model)


def _check_experts(model: ConfigDict) -> None:
    for name in ("num_experts", "experts_per_token", "moe_intermediate_size"):
        key = f"model.{name}"
        if model.family == "qwen3_moe":
            checks.at_least(model, key, 1, "model.family qwen3_moe has experts")
        checks.default_unless(model, key, 0, "model.family", "qwen3_moe")
    checks.default_unless(model, "model.norm_topk_prob", False, "model.family", "qwen3_moe")
    checks.require(
        model.experts_per_token <= model.num_experts,
        "model.experts_per_token",
        f"be at most model.num_experts = {model.num_experts}",
        "a token goes to different experts",
        model.experts_per_token,
    )


def _check_tokenizer(tokenizer: ConfigDict) -> None:
    source = tokenizer.source
    why = (
        f"it is one of {' or '.join(BUILTIN_TOKENIZERS)}, or a Hugging Face folder on this machine"
    )
    if source is None or not source:
        checks.require(False, "tokenizer.source", "be given", why, source)
    if source.startswith("builtin:"):
        checks.choice("tokenizer.source", source, BUILTIN_TOKENIZERS)
        return
    folder = pathlib.Path(source).expanduser()
    found = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    checks.require(found, "tokenizer.source", "name a tokenizer", why, source)


def _check_mesh(mesh: ConfigDict, model: ConfigDict) -> None:
    for name, size in mesh.items():
        ok = size >= 1 or size == -1
        checks.require(ok, f"mesh.{name}", "be at least 1, or -1", "it counts devices", size)
    free = [name for name, size in mesh.items() if size == -1]
    checks.require(
        len(free) <= 1,
        "mesh",
        "leave at most one axis at -1",
        "the devices that are left go along one axis",
        tuple(free),
    )
    if model.source != "init":
        return
    has_experts = model.family == "qwen3_moe"
    checks.require(
        has_experts or mesh.expert == 1,
        "mesh.expert",
        "be 1",
        f"model.family {model.family} has no experts to cut; give the devices to mesh.fsdp",
        mesh.expert,
    )
    width = "moe_intermediate_size" if has_experts else "intermediate_size"
    for axis, names in {
        "tensor": ("num_heads", "num_kv_heads", width),
        "fsdp": ("hidden_size",),
        "expert": ("num_experts",),
    }.items():
        for name in names:
            checks.require(
                model[name] % max(mesh[axis], 1) == 0,
                f"model.{name}",
                f"be a multiple of mesh.{axis} = {mesh[axis]}",
                "it is split over the devices of that axis",
                model[name],
            )


def _check_packs(packs: ConfigDict) -> None:
    checks.at_least(packs, "packs.size", 1, "it counts the tasks of a pack")
    checks.require(
        not packs.keep_env_memory or packs.mode != "cod",
        "packs.keep_env_memory",
        "be false when packs.mode is cod",
        "only the attempts of a Ralph pack are at the same task",
        packs.keep_env_memory,
    )


def _check_rollout(config: ConfigDict) -> None:
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


def _check_engine(engine: ConfigDict, rollout: ConfigDict) -> None:
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


def _check_credit(credit: ConfigDict) -> None:
    checks.goes_with(credit, "credit.window", "credit.style", "window_mean")
    if credit.window is not None:
        checks.at_least(credit, "credit.window", 1, "it counts the entries of a return")
    checks.fraction(credit, "credit.gamma")
    checks.default_unless(credit, "credit.gamma", 1.0, "credit.style", "discounted")
    checks.goes_with(credit, "credit.reweight_temperature", "credit.reweight", "fixed")
    if credit.reweight_temperature is not None:
        checks.positive(credit, "credit.reweight_temperature")
    checks.positive(credit, "credit.coarse_decay")
    checks.default_unless(credit, "credit.coarse_decay", 1.0, "credit.scheme", "coarse")
    checks.default_unless(credit, "credit.coarse_divide_by_std", False, "credit.scheme", "coarse")


def _check_loss(loss: ConfigDict, credit: ConfigDict) -> None:
    checks.fraction(loss, "loss.eps_low")
    checks.fraction(loss, "loss.eps_low_outer")
    for name in ("eps_high", "eps_high_outer", "regulariser_coef", "kl_coef", "entropy_coef"):
        checks.at_least(loss, f"loss.{name}", 0, "its sign is part of the formula")
    if loss.clip_mode == "ring":
        for side in ("low", "high"):
            checks.at_least(
                loss,
                f"loss.eps_{side}_outer",
                loss[f"eps_{side}"],
                f"the ring lies outside loss.eps_{side}",
            )
    checks.positive(loss, "loss.advantage_temperature")
    checks.require(
        loss.weight_mode != "advantage" or credit.reweight == "off",
        "credit.reweight",
        "be off when loss.weight_mode is advantage",
        "both re-weight by the score",
        credit.reweight,
    )
    checks.goes_with(loss, "loss.aggregation_constant", "loss.aggregation", "constant")
    if loss.aggregation_constant is not None:
        checks.positive(loss, "loss.aggregation_constant")
    checks.require(
        (loss.regulariser == "none") == (loss.regulariser_coef == 0),
        "loss.regulariser_coef",
        'be above 0 exactly when loss.regulariser is not "none"',
        f"loss.regulariser is {loss.regulariser}, and one has no effect without the other",
        loss.regulariser_coef,
    )


def _check_optimizer(optimizer: ConfigDict, prefix: str, num_steps: int) -> None:
    for name in ("learning_rate", "eps", "grad_clip_norm"):
        checks.positive(optimizer, f"{prefix}.{name}")
    for name in ("b1", "b2"):
        value = optimizer[name]
        ok = 0 <= value < 1
        checks.require(ok, f"{prefix}.{name}", "be in [0, 1)", "it is a decay rate", value)
    checks.at_least(optimizer, f"{prefix}.weight_decay", 0, "weights shrink by it")
    checks.require(
        0 <= optimizer.warmup_steps <= num_steps,
        f"{prefix}.warmup_steps",
        f"be from 0 to the number of steps, {num_steps}",
        "the rate rises over so many of them",
        optimizer.warmup_steps,
    )


def _check_batching(batching: ConfigDict, rollout: ConfigDict, mesh: ConfigDict) -> None:
    sample = rollout.max_prompt_tokens + rollout.max_response_tokens
    checks.at_least(
        batching,
        "batching.row_length",
        sample,
        "a row holds any sample of rollout.max_prompt_tokens and rollout.max_response_tokens",
    )
    if batching.scored_per_row is not None:
        checks.at_least(
            batching,
            "batching.scored_per_row",
            rollout.max_response_tokens,
            "a row holds the entries of any response",
        )
    checks.at_least(batching, "batching.rows_per_microbatch", 1, "it counts rows")
    shards = max(mesh.data, 1) * max(mesh.fsdp, 1) * max(mesh.expert, 1)
    checks.require(
        batching.rows_per_microbatch % shards == 0,
        "batching.rows_per_microbatch",
        f"be a multiple of {shards}",
        "the rows are split over mesh.data times mesh.fsdp times mesh.expert devices",
        batching.rows_per_microbatch,
    )
    checks.require(
        batching.row_length % max(mesh.context, 1) == 0,
        "batching.row_length",
        f"be a multiple of {mesh.context}",
        "the tokens of a row are split over mesh.context devices",
        batching.row_length,
    )


def _check_warmup(config: ConfigDict) -> None:
    warmup, rollout, batching = config.warmup, config.rollout, config.batching
    checks.at_least(warmup, "warmup.num_steps", 0, "it counts steps; 0 is no warm-up")
    checks.at_least(warmup, "warmup.batch_episodes", 1, "it counts demonstrations")
    checks.at_least(
        warmup, "warmup.num_demos", warmup.batch_episodes, "a step draws warmup.batch_episodes"
    )
    for name in ("follow_frac", "true_hint_in_frac", "true_hint_out_frac"):
        checks.fraction(warmup, f"warmup.{name}")
    if warmup.num_steps > 0:
        _check_optimizer(warmup.optimizer, "warmup.optimizer", warmup.num_steps)
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
                env in COMPACT_ENVS,
                f"tasksets.{name}.env",
                f"be {' or '.join(COMPACT_ENVS)} with a warm-up",
                "the scripted player plays nothing else; set warmup.num_steps to 0",
                env,
            )


def _check_evaluation(config: ConfigDict) -> None:
    evaluation = config.evaluation
    checks.at_least(evaluation, "evaluation.temperature", 0, "0 is greedy")
    ok = 0 < evaluation.top_p <= 1
    checks.require(ok, "evaluation.top_p", "be in (0, 1]", "it is a probability", evaluation.top_p)
    checks.at_least(evaluation, "evaluation.top_k", 0, "0 keeps all tokens")
    checks.at_least(evaluation, "evaluation.seed", 0, "seeds are hashed as such")
    for name, entry in evaluation.matrix.items():
        key = f"evaluation.matrix.{name}"
        tasksets = tuple(config.tasksets)
        checks.choice(f"{key}.taskset", entry.taskset, tasksets, "among config.tasksets:")
        checks.choice(f"{key}.mode", entry.mode, NAMES["packs.mode"])
        checks.choice(f"{key}.condition", entry.condition, CONDITIONS)
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


def _check_tasksets(config: ConfigDict) -> None:
    """The task sets, last: their environments are other modules, which may import JAX."""
    for name, entry in config.tasksets.items():
        checks.choice(f"tasksets.{name}.split", entry.split, SPLITS)
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
            raise ConfigError(f"tasksets.{name}{'.' if is_key else ': '}{message}") from error
    for name, entry in config.evaluation.matrix.items():
        source, num_tasks = config.tasksets[entry.taskset], _num_tasks(entry)
        settings, data = source.settings.to_dict(), source.data.to_dict()
        try:
            envs.check(source.env, settings, data, source.split, num_tasks)
        except ValueError as error:
            key = f"evaluation.matrix.{name}.num_packs"
            raise ConfigError(f"{key} = {entry.num_packs} asks for too many: {error}") from error


def _num_tasks(entry: ConfigDict) -> int:
    """Rows of the task set that the packs of an evaluation take."""
    per_pack: int = 1 if entry.mode == "ralph_full" else entry.pack_size
    return entry.num_packs * per_pack


def _check_alphabet(config: ConfigDict, key: str, env: str) -> None:
    """Compact environments and the tokenizer of symbols go together, with compact prompts."""
    if env not in COMPACT_ENVS:
        checks.require(
            config.tokenizer.source != "builtin:symbols",
            key,
            f"be {' or '.join(COMPACT_ENVS)} when tokenizer.source is builtin:symbols",
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
