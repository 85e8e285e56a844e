"""`codjax bench learner`: one optimizer step, against the trainers that one would write first.

All four variants make the same step on the same samples of one group, with the same model, and
must agree on loss and gradient norm, or there is no table. They differ in two ways:

* *forest* stores prefixes that samples share once; *samples* stores every model call with its
  whole prompt, packed into rows without a gap.
* *scored* projects the scored entries only onto the vocabulary, a chunk at a time; *full logits*
  makes the logits of all tokens of a row, takes their log-softmax, and picks from it.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import multiprocessing
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from codjax import batching, build, learner, losses, models, optim, scoring, sharding, train, types
from codjax.bench import material
from codjax.config import default_config

_MIB = 2**20
_ROW_MULTIPLE = 256  # rows of single samples are as long as the longest of them, rounded up
_TOLERANCE = 1e-4  # of loss and gradient norm, relative; float32 sums in another order


class FullLogitsLearner(learner.Learner):
    """The learner with the loss that one would write first.

    It is not asked for the entropy, which the learner gets in the same pass.
    """

    def _forward(
        self, params: learner.Params, batch: types.TokenBatch
    ) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(self._graphdef, params)
        hidden = model(
            batch.tokens, batch.token_positions, batch.subtree_end, constrain=self._constrain
        )
        logits = jnp.einsum("btd,vd->btv", hidden, model.unembedding).astype(jnp.float32)
        logprobs = jax.nn.log_softmax(logits / self._objective.temperature, axis=-1)
        rows = jnp.arange(hidden.shape[0])[:, None]
        of_entries = logprobs[rows, batch.source, batch.target]
        return of_entries, jnp.zeros_like(of_entries)


class Variant(NamedTuple):
    """One way to make the step."""

    make: type[learner.Learner]
    shares_prefixes: bool


VARIANTS = {  # the first is this learner, which the others are compared with
    "forest, scored (codjax)": Variant(learner.Learner, True),
    "forest, full logits": Variant(FullLogitsLearner, True),
    "samples, scored": Variant(learner.Learner, False),
    "samples, full logits": Variant(FullLogitsLearner, False),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Contender:
    """A variant with its rows, ready to run; owns the state of its training."""

    trainer: learner.Learner
    batch: types.TokenBatch
    report: batching.BatchReport
    state: list[learner.TrainState]  # of one element: an update consumes it

    def update(self) -> dict[str, float]:
        """One step, and its metrics."""
        state, metrics = self.trainer.update(self.state.pop(), self.batch)
        self.state.append(jax.block_until_ready(state))
        return metrics


def bench(
    *,
    pack_size: int = 2,
    group_size: int = 4,
    max_turns: int = 5,
    num_thoughts: int = 4,
    vocab_size: int = 32768,
    num_layers: int = 2,
    row_length: int = 3072,
    rounds: int = 3,
    measures_process: bool = True,
) -> list[material.Row]:
    """Seconds and memory of an update, for every variant.

    Args:
        pack_size: S.
        group_size: G, runs of the one pack.
        max_turns: of a solve episode; published are 8, for a machine with more time.
        num_thoughts: most sentences of reasoning in a response.
        vocab_size: V, at least that of the tokenizer.
        num_layers: L.
        row_length: T of the forests; single samples get rows as long as the longest of them.
        rounds: timed updates of each variant, taken in turn, after one that compiles.
        measures_process: also run each variant in a process of its own, for its peak memory.

    Returns:
        A row a variant: rows and tokens of its batch; the tokens that were projected onto the
        vocabulary, padding included; an update's median and fastest time and its median time of
        the processor; memory that the compiled program of one micro-batch (one row) holds; peak
        memory of the process; and, as `x_…`, what is a multiple of the first variant's.

    Raises:
        RuntimeError: the variants do not compute the same.
    """
    sequences = samples(
        pack_size=pack_size, group_size=group_size, max_turns=max_turns, num_thoughts=num_thoughts
    )
    sizes = material.model_config(vocab_size=vocab_size, num_layers=num_layers)
    peaks: dict[str, float | None] = dict.fromkeys(VARIANTS)
    if measures_process and jax.default_backend() == "cpu":
        for name, variant in VARIANTS.items():
            peaks[name] = _in_own_process(variant, sizes, sequences, row_length)
    contenders = {
        name: _contender(variant, sizes, sequences, row_length)
        for name, variant in VARIANTS.items()
    }
    _check_same({name: one.update() for name, one in contenders.items()})
    times = material.in_turn({name: one.update for name, one in contenders.items()}, rounds=rounds)
    rows = [
        _row(name, one, times[name], process_mib=peaks[name]) for name, one in contenders.items()
    ]
    return material.compare(
        rows, {"x_seconds": "update_s", "x_cpu": "cpu_s", "x_program": "program_mib"}
    )


def samples(**sizes: int) -> list[types.Sequence]:
    """The train samples of `material.lake_group`, one a model call, with their credit."""
    group = material.lake_group(material.word_chat(), **sizes)
    scored, _ = scoring.score_trajectories([group], scoring.make_rules(default_config().credit))
    return train.training_sequences(scored)


def _contender(
    variant: Variant, sizes: dict[str, Any], sequences: Sequence[types.Sequence], row_length: int
) -> _Contender:
    if not variant.shares_prefixes:
        longest = max(len(sequence.tokens) for sequence in sequences)
        row_length = -(-longest // _ROW_MULTIPLE) * _ROW_MULTIPLE
    batch, report = batching.batch_sequences(
        sequences, row_length=row_length, share_prefixes=variant.shares_prefixes
    )
    optimizer = default_config().optimizer
    # A script has no log-probs to compare with. Without a clip the loss is the published one at
    # ratio 1, where fresh samples are.
    policy_loss = functools.partial(losses.rec_loss, clip_mode="none", weight_mode="none")
    model = models.init(models.DecoderConfig(**sizes), seed=0)
    made = variant.make(
        model,
        optimizer=optim.make_optimizer(optimizer, num_steps=1),
        schedule=optim.make_schedule(optimizer, num_steps=1),
        objective=learner.Objective(
            policy_loss=policy_loss,
            # Whole logits are made in `_forward`, which automatic differentiation goes through.
            is_per_token=variant.make is learner.Learner,
            temperature=1.0,
        ),
        mesh=sharding.one_device(),
        rows_per_microbatch=1,
    )
    return _Contender(
        trainer=made, batch=batch, report=report, state=[made.init_state(build.params_of(model))]
    )


def _check_same(metrics: dict[str, dict[str, float]]) -> None:
    """Raise unless all variants made the same first step, and made one at all."""
    (first_name, first), *others = metrics.items()
    for key in ("loss/total", "optimizer/grad_norm"):
        if first[key] == 0:
            raise RuntimeError(f"{key} is 0 in the variant {first_name!r}: nothing was trained.")
        for name, other in others:
            if not abs(other[key] - first[key]) <= _TOLERANCE * abs(first[key]):
                raise RuntimeError(
                    f"{key} is {other[key]!r} in the variant {name!r} and {first[key]!r} in "
                    f"{first_name!r}: they are not the same step, so their times mean nothing."
                )


def _program_mib(contender: _Contender) -> float:
    """What XLA's program of one micro-batch holds: parameters, gradients, rows, and all between."""
    made, params = contender.trainer, contender.state[0].params
    grads, sums = made._zeros(params)
    rows = made._microbatches(contender.batch)[0]
    stats = made._accumulate.lower(params, grads, sums, rows).compile().memory_analysis()
    assert stats is not None  # XLA knows it on CPU, GPU and TPU
    return (stats.temp_size_in_bytes + stats.argument_size_in_bytes) / _MIB


def _in_own_process(*args: Any) -> float | None:
    """`_process_peak_mib(*args)`, in a fresh process."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_process_peak_mib, *args).result()


def _process_peak_mib(
    variant: Variant, sizes: dict[str, Any], sequences: Sequence[types.Sequence], row_length: int
) -> float | None:
    """Peak resident memory of this process after a step; None where Linux does not tell it."""
    whole = _contender(variant, sizes, sequences, row_length)
    # One micro-batch is enough: the others take its place.
    batch = jax.tree.map(lambda x: x[:1] if np.ndim(x) else x, whole.batch)
    dataclasses.replace(whole, batch=batch).update()
    status = pathlib.Path("/proc/self/status")
    # Not getrusage: what it says includes the parent's memory from before the exec.
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(x.split()[1]) / 1024 for x in lines if x.startswith("VmHWM")), None)


def _row(
    name: str, contender: _Contender, timing: material.Timing, *, process_mib: float | None
) -> material.Row:
    report, batch = contender.report, contender.batch
    is_full = isinstance(contender.trainer, FullLogitsLearner)
    return {
        "variant": name,
        "samples": report.num_sequences,
        "rows": report.num_rows,
        "row_tokens": report.row_length,
        "stored_tokens": report.stored_tokens,
        "scored_tokens": report.scored_tokens,
        "projected_tokens": int(np.size(batch.tokens if is_full else batch.source)),
        "update_s": timing.median_s,
        "fastest_s": timing.fastest_s,
        "cpu_s": timing.cpu_s,
        "program_mib": _program_mib(contender),
        "process_mib": process_mib,
    }
