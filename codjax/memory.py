"""What lives on a device through a run: the learner's state, and the in-process sampler.

    memory.check_sampler(config, model, learner, mesh)     # before the first weights are copied

`codjax plan` prints the same numbers for devices that are not there.
"""

from __future__ import annotations

import math
from typing import Any

import jax
from ml_collections import ConfigDict

from codjax import build, checks, distributed, learner, models

_GIB = 2**30


def state_bytes(made: learner.Learner, *, keeps_reference: bool) -> dict[str, int]:
    """Bytes on a device of what lives through an update.

    Args:
        made: the learner.
        keeps_reference: whether a reference model's parameters lie beside those of the policy.
    """
    state = made.abstract_state()
    params = _shard_bytes(state.params)
    return {
        "params": params,
        "gradients": sum(4 * _shard_size(x) for x in jax.tree.leaves(state.params)),
        "optimizer": _shard_bytes(state.opt_state),
        "reference": params if keeps_reference else 0,
    }


def sampler_bytes(
    config: ConfigDict, model: models.Decoder, mesh: jax.sharding.Mesh, *, num_processes: int
) -> dict[str, int]:
    """Bytes of the in-process sampler on the device of a process that has most.

    Its weights are a copy of the learner's: cut as those with one process, whole with more
    (`distributed.local_weights`). The cache is whole on every device.

    Args:
        config: of the run.
        model: may be abstract.
        mesh: of the learner.
        num_processes: that the mesh belongs to.
    """
    params = build.abstract_params(model, mesh)
    whole = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(params))
    slots, length = config.engine.num_slots, config.engine.max_tokens
    cache = jax.eval_shape(lambda: models.init_cache(model.config, slots, length))
    return {
        "weights": _shard_bytes(params) if num_processes == 1 else whole,
        "cache": sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(cache)),
    }


def check_sampler(
    config: ConfigDict, model: models.Decoder, made: learner.Learner, mesh: jax.sharding.Mesh
) -> None:
    """Raise if sampling in process cannot fit beside the state; devices that do not tell pass.

    Raises:
        ConfigError: says what would be needed and what there is.
    """
    stats = jax.local_devices()[0].memory_stats()
    if not stats or "bytes_limit" not in stats:  # CPUs
        return
    require_room(
        state_bytes(made, keeps_reference=config.loss.kl_coef != 0),
        sampler_bytes(config, model, mesh, num_processes=distributed.num_processes()),
        max_staleness=config.rollout.max_staleness,
        limit=stats["bytes_limit"],
    )


def require_room(
    state: dict[str, int], sampler: dict[str, int], *, max_staleness: int, limit: int
) -> None:
    """Raise if what a device holds while sampling is more than its memory.

    Args:
        state: of `state_bytes`.
        sampler: of `sampler_bytes`.
        max_staleness: above 0, an update runs meanwhile, with its gradients.
        limit: bytes of the device.

    Raises:
        ConfigError: as `check_sampler`.
    """
    lives = sum(state.values()) - (0 if max_staleness else state["gradients"])
    needed = lives + sum(sampler.values())
    if needed > limit:
        raise checks.ConfigError(
            "sampling in this process must fit beside the learner: each device would hold "
            f"{sampler['weights'] / _GIB:.2f} GiB of the sampler's weights, its cache of "
            f"{sampler['cache'] / _GIB:.2f} GiB (engine.num_slots x engine.max_tokens) and "
            f"{lives / _GIB:.2f} GiB of state, and has {limit / _GIB:.2f} GiB; take a smaller "
            "model or cache, or devices with more memory."
        )


def _shard_size(x: jax.ShapeDtypeStruct) -> int:
    assert x.sharding is not None
    return math.prod(x.sharding.shard_shape(x.shape))


def _shard_bytes(tree: Any) -> int:
    return sum(_shard_size(x) * x.dtype.itemsize for x in jax.tree.leaves(tree))
