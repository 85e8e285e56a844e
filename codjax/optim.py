"""`config.optimizer` → an optax chain.

Gradient clip by global norm, then AdamW, as the published runs (spec/algorithm.md §11), or
Adafactor where the optimizer's state is what does not fit. The schedule counts optimizer steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

_FINAL_FRACTION = 0.1  # of the learning rate, at the last step of a decaying schedule


def make_schedule(config: ConfigDict, *, num_steps: int) -> optax.Schedule:
    """Optimizer step → learning rate: linear warm-up, then the shape that the config names."""
    num_decay = max(num_steps - config.warmup_steps, 1)
    shapes: dict[str, Callable[[], optax.Schedule]] = {
        "constant": lambda: optax.constant_schedule(config.learning_rate),
        "cosine": lambda: optax.cosine_decay_schedule(
            config.learning_rate, num_decay, alpha=_FINAL_FRACTION
        ),
        "linear": lambda: optax.linear_schedule(
            config.learning_rate, _FINAL_FRACTION * config.learning_rate, num_decay
        ),
    }
    warmup = optax.linear_schedule(
        config.learning_rate / max(config.warmup_steps, 1),
        config.learning_rate,
        max(config.warmup_steps - 1, 1),
    )
    return optax.join_schedules([warmup, shapes[config.schedule]()], [config.warmup_steps])


def make_optimizer(config: ConfigDict, *, num_steps: int) -> optax.GradientTransformation:
    """The gradient transformation of a run of `num_steps` optimizer steps."""
    make = {"full": _adamw, "factored": _adafactor}[config.second_moment]
    return optax.chain(
        optax.clip_by_global_norm(config.grad_clip_norm),
        make(config, make_schedule(config, num_steps=num_steps)),
    )


def _adamw(config: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(
        schedule,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mu_dtype=config.momentum_dtype,
    )


def _adafactor(config: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Adafactor (arXiv:1804.04235) at a learning rate that means what AdamW's means.

    The second moment of a matrix is the product of its rows' and its columns' means, where both
    sizes are at least 128; smaller arrays keep all of it. Its decay rises as in the paper, up to
    b2 (arXiv:2106.04560, §3.4); updates are clipped to a root mean square of 1 per array, and
    their average with rate b1, in `momentum_dtype`, is applied. At b1 = 0 no momentum is kept.
    """
    momentum = optax.ema(config.b1, accumulator_dtype=config.momentum_dtype)
    return optax.chain(
        optax.scale_by_factored_rms(
            decay_rate=config.b2,
            decay_rate_fn=lambda step, b2: jnp.minimum(b2, 1.0 - (step + 1.0) ** -0.8),
            epsilon=config.eps**2,
        ),
        optax.clip_by_block_rms(1.0),
        momentum if config.b1 else optax.identity(),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(schedule),
    )


def moment_shardings(
    optimizer: optax.GradientTransformation, params: Any, shardings: Any
) -> optax.OptState:
    """Sharding of every array in the optimizer's state.

    A moment lies as its parameter does. What has one axis less, a factored moment, lies as the
    axes that are left; everything else is whole on every device.

    Args:
        optimizer: of `make_optimizer`.
        params: shapes of the parameters, float32.
        shardings: `NamedSharding` of each of them.
    """

    def of_moment(moment: Any, param: Any, to: NamedSharding) -> NamedSharding:
        if moment.shape == param.shape:
            return to
        axes = tuple(to.spec) + (None,) * (param.ndim - len(to.spec))
        # Of two axes of one size either may have been dropped: both cuts divide.
        for dropped in range(param.ndim):
            if moment.shape == (*param.shape[:dropped], *param.shape[dropped + 1 :]):
                left = PartitionSpec(*axes[:dropped], *axes[dropped + 1 :])
                return NamedSharding(to.mesh, left)
        return everywhere(to)

    def everywhere(to: NamedSharding) -> NamedSharding:
        return NamedSharding(to.mesh, PartitionSpec())

    return optax.tree_utils.tree_map_params(
        optimizer,
        of_moment,
        jax.eval_shape(optimizer.init, params),
        params,
        shardings,
        transform_non_params=lambda _: everywhere(jax.tree.leaves(shardings)[0]),
    )
