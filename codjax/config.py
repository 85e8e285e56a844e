"""Every configuration key, its default and the reason for it.

A file in `configs/` calls `default_config()` and sets what differs. Defaults are the published
choices of CoD (spec/algorithm.md, marked there in bold) wherever there is one; sizes that only
the user can know are placeholders, which `codjax.validation.validate` insists on.

    config = default_config()
    config.tasksets.lake = taskset(env="frozen_lake_obscure", split="train")
    config.rollout.tasksets = ("lake",)
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict, config_dict


def default_config() -> ConfigDict:
    """A locked config with every key of a run; see the comments in the source for the reasons."""
    config = ConfigDict()
    config.seed = 0  # every random number of a run follows from it, by name and step
    config.num_steps = 100  # rollout steps, each with one optimizer step
    config.model = _model()
    config.tokenizer = ConfigDict(
        {
            # A Hugging Face folder, or "builtin:bytes" (any text, one token a byte), or
            # "builtin:symbols" (one token a character of the compact environments).
            "source": config_dict.placeholder(str),
        }
    )
    config.mesh = ConfigDict(
        {
            # Devices along each mesh axis; one of them may be -1, "the devices that are left".
            "data": -1,
            "fsdp": 1,
            "tensor": 1,
            "context": 1,  # cuts the tokens of a row, for rows too long for one device
            "expert": 1,  # cuts the experts of a mixture, and rows
        }
    )
    config.kernels = ConfigDict(
        {
            # None: by platform ("pallas_tpu" on TPUs, else "xla") | "xla" | "pallas_tpu" |
            # "pallas_gpu" (jax >= 0.12)
            "implementation": config_dict.placeholder(str),
        }
    )
    config.tasksets = ConfigDict()  # name → taskset(...), filled by the config file
    config.packs = ConfigDict(
        {
            "size": 4,  # S in training (published: 4; 8 in evaluation)
            "mode": "cod",  # "cod" | "ralph_sample" | "ralph_full"
            "pad_to_full": True,  # complete the last pack of a step from the step's first tasks
            "keep_env_memory": False,  # Ralph only: one environment for all tries of a run
        }
    )
    config.rollout = _rollout()
    config.engine = _engine()
    config.server = _server()
    config.credit = _credit()
    config.loss = _loss()
    config.optimizer = _optimizer(learning_rate=1e-6)
    config.batching = ConfigDict(
        {
            "row_length": 4096,  # T; no sample may be longer
            "scored_per_row": config_dict.placeholder(int),  # K; unset: row_length
            "rows_per_microbatch": 1,  # on the devices at once; must divide by data * fsdp * expert
            "share_prefixes": True,  # False: one tree without branches per sample, for comparison
        }
    )
    config.warmup = _warmup()
    config.checkpoint = ConfigDict(
        {
            "every_steps": 50,  # also at step 0 (the base model) and at the last step
            "keep": 3,  # newest checkpoints to keep, beside step 0
        }
    )
    config.evaluation = ConfigDict(
        {
            "matrix": ConfigDict(),  # name → evaluation(...), filled by the config file
            "temperature": 1.0,  # as in training; 0 is greedy
            "top_p": 1.0,
            "top_k": 0,  # 0: all of the vocabulary
            "seed": 1,  # of the sampler; hidden worlds follow from the pack's members alone
            "compare_base": True,  # also evaluate step 0, for the plot and the table
            "endpoint": _endpoint(),
        }
    )
    config.metrics = ConfigDict(
        {
            "tensorboard": True,  # event files beside metrics.jsonl
            "packs_per_step": 1,  # whole groups written to trajectories/ at a written step
            "packs_every_steps": 10,  # how often
        }
    )
    config.lock()
    # The two tables that a config file fills; `validate` looks at what it put there.
    config.tasksets.unlock()
    config.evaluation.matrix.unlock()
    return config


def taskset(
    *,
    env: str,
    split: str,
    num_records: int | None = None,
    show_reward: bool = True,
    data: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
) -> ConfigDict:
    """One entry of `config.tasksets`.

    The position of its name among the sorted names is part of the pack seeds: to add or rename a
    task set may give others new hidden worlds.

    Args:
        env: name of an environment.
        split: "train" or "test".
        num_records: how many rows to use; None for all of the split.
        show_reward: whether the writer of the hint sees the reward (spec/algorithm.md §4.2).
        data: overrides of the environment's record generator.
        settings: overrides of the environment's own settings.
    """
    entry = ConfigDict(
        {
            "env": env,
            "split": split,
            "num_records": config_dict.placeholder(int),
            "show_reward": show_reward,
            "data": ConfigDict(data or {}),
            "settings": ConfigDict(settings or {}),
        }
    )
    entry.num_records = num_records
    return entry


def evaluation(
    *, taskset: str, mode: str = "cod", pack_size: int = 8, num_packs: int, condition: str = "none"
) -> ConfigDict:
    """One entry of `config.evaluation.matrix`.

    Args:
        taskset: name in `config.tasksets`.
        mode: how packs are made, as `config.packs.mode`.
        pack_size: S of the evaluation (published: 8).
        num_packs: packs to run, from the start of the task set.
        condition: "none", or a control that costs only evaluation: "hint_blanked" (every episode
            gets the empty hint), "hint_swapped" (the hint that another pack had at the position).
    """
    return ConfigDict(
        {
            "taskset": taskset,
            "mode": mode,
            "pack_size": pack_size,
            "num_packs": num_packs,
            "condition": condition,
        }
    )


def _model() -> ConfigDict:
    return ConfigDict(
        {
            # "init" (random weights of the sizes below) or a Hugging Face folder (as it is, or
            # converted by `codjax convert`), whose own config.json then gives the sizes.
            "source": "init",
            "vocab_size": config_dict.placeholder(int),  # V; unset: the tokenizer's
            "family": "qwen3",  # "qwen3" | "qwen2" | "llama" | "qwen3_moe"; see docs/models.md
            "num_layers": 2,
            "hidden_size": 64,  # D
            "intermediate_size": 256,
            "num_heads": 4,  # N
            "num_kv_heads": 2,  # M, divides N
            "head_dim": 16,  # H
            "rope_theta": 1e6,  # as Qwen3
            "norm_eps": 1e-6,  # as Qwen3
            "tie_embeddings": True,  # as the small Qwen3 models
            "num_experts": 0,  # E of "qwen3_moe"; 0 for the others, as the next two
            "experts_per_token": 0,  # that a token is sent to
            "moe_intermediate_size": 0,  # width of one
            "norm_topk_prob": False,  # their weights sum to 1; the published "qwen3_moe" have it
            "init_std": 0.02,  # of matrices; as transformers
            "embedding_std": 0.02,  # of the token table
            "dtype": "bfloat16",  # of activations
            "param_dtype": "float32",  # of parameters and optimizer state
            "remat": "full",  # "none" | "dots" (keep matrix products) | "full" (keep layer inputs)
        }
    )


def _rollout() -> ConfigDict:
    return ConfigDict(
        {
            "tasksets": (),  # names of the training task sets, drawn in proportion to their rows
            "tasks_per_step": 32,  # raw tasks of a rollout step, as published: 8 packs at S = 4
            "group_size": 8,  # G runs of every pack
            "temperature": 1.0,
            "max_response_tokens": 2000,  # hard cap of one model call
            "max_prompt_tokens": 10000,  # a longer prompt ends the episode with reward 0
            "response_length_request": config_dict.placeholder(int),  # asked for in the prompt
            "prompt_style": "full",  # "full" for language models | "compact" for tiny ones
            "context_compression": "keep_all",  # | "keep_answer" | "remove_think"
            "include_final_observation": False,  # show the hint writer what the last action did
            "on_parse_failure": "wipe",  # | "keep_previous": deployment, spec core §7 #2
            "length_penalty": ConfigDict(
                # spec/algorithm.md §5.1; the thresholds are the published ones, which disable
                # the token term and leave the turn term.
                {"coef": 0.1, "zero_tokens": 1_000_000, "full_tokens": 2_000_000}
            ),
            "update_penalty": ConfigDict(
                # spec/algorithm.md §5.2; unset thresholds leave the format penalty alone.
                {
                    "coef": 0.1,
                    "min_tokens": config_dict.placeholder(int),
                    "zero_tokens": config_dict.placeholder(int),
                    "full_tokens": config_dict.placeholder(int),
                }
            ),
            "blank_hints": False,  # control: every episode gets the empty hint
            "sampler": "engine",  # in this process | "sglang": servers, see `server`
            # Most updates between the weights that sampled a token and those that it is trained
            # into; what is older is dropped. 0: sample and train in turn. 1: sample step n+1
            # while the learner updates on step n. Published: 20, and 5 for distillation.
            "max_staleness": 0,
            # False: a step is sampled with one version of the weights, by whose number a run of
            # max_staleness 0 or 1 can be repeated. True: new weights reach the answers that are
            # under way, steps overlap, and their order depends on the clock.
            "in_flight_updates": False,
            "steps_at_once": 2,  # rollout steps that are sampled together, if in_flight_updates
            "sync_every": 1,  # updates between two hand-overs of weights (published: 4)
            "replay": ConfigDict(
                # spec/algorithm.md §11.2; read with in_flight_updates
                {
                    "max_uses": 1,  # updates on one rollout step, as published
                    "decay": 2.0,  # what each use takes off its priority
                    "noise": 2.0,  # standard deviation in the priority: mixes recent steps
                }
            ),
            # For a rollout step, for an update with its exchange and checkpoint, and between two
            # runs of an evaluation; what takes longer ends the run, which says what was awaited.
            "deadline_s": 7200.0,
        }
    )


def _server() -> ConfigDict:
    """SGLang servers; read with `rollout.sampler` "sglang". Times are in seconds."""
    return ConfigDict(
        {
            # Addresses of servers that run already, "http://10.0.0.2:30000"; with several
            # processes, server i belongs to process i mod N. Empty: `local` ones are started. With
            # both, `codjax serve` starts the local ones, and a run uses these.
            "urls": (),
            # An sglang-router before `urls`, through which answers are asked for; weights, pauses
            # and scores go to `urls`.
            "router": config_dict.placeholder(str),
            # Names of variables of the environment that hold the keys; a key itself would end up
            # in config.json. --api-key and --admin-api-key of the servers.
            "api_key_variable": config_dict.placeholder(str),
            "admin_api_key_variable": config_dict.placeholder(str),
            "dtype": "bfloat16",  # of the weights that are pushed
            # "disk": a folder that the servers load | "bytes": in the body of a request
            "route": "disk",
            # Of "disk", seen by the servers under the same name; unset: weights/ in the workdir.
            # /dev/shm/… is fast where they are on this machine, and takes twice the weights.
            "weights_folder": config_dict.placeholder(str),
            "bucket_mb": 256,  # of "bytes": values in one request
            # Largest difference between a log-prob of a fixed text by a server and by the learner;
            # unset: 0.5 in bfloat16, 0.0001 in float32.
            "probe_tolerance": config_dict.placeholder(float),
            "max_in_flight": 512,  # requests that are open at once, over all servers
            "max_imbalance": 8,  # requests more than the least busy server before a pack moves
            "max_retries": 5,  # of a request, after its first try
            "max_failures": 3,  # in a row; then a server is set aside
            "backoff_s": 0.5,  # before the first retry on the same server; doubles with each
            "max_backoff_s": 15.0,
            "connect_timeout_s": 10.0,
            "request_timeout_s": 900.0,  # of one answer, to its last byte
            "control_timeout_s": 60.0,  # of pauses, flushes and questions
            "weights_timeout_s": 600.0,  # of loading weights
            "ready_timeout_s": 900.0,  # for servers to be ready, at the start and after a restart
            "replica_wait_s": 900.0,  # for any server to serve, when none does
            "drain_timeout_s": 60.0,  # for a server to drop what it was told to drop
            "probe_interval_s": 2.0,  # between two looks at a server that was set aside
            "local": ConfigDict(
                # Servers that `codjax train`, `eval` and `serve` start on their own machine.
                {
                    "num": 0,  # servers; per process, where several train
                    "command": ("python3", "-m", "sglang.launch_server"),
                    "arguments": ("--skip-tokenizer-init",),  # further ones, one word each
                    "gpus_per_server": 1,  # --tp-size; 0: leave CUDA_VISIBLE_DEVICES alone
                    "first_gpu": 0,  # the learner's come first where both are on one machine
                    "host": "127.0.0.1",  # "0.0.0.0" for `codjax serve` to other machines
                    "first_port": 30000,
                    "max_restarts": 5,  # in a row, of one server
                    "stop_timeout_s": 20.0,  # between SIGTERM and SIGKILL
                }
            ),
        }
    )


def _engine() -> ConfigDict:
    return ConfigDict(
        {
            "num_slots": 64,  # sequences decoded together; each owns a row of the KV cache
            "max_tokens": 12000,  # prompt and response of one call; the length of a cache row
            "prefill_chunks": (16, 64, 256),  # tokens fed at once; the smallest that fits is used
            "prefill_rows": 8,  # sequences fed at once
            "decode_steps": 8,  # tokens decoded per call before finished sequences are replaced
            "min_shared_prefix": 32,  # copy a prefix from another slot only if it saves as much
        }
    )


def _credit() -> ConfigDict:
    return ConfigDict(
        {
            # "episodes": reward-to-go per episode (§6-7); "coarse": one score per run (§9).
            "scheme": "episodes",
            "style": "mean",  # | "window_mean" | "discounted"
            "window": config_dict.placeholder(int),  # of "window_mean"
            "gamma": 1.0,  # of "discounted"; 0 is task-by-task RL
            "baseline": "group_mean",  # | "leave_one_out"
            "coarse_decay": 1.0,  # weight decay^(S-1-k) of task k under "coarse"
            "coarse_divide_by_std": False,
            "reweight": "adaptive",  # RED (§8): "off" | "fixed" | "adaptive" | "shift"
            "reweight_temperature": config_dict.placeholder(float),  # of "fixed"
            "reweight_group": "batch",  # | "taskset" | "pack": over which samples T is sought
        }
    )


def _loss() -> ConfigDict:
    return ConfigDict(
        {
            "clip_mode": "one_side",  # | "none" | "two_side" | "ring" | "sequence_one_side"
            "weight_mode": "none",  # | "importance" | "truncated" | "sequence" | "advantage"
            "eps_low": 0.2,
            "eps_high": 0.2,
            "eps_low_outer": 0.6,  # ring and truncated importance sampling
            "eps_high_outer": 2.0,
            "advantage_temperature": 1.0,  # of weight_mode "advantage"
            "aggregation": "token_mean",  # | "sample_mean_token_sum" | "sample_mean_token_mean"
            #                               | "constant"
            "aggregation_constant": config_dict.placeholder(float),
            "regulariser": "none",  # | "squared_log_ratio" | "forward_kl" (§10.4)
            "regulariser_coef": 0.0,
            "kl_estimator": "k2",  # | "k1" | "k3" (§10.5)
            "kl_coef": 0.0,  # 0: no reference model is kept
            "entropy_coef": 0.0,
        }
    )


def _optimizer(*, learning_rate: float) -> ConfigDict:
    return ConfigDict(
        {
            "learning_rate": learning_rate,
            "schedule": "constant",  # | "cosine" | "linear", to 0.1 of the rate at the last step
            "warmup_steps": 0,
            "b1": 0.9,
            "b2": 0.999,
            "eps": 1e-8,
            "weight_decay": 0.01,
            "grad_clip_norm": 1.0,
            # of the first moment; "bfloat16" saves 2 bytes a parameter. The second moment changes
            # by 1 - b2 of itself, less than a step of bfloat16, and stays in float32.
            "momentum_dtype": "float32",
            # "full": a number a parameter | "factored": one a row and one a column of each matrix
            # (Adafactor), which saves 4 bytes a parameter; see codjax/optim.py
            "second_moment": "full",
        }
    )


def _endpoint() -> ConfigDict:
    """How `codjax eval --checkpoint=http://host:port/v1` asks; docs/evaluation.md."""
    return ConfigDict(
        {
            "model": config_dict.placeholder(str),  # unset: the only one that the endpoint lists
            # "completions" (token ids go there, and come back if it can) | "chat" (messages, text)
            "route": "completions",
            # Name of the environment variable with the API key; unset: none is sent, so that no
            # key goes to an address by accident.
            "api_key_variable": config_dict.placeholder(str),
            "max_in_flight": 64,  # requests that are open at once
            "request_timeout_s": 600.0,  # of one request; a long answer of a busy server takes long
            "max_retries": 5,  # of a request, after 429, 5xx, no or a broken answer
        }
    )


def _warmup() -> ConfigDict:
    """Imitation of a scripted agent before RL, for models that had no pre-training."""
    return ConfigDict(
        {
            "num_steps": 0,  # 0: none
            "batch_episodes": 64,  # demonstrations of one task, solve and update, per step
            "num_demos": 20000,  # generated once, then visited in a random order, in epochs
            # What the scripted agent does; "sloppy" by intention: see codjax/warmup.py.
            "follow_frac": 0.9,  # demonstrations in which it acts on its hint where it can
            "true_hint_in_frac": 0.5,  # those whose given hint is true, though partial
            "true_hint_out_frac": 0.3,  # those whose written hint is true; the rest is random
            "optimizer": _optimizer(learning_rate=4e-3),
        }
    )
