"""`config.optimizer` → an optax chain.

Gradient clip by global norm, then AdamW, as the published runs (spec/algorithm.md §11). The
schedule counts optimizer steps.
"""

from __future__ import annotations

from collections.abc import Callable

import optax
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
    return optax.chain(
        optax.clip_by_global_norm(config.grad_clip_norm),
        optax.adamw(
            make_schedule(config, num_steps=num_steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mu_dtype=config.momentum_dtype,
        ),
    )
