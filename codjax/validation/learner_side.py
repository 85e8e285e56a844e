"""Checks of what trains: model, mesh, credit, loss, optimizer, rows."""

from __future__ import annotations

import pathlib

from ml_collections import ConfigDict

from codjax import checks


def check_model(model: ConfigDict) -> None:
    """A folder that is there, or sizes that fit each other."""
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


def check_mesh(mesh: ConfigDict, model: ConfigDict) -> None:
    """At most one free axis; sizes of a fresh model divide."""
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


def check_credit(credit: ConfigDict) -> None:
    """Keys that belong to the style, the scheme and the re-weighting chosen."""
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


def check_loss(loss: ConfigDict, credit: ConfigDict) -> None:
    """Clips, weights and coefficients that go together."""
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


def check_optimizer(optimizer: ConfigDict, prefix: str, num_steps: int) -> None:
    """Rates in their ranges; the warm-up ends with the run at the latest."""
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


def check_batching(batching: ConfigDict, rollout: ConfigDict, mesh: ConfigDict) -> None:
    """A row holds any sample; rows divide over the mesh."""
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
