"""Policy-gradient and KL terms over scored entries (spec/algorithm.md §10).

`rec_loss` is the policy term, `kl_loss` the optional term towards a reference model, and
`aggregation_weights` says, before the batch is built, what each entry weighs and what the sum is
divided by. Both terms are ``sum over entries / num_scored`` with one divisor for the whole train
batch: losses and metrics of micro-batches add up to those of the batch, except the metrics in
`MAXIMA`, of which the largest counts; `merge_metrics` does both.

A weight of 0 marks padding: whatever stands there, nan included, changes neither value nor
gradient. Everything is float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jaxtyping import Array, Float, Shaped

from codjax import masked

# What callers may pass: NumPy, JAX or a list, of any real type.
Number = float | int
Entries = Shaped[np.ndarray | jax.Array, " N"] | Sequence[Number]
Divisor = Number | np.number | Shaped[np.ndarray | jax.Array, ""]
Scalar = Float[Array, ""]
Metrics = dict[str, Scalar]
Item = TypeVar("Item")

MAXIMA = frozenset({"loss/log_ratio_abs_max"})  # metrics to reduce by max; all others add up


def is_per_token(clip_mode: str, weight_mode: str) -> bool:
    """Whether `rec_loss` with these modes is a sum of terms that look at one entry each.

    Then its gradient can be made while the log-probs are (`logprobs.scored_loss`).
    """
    return not SEQUENCE_MODES & {clip_mode, weight_mode}


class Limits(NamedTuple):
    """The ε of the modes, how far a ratio may be from 1 on each side, and their temperature."""

    low: Number
    high: Number
    low_outer: Number
    high_outer: Number
    temperature: Number


class Terms(NamedTuple):
    """What a mode looks at; none of it carries a gradient."""

    ratio: Float[Array, " N"]  # policy over sampler probability of the entry
    sample_ratio: Float[Array, " N"]  # its geometric mean over the entry's sample
    advantage: Float[Array, " N"]


def rec_loss(  # noqa: PLR0917 - outside programs call it so (DESIGN §8)
    logprobs: Entries,
    old_logprobs: Entries,
    advantages: Entries,
    weights: Entries,
    clip_mode: str = "one_side",
    weight_mode: str = "none",
    eps_low: Number = 0.2,
    eps_high: Number = 0.2,
    num_scored: Divisor | None = None,
    *,
    eps_low_outer: Number = 0.6,
    eps_high_outer: Number = 2.0,
    advantage_temperature: Number = 1.0,
    sample_ids: Entries | None = None,
    regulariser: str = "none",
    regulariser_coef: Number = 0.0,
    num_entries: Divisor | None = None,
) -> tuple[Scalar, Metrics]:
    """Policy-gradient loss with a mask M and a weight W that carry no gradient (§10.1 to §10.4).

    With u = exp(logprobs - old_logprobs), the loss is ``sum(weights * (-W A M logprobs)) /
    num_scored``, so its gradient is that of the plain policy gradient, times W, where M keeps the
    entry. Entries that M drops still count in the divisor. ``one_side`` with ``none`` is the
    published choice (arXiv:2606.20002, after arXiv:2509.24203); ``one_side`` with ``importance``
    has the gradient of PPO's clipping. The value is no sign of progress; look at ``clip_frac``.

    Args:
        logprobs: of the policy in training, differentiated.
        old_logprobs: of the sampler, when it sampled.
        advantages: A, one per entry.
        weights: the entry's share of the loss; 0 on padding. See `aggregation_weights`.
        clip_mode: what M keeps, a key of `CLIP_MODES`.
        weight_mode: what W is, a key of `WEIGHT_MODES`.
        eps_low: 1 - eps_low is the lowest ratio that counts as near.
        eps_high: 1 + eps_high is the highest. ``sequence_one_side`` wants about 1e-4 for both.
        num_scored: what the sum is divided by, over the whole train batch; None: sum of `weights`.
        eps_low_outer: ring and truncated weights, far below 1.
        eps_high_outer: ring and truncated weights, far above 1.
        advantage_temperature: τ of weight mode ``advantage``, W = exp(A / τ).
        sample_ids: sample of each entry, from 0 to N-1; needed by the sequence modes.
        regulariser: added per entry, not masked by M; a key of `REGULARISERS`.
        regulariser_coef: β, its coefficient.
        num_entries: entries of weight other than 0 in the whole train batch; with it the metrics
            are plain means over entries under every aggregation. None: as the loss is taken.

    Returns:
        The loss, and its metrics: ``loss/clip_frac`` (entries that M dropped),
        ``loss/log_ratio_abs_mean``, ``loss/ratio_mean``, each a part of a mean over the whole
        train batch, and ``loss/log_ratio_abs_max``.

    Raises:
        ValueError: a name in no table, shapes that differ, or sample_ids missing.

    >>> loss, _ = rec_loss([-1.0, -0.7], [-1.0, -1.0], [0.5, 0.5], [1, 1])
    >>> float(loss)  # the second ratio, 1.35, is beyond 1.2: only 0.5 * 1.0 / 2 is left
    0.25
    """
    clip = _lookup(CLIP_MODES, clip_mode, key="loss.clip_mode")
    weigh = _lookup(WEIGHT_MODES, weight_mode, key="loss.weight_mode")
    regularise = _lookup(REGULARISERS, regulariser, key="loss.regulariser")
    if sample_ids is None and not is_per_token(clip_mode, weight_mode):
        raise ValueError(
            f"clip_mode {clip_mode!r} with weight_mode {weight_mode!r} needs sample_ids, "
            "the sample of each entry."
        )
    q, q_old, advantage, weight = _filled(weights, logprobs, old_logprobs, advantages)
    log_ratio = jax.lax.stop_gradient(q) - q_old
    ratio = jnp.exp(log_ratio)
    sample_ratio = (
        ratio if sample_ids is None else _sample_ratio(log_ratio, weight != 0, sample_ids)
    )
    terms = Terms(ratio=ratio, sample_ratio=sample_ratio, advantage=advantage)
    limits = Limits(eps_low, eps_high, eps_low_outer, eps_high_outer, advantage_temperature)
    is_kept = clip(terms, limits)
    # An entry that M drops may have an infinite ratio, and 0 * inf would be nan: hence fill.
    coefs = masked.fill(weigh(terms, limits) * advantage, is_kept)
    per_entry = -jax.lax.stop_gradient(coefs) * q
    per_entry = per_entry + regulariser_coef * regularise(q, q_old)
    divisor = _divisor(weight, num_scored)
    share = weight / divisor
    if num_entries is not None:
        share = (weight != 0) / _divisor(weight, num_entries)
    return masked.weighted_sum(per_entry, weight) / divisor, {
        "loss/clip_frac": masked.weighted_sum(1.0 - is_kept, share),
        "loss/log_ratio_abs_mean": masked.weighted_sum(jnp.abs(log_ratio), share),
        "loss/ratio_mean": masked.weighted_sum(ratio, share),
        "loss/log_ratio_abs_max": jnp.max(jnp.abs(log_ratio), initial=0.0),
    }


def kl_loss(
    logprobs: Entries,
    ref_logprobs: Entries,
    weights: Entries,
    estimator: str = "k2",
    num_scored: Divisor | None = None,
) -> Scalar:
    """KL of the policy to a reference, estimated at the sampled tokens (§10.5).

    With d = logprobs - ref_logprobs: ``k1`` d, ``k2`` d²/2, ``k3`` exp(-d) - 1 + d. As terms of a
    loss prefer ``k2``: on samples of the policy its gradient is that of KL(policy ‖ reference)
    without bias, while that of k1 has mean zero and that of k3 belongs to the other direction.

    Args:
        logprobs: of the policy in training, differentiated.
        ref_logprobs: of the reference model.
        weights: the entry's share; 0 on padding.
        estimator: a key of `KL_ESTIMATORS`.
        num_scored: as in `rec_loss`.

    >>> float(kl_loss([-1.0], [-1.5], [1]))
    0.125
    """
    estimate = _lookup(KL_ESTIMATORS, estimator, key="loss.kl_estimator")
    q, q_ref, weight = _filled(weights, logprobs, ref_logprobs)
    return masked.weighted_sum(estimate(q - q_ref), weight) / _divisor(weight, num_scored)


def aggregation_weights(
    num_tokens: npt.ArrayLike, aggregation: str = "token_mean", constant: Number | None = None
) -> tuple[Float[np.ndarray, " N"], float]:
    """How the entries of a train batch become one number (§10.3).

    Args:
        num_tokens: scored tokens of each sample of the whole train batch.
        aggregation: a key of `AGGREGATIONS`.
        constant: the divisor of ``constant``, above 0.

    Returns:
        Per sample, the weight that each of its entries has, and the divisor of the weighted sum.

    >>> weights, divisor = aggregation_weights([4, 2], "sample_mean_token_mean")
    >>> weights.tolist(), divisor
    ([0.25, 0.5], 2.0)
    """
    tokens = np.asarray(num_tokens, np.float64)
    function = _lookup(AGGREGATIONS, aggregation, key="loss.aggregation")
    return function(tokens, constant)


def merge_metrics(left: Mapping[str, Array], right: Mapping[str, Array]) -> Metrics:
    """Metrics of two micro-batches as those of both together; the keys must agree."""
    if left.keys() != right.keys():
        raise ValueError(f"metrics differ in their names: {sorted(left.keys() ^ right.keys())}.")
    return {
        name: jnp.maximum(left[name], right[name]) if name in MAXIMA else left[name] + right[name]
        for name in left
    }


def _filled(weights: Entries, *vectors: Entries) -> tuple[Array, ...]:
    """Each vector in float32 with 0 where the weight is 0, and the weights last."""
    weight = jnp.asarray(weights, jnp.float32)
    arrays = [jnp.asarray(vector, jnp.float32) for vector in vectors]
    if any(array.shape != weight.shape or array.ndim != 1 for array in arrays):
        shapes = [array.shape for array in (*arrays, weight)]
        raise ValueError(f"a loss takes vectors over entries, all of one length; got {shapes}.")
    return *(masked.fill(array, weight != 0) for array in arrays), weight


def _divisor(weight: Array, num_scored: Divisor | None) -> Array:
    """What the sum over entries is divided by; 1 where there is nothing to divide."""
    divisor = jnp.sum(weight) if num_scored is None else jnp.asarray(num_scored, jnp.float32)
    return jnp.where(divisor > 0, divisor, 1.0)


def _sample_ratio(log_ratio: Array, is_entry: Array, sample_ids: Entries) -> Array:
    """Per entry, the exponential of the mean log-ratio over its sample, padding left out."""
    ids = jnp.where(is_entry, jnp.asarray(sample_ids, jnp.int32), 0)
    num_segments = log_ratio.shape[0]
    totals = jax.ops.segment_sum(masked.fill(log_ratio, is_entry), ids, num_segments)
    counts = jax.ops.segment_sum(is_entry.astype(jnp.float32), ids, num_segments)
    return jnp.exp(totals / jnp.maximum(counts, 1.0))[ids]


def _one_side(ratio: Array, advantage: Array, limits: Limits) -> Array:
    """Drops what has already moved far in the direction in which the advantage pushes."""
    up = (advantage >= 0) & (ratio <= 1 + limits.high)
    down = (advantage <= 0) & (ratio >= 1 - limits.low)
    return up | down


def _two_side(ratio: Array, limits: Limits) -> Array:
    return (ratio >= 1 - limits.low) & (ratio <= 1 + limits.high)


def _ring(ratio: Array, advantage: Array, limits: Limits) -> Array:
    """Two-side, and also what moved very far against the advantage."""
    far_below = (advantage >= 0) & (ratio <= 1 - limits.low_outer)
    far_above = (advantage <= 0) & (ratio >= 1 + limits.high_outer)
    return _two_side(ratio, limits) | far_below | far_above


# Every name of the loss config, and the function it stands for.
CLIP_MODES: dict[str, Callable[[Terms, Limits], Array]] = {
    "none": lambda terms, limits: jnp.ones_like(terms.advantage, dtype=bool),
    "one_side": lambda terms, limits: _one_side(terms.ratio, terms.advantage, limits),
    "two_side": lambda terms, limits: _two_side(terms.ratio, limits),
    "ring": lambda terms, limits: _ring(terms.ratio, terms.advantage, limits),
    "sequence_one_side": lambda terms, limits: _one_side(
        terms.sample_ratio, terms.advantage, limits
    ),
}
WEIGHT_MODES: dict[str, Callable[[Terms, Limits], Array]] = {
    "none": lambda terms, limits: jnp.ones_like(terms.advantage),
    "importance": lambda terms, limits: terms.ratio,
    "truncated": lambda terms, limits: jnp.clip(
        terms.ratio, 1 - limits.low_outer, 1 + limits.high_outer
    ),
    "sequence": lambda terms, limits: terms.sample_ratio,
    "advantage": lambda terms, limits: jnp.exp(terms.advantage / limits.temperature),
}
SEQUENCE_MODES = frozenset({"sequence_one_side", "sequence"})  # those that read sample_ratio
REGULARISERS: dict[str, Callable[[Array, Array], Array]] = {
    "none": lambda q, q_old: jnp.zeros_like(q),
    "squared_log_ratio": lambda q, q_old: jnp.square(q - q_old),
    "forward_kl": lambda q, q_old: -q,
}
KL_ESTIMATORS: dict[str, Callable[[Array], Array]] = {
    "k1": lambda log_ratio: log_ratio,
    "k2": lambda log_ratio: jnp.square(log_ratio) / 2,
    "k3": lambda log_ratio: jnp.expm1(-log_ratio) + log_ratio,
}
AGGREGATIONS: dict[str, Callable[[np.ndarray, Number | None], tuple[np.ndarray, float]]] = {
    "token_mean": lambda tokens, constant: (np.ones_like(tokens), float(tokens.sum())),
    "sample_mean_token_sum": lambda tokens, constant: (np.ones_like(tokens), float(len(tokens))),
    "sample_mean_token_mean": lambda tokens, constant: (
        1.0 / np.maximum(tokens, 1.0),  # a sample without a token has no entry to weigh
        float(len(tokens)),
    ),
    "constant": lambda tokens, constant: (np.ones_like(tokens), _checked_constant(constant)),
}


def _checked_constant(constant: Number | None) -> float:
    if constant is None or not constant > 0:
        raise ValueError(
            "loss.aggregation_constant must be above 0 with loss.aggregation 'constant'; "
            f"got {constant}."
        )
    return float(constant)


def _lookup(table: Mapping[str, Item], name: str, *, key: str) -> Item:
    if name not in table:
        raise ValueError(f"{key} must be one of {', '.join(table)}; got {name!r}.")
    return table[name]
