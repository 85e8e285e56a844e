"""The names that a key of the config may take.

Listed here and not imported from the modules that look them up, since those import JAX;
`tests/test_validation.py` holds the two equal.
"""

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
    "rollout.sampler": ("engine", "sglang"),
    "server.dtype": ("float32", "bfloat16"),
    "server.route": ("disk", "bytes"),
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
    "evaluation.endpoint.route": ("completions", "chat"),
    "warmup.optimizer.schedule": ("constant", "cosine", "linear"),
    "warmup.optimizer.momentum_dtype": ("float32", "bfloat16"),
    "warmup.optimizer.second_moment": ("full", "factored"),
}
BUILTIN_TOKENIZERS = ("builtin:bytes", "builtin:symbols")
SPLITS = ("train", "test")
CONDITIONS = ("none", "hint_blanked", "hint_swapped")

# Environments that speak the alphabet of "builtin:symbols", and nothing else.
COMPACT_ENVS = ("frozen_lake_compact",)
