"""The learner: a `TokenBatch` in, new weights out.

    learner = Learner(model, optimizer=…, objective=…, mesh=…, rows_per_microbatch=…)
    state = learner.init_state(params)
    state, metrics = learner.update(state, batch)

An update runs over micro-batches of a fixed shape. Each adds its gradient to an accumulator
(one compiled program), and one more program applies the sum. The loss of every micro-batch is
already divided by the normaliser of the whole train batch, so that gradients and metrics add up,
whatever the number of micro-batches and devices. A step with more rows costs more micro-batches,
never a new compilation and never a dropped row.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import codjax_kernels
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from codjax import logprobs as logprobs_lib
from codjax import losses, masked, optim, sharding, types
from codjax.models import Decoder

Params = Any  # nested dict of arrays, as nnx.to_pure_dict gives it
Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """What an optimizer step changes."""

    params: Params
    opt_state: optax.OptState
    step: types.Leaf  # int32 [], optimizer steps so far


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """What is minimised; every term is a sum over entries divided by the batch's normaliser.

    Attributes:
        policy_loss: `losses.rec_loss` with its modes bound.
        is_per_token: whether `policy_loss` is a sum of terms that look at one entry each
            (`losses.is_per_token`). It decides how gradients are made, in `Learner._loss`.
        temperature: of the policy, as in sampling.
        kl_coef: weight of the KL to the reference model; 0 needs no reference.
        kl_estimator: "k1" | "k2" | "k3".
        entropy_coef: weight of the entropy, which is maximised.
    """

    policy_loss: Callable[..., tuple[jax.Array, Mapping[str, jax.Array]]]
    is_per_token: bool
    temperature: float
    kl_coef: float = 0.0
    kl_estimator: str = "k2"
    entropy_coef: float = 0.0


def imitation_objective() -> Objective:
    """Mean negative log-likelihood of the scored tokens: the policy loss at advantage 1."""
    policy_loss = functools.partial(losses.rec_loss, clip_mode="none", weight_mode="none")
    return Objective(policy_loss=policy_loss, is_per_token=True, temperature=1.0)


class Learner:
    """Owns the compiled programs of one model, optimizer and objective on one mesh.

    Holds no weights: they are in the `TrainState` that goes in and comes out. `update` consumes
    the state it is given; keep the new one.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        optimizer: optax.GradientTransformation,
        schedule: optax.Schedule,
        objective: Objective,
        mesh: jax.sharding.Mesh,
        rows_per_microbatch: int,
        implementation: str | None = None,
    ):
        """Lay out the shardings; programs compile at their first call.

        Args:
            model: its structure and shapes are read; it may be abstract (`nnx.eval_shape`).
            optimizer: of the whole tree of parameters.
            schedule: its learning rate, for the metric.
            objective: what to minimise.
            mesh: of `sharding.make_mesh`.
            rows_per_microbatch: rows on the devices at once.
            implementation: of the kernels; None for the choice of the mesh's platform.
        """
        self._graphdef, variables = nnx.split(model)
        self._shapes = jax.eval_shape(lambda: nnx.to_pure_dict(variables))
        self._optimizer, self._schedule, self._objective = optimizer, schedule, objective
        self._rows = rows_per_microbatch
        self._mesh = mesh
        self._replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        self._batch_shardings = sharding.batch_shardings(mesh)
        self._constrain = sharding.constrain(mesh)
        self._run_experts = sharding.run_experts(mesh)
        kernel = implementation or codjax_kernels.implementation_of(mesh.devices.flat[0].platform)
        layout = sharding.layout(mesh)
        self._projection = logprobs_lib.Projection(implementation=kernel, layout=layout)
        self._attend = functools.partial(
            codjax_kernels.forest_attention, implementation=kernel, layout=layout
        )
        self._lookup = functools.partial(codjax_kernels.embedding_lookup, layout=layout)
        self.param_shardings = sharding.param_shardings(model, mesh)
        self.state_shardings = self._state_shardings()
        options = sharding.compiler_options(mesh)
        self._accumulate = jax.jit(
            self._accumulate_fn, donate_argnums=(1,), compiler_options=options
        )
        self._apply = jax.jit(
            self._apply_fn,
            donate_argnums=(0,),
            out_shardings=(self.state_shardings, self._replicated),
        )
        # Everywhere, since the host reads it, whichever rows its devices have.
        self._score = jax.jit(
            self._score_fn, out_shardings=self._replicated, compiler_options=options
        )
        self._zeros = jax.jit(self._zeros_fn, out_shardings=(self.param_shardings, None))

    def init_state(self, params: Params) -> TrainState:
        """A state at step 0 with a copy of these parameters, laid out on the mesh."""
        # A copy, since the first update gives the buffers of the state away.
        copy = jax.jit(
            lambda p: jax.tree.map(jnp.copy, p), out_shardings=self.state_shardings.params
        )
        params = copy(params)
        opt_state = jax.jit(self._init_fn, out_shardings=self.state_shardings.opt_state)(params)
        return TrainState(params, opt_state, sharding.put(np.int32(0), self._replicated))

    def abstract_state(self) -> TrainState:
        """Shapes and shardings of the state, to restore a checkpoint to."""
        shapes = TrainState(
            self._shapes,
            jax.eval_shape(self._init_fn, self._shapes),
            jax.ShapeDtypeStruct((), jnp.int32),
        )
        return _placed(shapes, self.state_shardings)

    def abstract_batch(self, *, row_length: int, scored_per_row: int) -> types.TokenBatch:
        """Shapes and shardings of a micro-batch.

        Args:
            row_length: T.
            scored_per_row: K.
        """
        tokens = jax.ShapeDtypeStruct((self._rows, row_length), jnp.int32)
        ids = jax.ShapeDtypeStruct((self._rows, scored_per_row), jnp.int32)
        values = jax.ShapeDtypeStruct((self._rows, scored_per_row), jnp.float32)
        shapes = types.TokenBatch(
            tokens=tokens,
            token_positions=tokens,
            subtree_end=tokens,
            source=ids,
            target=ids,
            sampler_logprobs=values,
            ref_logprobs=values,
            advantages=values,
            weights=values,
            sample_ids=ids,
            normaliser=jax.ShapeDtypeStruct((), jnp.float32),
            num_scored=jax.ShapeDtypeStruct((), jnp.int32),
        )
        return _placed(shapes, self._batch_shardings)

    def trace(self, *, row_length: int, scored_per_row: int) -> dict[str, jax.stages.Traced]:
        """The programs of an update, traced from shapes: "accumulate" and "apply".

        They lower and compile as `update` would have them, for devices that need not be there.

        Args:
            row_length: T.
            scored_per_row: K.
        """
        state = self.abstract_state()
        grads, sums = jax.eval_shape(self._zeros_fn, state.params)
        grads = _placed(grads, self.param_shardings)
        sums = _placed(sums, jax.tree.map(lambda _: self._replicated, sums))
        batch = self.abstract_batch(row_length=row_length, scored_per_row=scored_per_row)
        # Pallas kernels ask for the chip while they are traced.
        with jax.sharding.use_abstract_mesh(self._mesh.abstract_mesh):
            return {
                "accumulate": self._accumulate.trace(state.params, grads, sums, batch),
                "apply": self._apply.trace(state, grads, sums),
            }

    def update(
        self, state: TrainState, batch: types.TokenBatch
    ) -> tuple[TrainState, dict[str, float]]:
        """One optimizer step on the whole batch.

        Args:
            state: consumed.
            batch: `[B T]` with B a multiple of `rows_per_microbatch`, on the host.

        Returns:
            The new state and the metrics of the step (docs/metrics.md), as Python numbers.
        """
        grads, sums = self._zeros(state.params)
        for rows in self._microbatches(batch):
            grads, sums = self._accumulate(state.params, grads, sums, rows)
        state, metrics = self._apply(state, grads, sums)
        return state, {name: float(value) for name, value in jax.device_get(metrics).items()}

    def loss_and_grads(
        self, params: Params, batch: types.TokenBatch
    ) -> tuple[float, Params, dict[str, float]]:
        """Loss, gradient and metrics of the whole batch, without a step."""
        grads, sums = self._zeros(params)
        for rows in self._microbatches(batch):
            grads, sums = self._accumulate(params, grads, sums, rows)
        metrics = {name: float(value) for name, value in jax.device_get(sums).items()}
        return metrics["loss/total"], grads, metrics

    def score(self, params: Params, batch: types.TokenBatch) -> np.ndarray:
        """Log-probability of every scored entry under these parameters: float32 `[B K]`."""
        parts = [np.asarray(self._score(params, rows)) for rows in self._microbatches(batch)]
        return np.concatenate(parts)

    def num_compilations(self) -> int:
        """Programs compiled so far; constant after the first update."""
        jitted = (self._accumulate, self._apply, self._score, self._zeros)
        return sum(function._cache_size() for function in jitted)  # type: ignore[attr-defined]

    def _microbatches(self, batch: types.TokenBatch) -> list[types.TokenBatch]:
        num_rows = batch.tokens.shape[0]
        if num_rows % self._rows:
            raise ValueError(
                f"a batch of {num_rows} rows cannot be cut into micro-batches of "
                f"batching.rows_per_microbatch = {self._rows}; build it with rows_multiple."
            )
        parts = []
        for begin in range(0, num_rows, self._rows):
            rows = jax.tree.map(
                lambda x, begin=begin: x[begin : begin + self._rows] if np.ndim(x) else x, batch
            )
            parts.append(sharding.put(rows, self._batch_shardings))
        return parts

    def _state_shardings(self) -> TrainState:
        opt_state = optim.moment_shardings(self._optimizer, self._shapes, self.param_shardings)
        return TrainState(self.param_shardings, opt_state, self._replicated)

    def _init_fn(self, params: Params) -> optax.OptState:
        """Moments in float32, as the gradients that will be averaged in them."""
        return self._optimizer.init(jax.tree.map(lambda p: p.astype(jnp.float32), params))

    def _hidden(self, params: Params, batch: types.TokenBatch) -> tuple[jax.Array, jax.Array]:
        """Final hidden states `[B T D]` and the output table `[V D]`."""
        model = nnx.merge(self._graphdef, params)
        hidden = model(
            batch.tokens,
            batch.token_positions,
            batch.subtree_end,
            constrain=self._constrain,
            attend=self._attend,
            lookup=self._lookup,
            run_experts=self._run_experts,
        )
        return hidden, model.unembedding

    def _forward(self, params: Params, batch: types.TokenBatch) -> tuple[jax.Array, jax.Array]:
        """Log-probability and entropy of every scored entry: `[B K]`, `[B K]`."""
        hidden, table = self._hidden(params, batch)
        return logprobs_lib.scored_logprobs(
            hidden,
            table,
            batch.source,
            batch.target,
            temperature=self._objective.temperature,
            is_valid=batch.weights != 0,
            entropy_gradient=self._objective.entropy_coef != 0,
            projection=self._projection,
        )

    def _loss(self, params: Params, batch: types.TokenBatch) -> tuple[jax.Array, Metrics]:
        """Share of this micro-batch in the loss and in the metrics of the whole batch.

        Here the objective decides how its gradient is made: in the forward pass if it is a sum
        over tokens and the kernels can do so, else by automatic differentiation.
        """
        entries = logprobs_lib.entries_of(batch)
        terms = functools.partial(objective_terms, self._objective)
        in_forward = codjax_kernels.has_gradient_in_forward(self._projection.implementation)
        if not (self._objective.is_per_token and in_forward):
            logprobs, entropy = self._forward(params, batch)
            return terms(logprobs.reshape(-1), entropy.reshape(-1), entries)
        hidden, table = self._hidden(params, batch)
        total, logprobs, entropy = logprobs_lib.scored_loss(
            lambda *entry_values: terms(*entry_values)[0],
            hidden,
            table,
            batch,
            temperature=self._objective.temperature,
            entropy_gradient=self._objective.entropy_coef != 0,
            projection=self._projection,
        )
        return total, terms(logprobs.reshape(-1), entropy.reshape(-1), entries)[1]

    def _accumulate_fn(
        self, params: Params, grads: Params, sums: Metrics, batch: types.TokenBatch
    ) -> tuple[Params, Metrics]:
        (_, metrics), new = jax.value_and_grad(self._loss, has_aux=True)(params, batch)
        grads = jax.tree.map(lambda a, b: a + b.astype(a.dtype), grads, new)
        grads = jax.lax.with_sharding_constraint(grads, self.param_shardings)
        return grads, losses.merge_metrics(metrics, sums)

    def _apply_fn(
        self, state: TrainState, grads: Params, sums: Metrics
    ) -> tuple[TrainState, Metrics]:
        updates, opt_state = self._optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = sums | {
            "optimizer/grad_norm": optax.tree.norm(grads),
            "optimizer/update_norm": optax.tree.norm(updates),
            "optimizer/learning_rate": jnp.asarray(self._schedule(state.step), jnp.float32),
        }
        return TrainState(params, opt_state, state.step + 1), metrics

    def _score_fn(self, params: Params, batch: types.TokenBatch) -> jax.Array:
        return self._forward(params, batch)[0]

    def _zeros_fn(self, params: Params) -> tuple[Params, Metrics]:
        """Accumulators: a gradient of zeros in float32 and every metric at 0."""
        one = jnp.zeros(1)
        entries = logprobs_lib.Entries(
            one, one, one, one, jnp.zeros(1, jnp.int32), jnp.float32(1), jnp.int32(1)
        )
        names = jax.eval_shape(
            functools.partial(objective_terms, self._objective), one, one, entries
        )[1]
        grads = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
        return grads, {name: jnp.float32(0) for name in names}


def _placed(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def objective_terms(
    objective: Objective,
    logprobs: jax.Array,
    entropy: jax.Array,
    entries: logprobs_lib.Entries,
) -> tuple[jax.Array, Metrics]:
    """Loss and metrics of some entries of a batch.

    Args:
        objective: the terms and their weights.
        logprobs: of the policy being trained, `[N]`.
        entropy: of its distribution at every entry, `[N]`.
        entries: what belongs to them; their divisors are those of the whole train batch.

    Returns:
        The entries' share of the loss, and metrics for `losses.merge_metrics`.
    """
    weights = entries.weights
    policy, metrics = objective.policy_loss(
        logprobs,
        entries.sampler_logprobs,
        entries.advantages,
        weights,
        sample_ids=None if objective.is_per_token else entries.sample_ids,
        num_scored=entries.normaliser,
        num_entries=entries.num_scored,
    )
    share = (weights != 0) / jnp.maximum(entries.num_scored, 1).astype(jnp.float32)
    terms = {"loss/policy": policy, "loss/entropy": masked.weighted_sum(entropy, share)}
    total = policy
    if objective.entropy_coef:
        weighted = masked.weighted_sum(entropy, weights) / entries.normaliser
        total = total - objective.entropy_coef * weighted
    if objective.kl_coef:
        kl = losses.kl_loss(
            logprobs,
            entries.ref_logprobs,
            weights,
            estimator=objective.kl_estimator,
            num_scored=entries.normaliser,
        )
        total = total + objective.kl_coef * kl
        terms["loss/kl_policy_to_ref"] = kl
    terms["loss/total"] = total
    return total, terms | dict(metrics)
