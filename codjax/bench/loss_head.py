"""`codjax bench loss_head`: loss and gradient over the vocabulary, five ways.

The published loss (one-sided clip, no weights) of `K` entries, from their hidden states on, with
the gradients of hidden states and output table. Every variant must find the same loss and
gradients as the first of its group, or there is no table:

* *all scored*: whole logits under automatic differentiation; chunks of them, computed again in the
  backward pass (what Tunix's and MaxText's chunked heads do); `token_logprobs`, which computes
  them again from the log-normaliser; `token_loss`, which makes the gradient in the forward pass.
* *some scored*: `token_loss` over all positions, with weight 0 on those that are not scored; and
  `scored_loss` over room for as many entries, which projects the valid ones only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import codjax_kernels
import jax
import jax.numpy as jnp
import numpy as np

from codjax import losses
from codjax.bench import material

_MIB = 2**20
# Of loss and gradients (L2), relative: sums in another order; in bfloat16 the rounding of
# operands, which every variant does at another place.
_TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2}


class Entries(NamedTuple):
    """What the loss looks at, beside log-probs; `n` entries."""

    sampler_logprobs: jax.Array  # float32 [n]
    advantages: jax.Array  # float32 [n]
    weights: jax.Array  # float32 [n], 0 on what is not scored


class Problem(NamedTuple):
    """Hidden states and the tokens that they predict; all are sampled, some are scored."""

    targets: jax.Array  # int32 [K]
    entries: Entries  # of K positions
    scored: jax.Array  # int32 [n], the positions with a weight, in order


Loss = Callable[[jax.Array, jax.Array, Problem], jax.Array]  # (hidden, table, problem) → loss


def bench(
    *,
    num_positions: int = 4096,
    hidden_size: int = 512,
    vocab_size: int = 32768,
    scored_frac: float = 0.25,
    chunk_size: int = 512,
    dtype: str = "float32",
    rounds: int = 5,
) -> dict[str, list[material.Row]]:
    """Seconds and temporaries of loss and gradients, for every variant.

    Args:
        num_positions: K, a multiple of `chunk_size`.
        hidden_size: D.
        vocab_size: V.
        scored_frac: of the positions, in the second group.
        chunk_size: entries whose logits exist at once, in all variants that have chunks.
        dtype: of hidden states and table, "float32" or "bfloat16".
        rounds: timed evaluations of each variant, taken in turn, after one that warms up.

    Returns:
        A table a group and a row a variant: entries scored and projected; median and fastest time,
        median time of the processor; temporaries of the compiled program; and, as `x_…`, what is
        a multiple of the first variant of the group.

    Raises:
        RuntimeError: the variants of a group do not compute the same.
    """
    hidden, table, whole = make_problem(num_positions, hidden_size, vocab_size, dtype)
    some = _with_scored(whole, scored_frac)
    groups = {
        "loss_head, all scored": (_all_scored(chunk_size), whole),
        f"loss_head, {scored_frac:.0%} scored": (_some_scored(chunk_size), some),
    }
    programs = {
        name: _compiled(loss, hidden, table, problem)
        for variants, problem in groups.values()
        for name, loss in variants.items()
    }
    calls = {
        name: _call(programs[name], hidden, table, problem)
        for variants, problem in groups.values()
        for name in variants
    }
    for variants, _ in groups.values():
        check_same({name: calls[name]() for name in variants}, _TOLERANCES[dtype])
    times = material.in_turn(calls, rounds=rounds)
    ratios = {"x_seconds": "grad_s", "x_cpu": "cpu_s", "x_temporaries": "temporaries_mib"}
    return {
        title: material.compare(
            [_row(name, problem, times[name], programs[name]) for name in variants], ratios
        )
        for title, (variants, problem) in groups.items()
    }


def make_problem(
    num_positions: int, hidden_size: int, vocab_size: int, dtype: str
) -> tuple[jax.Array, jax.Array, Problem]:
    """Random hidden states and table, and a sampler so near that most ratios are not clipped."""
    rng = np.random.default_rng(0)
    shapes = {"hidden": (num_positions, hidden_size), "table": (vocab_size, hidden_size)}
    normal = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    hidden = jnp.asarray(normal["hidden"], dtype)
    table = jnp.asarray(normal["table"] * 2 / np.sqrt(hidden_size), dtype)  # logits of size 2
    targets = jnp.asarray(rng.integers(0, vocab_size, num_positions), jnp.int32)
    logprobs = jax.jit(_whole_logprobs)(hidden, table, targets)
    noise = jnp.asarray(rng.normal(0, 0.15, num_positions), jnp.float32)
    entries = Entries(
        sampler_logprobs=logprobs + noise,
        advantages=jnp.asarray(rng.normal(size=num_positions), jnp.float32),
        weights=jnp.ones(num_positions, jnp.float32),
    )
    return hidden, table, Problem(targets, entries, jnp.arange(num_positions, dtype=jnp.int32))


def _with_scored(problem: Problem, scored_frac: float) -> Problem:
    """The problem with that share of its positions scored, spread at random."""
    num_positions = problem.targets.size
    chosen = np.random.default_rng(1).permutation(num_positions)
    scored = np.sort(chosen[: max(int(scored_frac * num_positions), 1)]).astype(np.int32)
    weights = jnp.zeros(num_positions, jnp.float32).at[scored].set(1.0)
    entries = problem.entries._replace(weights=weights)
    return problem._replace(entries=entries, scored=jnp.asarray(scored))


def _all_scored(chunk_size: int) -> dict[str, Loss]:
    """Variants that project every position; the first is the reference of the others."""

    def whole_logits(hidden: jax.Array, table: jax.Array, problem: Problem) -> jax.Array:
        logprobs = _whole_logprobs(hidden, table, problem.targets)
        return _policy_loss(logprobs, None, problem.entries)

    def chunked(hidden: jax.Array, table: jax.Array, problem: Problem) -> jax.Array:
        @jax.checkpoint
        def of_chunk(chunk: tuple[jax.Array, jax.Array]) -> jax.Array:
            return _whole_logprobs(chunk[0], table, chunk[1])

        chunks = (
            hidden.reshape(-1, chunk_size, hidden.shape[1]),
            problem.targets.reshape(-1, chunk_size),
        )
        logprobs = jax.lax.map(of_chunk, chunks).reshape(-1)
        return _policy_loss(logprobs, None, problem.entries)

    def recomputing(hidden: jax.Array, table: jax.Array, problem: Problem) -> jax.Array:
        logprobs, entropy = codjax_kernels.token_logprobs(
            hidden, table, problem.targets, entropy_gradient=False, chunk_size=chunk_size
        )
        return _policy_loss(logprobs, entropy, problem.entries)

    return {
        "whole logits": whole_logits,
        "chunks, rematerialised": chunked,
        "codjax, recomputing": recomputing,
        "codjax, in forward": _in_forward(chunk_size),
    }


def _some_scored(chunk_size: int) -> dict[str, Loss]:
    """Variants for positions of which some are scored."""

    def compacted(hidden: jax.Array, table: jax.Array, problem: Problem) -> jax.Array:
        # Room for K entries, as a learner keeps it whose batches differ in what they score.
        num_positions, num_scored = problem.targets.size, problem.scored.size
        source = jnp.zeros(num_positions, jnp.int32).at[:num_scored].set(problem.scored)
        is_valid = jnp.arange(num_positions) < num_scored
        entries = jax.tree.map(lambda x: jnp.where(is_valid, x[source], 0), problem.entries)
        loss, _, _ = codjax_kernels.scored_loss(
            _policy_loss,
            hidden[None],
            table,
            source=source[None],
            target=problem.targets[source][None],
            operands=jax.tree.map(lambda x: x[None], entries),
            is_valid=is_valid[None],
            entropy_gradient=False,
            chunk_size=chunk_size,
        )
        return loss

    return {"masked": _in_forward(chunk_size), "compacted": compacted}


def _in_forward(chunk_size: int) -> Loss:
    """The loss of all positions with its gradient made in the forward pass."""

    def in_forward(hidden: jax.Array, table: jax.Array, problem: Problem) -> jax.Array:
        loss, _, _ = codjax_kernels.token_loss(
            _policy_loss,
            hidden,
            table,
            targets=problem.targets,
            operands=problem.entries,
            entropy_gradient=False,
            chunk_size=chunk_size,
        )
        return loss

    return in_forward


def _whole_logprobs(hidden: jax.Array, table: jax.Array, targets: jax.Array) -> jax.Array:
    """Log-probs from logits that are all there; nothing else is asked of them."""
    logits = jnp.einsum("kd,vd->kv", hidden, table, preferred_element_type=jnp.float32)
    of_targets = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    return of_targets - jax.nn.logsumexp(logits, axis=1)


def _policy_loss(logprobs: jax.Array, _: jax.Array | None, entries: Entries) -> jax.Array:
    """The published loss, summed: what it is divided by would change nothing here."""
    loss, _metrics = losses.rec_loss(
        logprobs, entries.sampler_logprobs, entries.advantages, entries.weights, num_scored=1
    )
    return loss


def _compiled(loss: Loss, hidden: jax.Array, table: jax.Array, problem: Problem) -> Any:
    """Loss and gradients of hidden states and table, as a program."""
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(hidden, table, problem).compile()


def _call(program: Any, *args: Any) -> Callable[[], Any]:
    return lambda: jax.block_until_ready(program(*args))


def check_same(results: Mapping[str, tuple[Any, Any]], tolerance: float) -> None:
    """Raise unless all found the same loss and gradients as the first, and a gradient at all."""
    (first, (first_loss, first_grads)), *others = results.items()
    for part, grad in zip(("hidden states", "table"), first_grads, strict=True):
        if not _norm(grad) > 0:
            raise RuntimeError(f"the gradient of the {part} of {first!r} is {_norm(grad)}.")
    for name, (loss, grads) in others:
        found = {"loss": float(abs(loss - first_loss) / abs(first_loss))} | {
            f"gradient of the {part}": _norm(grad - first_grad) / _norm(first_grad)
            for part, grad, first_grad in zip(
                ("hidden states", "table"), _wide(grads), _wide(first_grads), strict=True
            )
        }
        for what, difference in found.items():
            if not difference <= tolerance:
                raise RuntimeError(
                    f"the {what} of {name!r} and of {first!r} differ by {difference:.3g}, "
                    f"relative, more than {tolerance}: their times mean nothing."
                )


def _wide(grads: Any) -> Any:
    return jax.tree.map(lambda x: np.asarray(x, np.float32), grads)


def _norm(x: Any) -> float:
    return float(np.linalg.norm(np.asarray(x, np.float32)))


def _row(name: str, problem: Problem, timing: material.Timing, program: Any) -> material.Row:
    num_scored = int(problem.scored.size)
    return {
        "variant": name,
        "scored": num_scored,
        "projected": num_scored if name == "compacted" else int(problem.targets.size),
        "grad_s": timing.median_s,
        "fastest_s": timing.fastest_s,
        "cpu_s": timing.cpu_s,
        "temporaries_mib": program.memory_analysis().temp_size_in_bytes / _MIB,
    }
