"""Every check of a config, before any device or server is touched.

`validate(config)` looks first at the shape of the tree (keys and types, against
`default_config()`), then at each section in turn, and raises at the first thing that cannot work.
Every message says, in one breath, which key, what it must be, why, and what was found:

    rollout.group_size must be at least 2: the baseline is a mean over the group; got 1.
"""

from __future__ import annotations

import functools
import operator

from ml_collections import ConfigDict

from codjax import checks
from codjax import config as config_lib
from codjax.validation import learner_side, rollout_side, server_side, tasks
from codjax.validation.names import NAMES

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
    learner_side.check_model(config.model)
    checks.require(
        config.model.param_dtype == "float32" or config.num_steps == 0,
        "model.param_dtype",
        'be "float32" to train',
        "steps of the usual size round to nothing in bfloat16; model.dtype may be bfloat16",
        config.model.param_dtype,
    )
    rollout_side.check_tokenizer(config.tokenizer)
    learner_side.check_mesh(config.mesh, config.model)
    if config.kernels.implementation is not None:
        # Here, since it brings JAX, which most checks do without.
        from codjax_kernels import IMPLEMENTATIONS

        name = config.kernels.implementation
        checks.choice("kernels.implementation", name, tuple(IMPLEMENTATIONS))
    rollout_side.check_packs(config.packs)
    rollout_side.check_rollout(config)
    server_side.check_asynchrony(config.rollout)
    rollout_side.check_engine(config.engine, config.rollout)
    server_side.check_server(config)
    learner_side.check_credit(config.credit)
    learner_side.check_loss(config.loss, config.credit)
    learner_side.check_optimizer(config.optimizer, "optimizer", config.num_steps)
    learner_side.check_batching(config.batching, config.rollout, config.mesh)
    tasks.check_warmup(config)
    checks.at_least(config.checkpoint, "checkpoint.every_steps", 1, "it is a distance in steps")
    checks.at_least(config.checkpoint, "checkpoint.keep", 1, "a run resumes from the newest one")
    tasks.check_evaluation(config)
    checks.at_least(config.metrics, "metrics.packs_per_step", 0, "it counts groups; 0 is none")
    checks.at_least(config.metrics, "metrics.packs_every_steps", 1, "it is a distance in steps")
    tasks.check_tasksets(config)


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
