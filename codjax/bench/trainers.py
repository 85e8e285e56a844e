"""The same GRPO step by codjax and by Tunix, served from a process of its own.

    python -P codjax/bench/trainers.py codjax|tunix FOLDER '{"rows_at_once": 8, "remat": "full"}'

`codjax bench tunix` starts this file once for each of its contenders, by path, so that Tunix may
live in an environment without codjax. FOLDER holds the job: `job.json` (`Job`) and `arrays.npz`
(`Material`). A line on stdin is a command, a line of JSON on stdout its answer:

    step       one optimizer step: its seconds, and those of the processor
    weights    the weights as they are now, into an .npz file: its path
    finish     metrics of the first step, memory, versions; and the process ends
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

_MIB = 2**20
_PAD, _END = 0, 1
NUM_SPECIAL = 2  # ids below it stand in no row: Tunix takes a pad for no token


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be trained, and how.

    Attributes:
        model: fields of `codjax.models.DecoderConfig` but `remat`; tied, float32.
        num_prompt: tokens of each row that were given; the others were sampled and are trained on.
        learning_rate: of AdamW.
        clip_norm: greatest norm of the whole gradient.
        clip_ratio: how far a ratio may be from 1 before its entry is clipped.
    """

    model: dict[str, Any]
    num_prompt: int
    learning_rate: float
    clip_norm: float
    clip_ratio: float

    def optimizer(self) -> optax.GradientTransformation:
        """The same chain on both sides."""
        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm), optax.adamw(self.learning_rate)
        )


class Way(NamedTuple):
    """How a side goes about it."""

    rows_at_once: int  # rows of a micro-batch; divides B
    remat: str  # "none" | "full": whether the backward pass computes the layers again


class Material(NamedTuple):
    """What a step works on; B rows of T tokens without padding, one sample each."""

    tokens: np.ndarray  # int32 [B T]
    advantages: np.ndarray  # float32 [B]
    sampler_logprobs: np.ndarray  # float32 [B T], read behind the prompt
    weights: dict[str, np.ndarray]  # by codjax's names, "layers.query"


class Trainer(NamedTuple):
    """A side, ready to run."""

    step: Callable[[], None]  # one optimizer step on all rows, to its end
    weights: Callable[[], dict[str, np.ndarray]]  # by codjax's names
    first_metrics: Callable[[], dict[str, float]]  # of the first step, under codjax's names
    temporaries_mib: Callable[[], float]  # see `codjax bench tunix`
    version: str


def codjax_trainer(job: Job, way: Way, material: Material) -> Trainer:
    """`Learner.update`, on a row a sample, without sharing."""
    from flax import traverse_util

    made, batch = _codjax_learner(job, way, material), _codjax_batch(job, material)
    params = traverse_util.unflatten_dict(material.weights, sep=".")
    state = [made.init_state(params)]  # of one element: an update consumes it
    metrics: list[dict[str, float]] = []

    def step() -> None:
        new, of_step = made.update(state.pop(), batch)
        state.append(jax.block_until_ready(new))
        metrics.append(of_step)

    def temporaries_mib() -> float:
        grads, sums = made._zeros(state[0].params)
        rows = made._microbatches(batch)[0]
        programs = (
            made._accumulate.lower(state[0].params, grads, sums, rows),
            made._apply.lower(state[0], grads, sums),
        )
        return max(map(_temporaries_mib, programs)) + _size_mib(grads)

    return Trainer(
        step=step,
        weights=lambda: jax.device_get(traverse_util.flatten_dict(state[0].params, sep=".")),
        first_metrics=lambda: metrics[0],
        temporaries_mib=temporaries_mib,
        version=importlib.metadata.version("codjax"),
    )


def _codjax_learner(job: Job, way: Way, material: Material) -> Any:
    from codjax import learner, losses, models, sharding

    # Importance weights under the one-sided clip have the gradient of PPO's clipped ratio.
    policy_loss = functools.partial(
        losses.rec_loss,
        clip_mode="one_side",
        weight_mode="importance",
        eps_low=job.clip_ratio,
        eps_high=job.clip_ratio,
    )
    objective = learner.Objective(
        policy_loss=policy_loss,
        is_per_token=losses.is_per_token("one_side", "importance"),
        temperature=1.0,
    )
    config = models.DecoderConfig(**job.model, remat=way.remat)
    return learner.Learner(
        models.Decoder(config, {name: jnp.asarray(x) for name, x in material.weights.items()}),
        optimizer=job.optimizer(),
        schedule=optax.constant_schedule(job.learning_rate),
        objective=objective,
        mesh=sharding.one_device(),
        rows_per_microbatch=way.rows_at_once,
    )


def _codjax_batch(job: Job, material: Material) -> Any:
    from codjax import batching, types

    num_rows, num_tokens = material.tokens.shape
    is_scored = np.arange(num_tokens) >= job.num_prompt
    sequences = [
        types.Sequence(
            material.tokens[b],
            is_scored,
            np.full(num_tokens, material.advantages[b]),
            material.sampler_logprobs[b],
        )
        for b in range(num_rows)
    ]
    return batching.build_batch(sequences, row_length=num_tokens, share_prefixes=False)


# Metric of codjax → name under which Tunix's loss reports the same.
_TUNIX_METRICS = {
    "loss/entropy": "entropy",
    "loss/clip_frac": "pg_clipfrac",
    "loss/ratio_mean": "is_ratio/mean",
    "loss/log_ratio_abs_mean": "log_ratio/abs_mean",
}


def tunix_trainer(job: Job, way: Way, material: Material) -> Trainer:
    """The `actor_trainer` of a Tunix cluster, with the loss that its `GRPOLearner` gives it."""
    from flax import nnx

    parts = _tunix_examples(job, way, material)
    model = _tunix_model(job, way)
    nnx.update(model, _tunix_state(nnx.state(model), material.weights))
    made = _tunix_learner(job, model, num_parts=len(parts))

    def step() -> None:
        made.train(parts)
        jax.block_until_ready(nnx.state(made.model))

    def first_metrics() -> dict[str, float]:
        made.close()  # it writes a step's metrics only when the next one has begun

        def first(name: str) -> float:
            return float(made.metrics_logger.get_metric_history("", name, "train")[0])

        found = {ours: first(theirs) for ours, theirs in _TUNIX_METRICS.items()}
        if len(parts) == 1:  # of several parts it is the mean of their norms
            found["optimizer/grad_norm"] = first("grad_norm")
        return found

    def temporaries_mib() -> float:
        # The program of `train`, which keeps it to itself.
        jitted = nnx.jit(made.create_train_step_fn(), donate_argnames=("optimizer",))
        program = jitted.lower(made.model, made.optimizer, parts[0])
        accumulator = _size_mib(nnx.state(made.model)) if len(parts) > 1 else 0.0
        return _temporaries_mib(program) + accumulator

    return Trainer(
        step=step,
        weights=lambda: _codjax_weights(nnx.state(made.model)),
        first_metrics=first_metrics,
        temporaries_mib=temporaries_mib,
        version=importlib.metadata.version("google-tunix"),
    )


def _tunix_learner(job: Job, model: Any, *, num_parts: int) -> Any:
    """Trainer as `RLCluster` makes it, set up as `GRPOLearner.__init__` does it."""
    import tunix
    from tunix.rl import function_registry
    from tunix.rl import trainer as rl_trainer

    made = rl_trainer.Trainer(
        model=model,
        optimizer=job.optimizer(),
        training_config=tunix.TrainingConfig(
            eval_every_n_steps=sys.maxsize,
            gradient_accumulation_steps=num_parts if num_parts > 1 else None,
        ),
        custom_checkpoint_metadata_fn=dict,
    )
    made.is_managed_externally = True  # as in a cluster: `train` does not close it
    config = tunix.GRPOConfig(loss_agg_mode="token-mean", beta=0.0, epsilon=job.clip_ratio)
    config.temperature = 1.0
    policy_loss = function_registry.get_policy_loss_fn(config.policy_loss_fn)
    made.with_loss_fn(
        lambda model, train_example, algo_config: policy_loss(
            model, train_example, algo_config=algo_config, pad_id=_PAD, eos_id=_END
        ),
        has_aux=True,
    )
    made.with_gen_model_input_fn(lambda x: {"train_example": x, "algo_config": config})
    made.with_rl_metrics_to_log(dict.fromkeys(_TUNIX_METRICS.values(), np.mean))
    return made


def _tunix_examples(job: Job, way: Way, material: Material) -> list[Any]:
    """The micro-batches of a step."""
    from tunix.rl.grpo import grpo_learner

    num_rows, begin = len(material.tokens), job.num_prompt
    return [
        grpo_learner.TrainExample(
            prompt_ids=jnp.asarray(material.tokens[rows, :begin]),
            prompt_mask=jnp.ones((way.rows_at_once, begin), bool),
            completion_ids=jnp.asarray(material.tokens[rows, begin:]),
            completion_mask=jnp.ones(material.tokens[rows, begin:].shape, bool),
            advantages=jnp.asarray(material.advantages[rows]),
            ref_per_token_logps=None,
            old_per_token_logps=jnp.asarray(material.sampler_logprobs[rows, begin:]),
        )
        for rows in np.split(np.arange(num_rows), num_rows // way.rows_at_once)
    ]


def _tunix_model(job: Job, way: Way) -> Any:
    from flax import nnx
    from tunix.models.qwen3 import model as qwen3

    sizes = job.model
    remat = {"none": qwen3.RematConfig.NONE, "full": qwen3.RematConfig.DECODER}[way.remat]
    config = qwen3.ModelConfig(
        vocab_size=sizes["vocab_size"],
        num_layers=sizes["num_layers"],
        embed_dim=sizes["hidden_size"],
        hidden_dim=sizes["intermediate_size"],
        num_heads=sizes["num_heads"],
        num_kv_heads=sizes["num_kv_heads"],
        head_dim=sizes["head_dim"],
        rope_theta=sizes["rope_theta"],
        norm_eps=sizes["norm_eps"],
        use_tied_embedding=True,
        remat_config=remat,
    )
    return qwen3.Qwen3(config, rngs=nnx.Rngs(0))


# Name of Tunix, under "layers.0" in the layers → name of codjax, where layers are stacked.
# Both keep [in heads head] and [in out], so that no array is turned.
_TUNIX_NAMES = {
    "embedder.input_embedding": "embedding",
    "final_norm.w": "final_norm",
    "input_layernorm.w": "layers.attention_norm",
    "attn.q_proj.w": "layers.query",
    "attn.k_proj.w": "layers.key",
    "attn.v_proj.w": "layers.value",
    "attn.q_norm.w": "layers.query_norm",
    "attn.k_norm.w": "layers.key_norm",
    "attn.o_proj.w": "layers.attention_output",
    "post_attention_layernorm.w": "layers.mlp_norm",
    "mlp.gate_proj.kernel": "layers.gate",
    "mlp.up_proj.kernel": "layers.up",
    "mlp.down_proj.kernel": "layers.down",
}


def _place(path: tuple[Any, ...]) -> tuple[str, int | None]:
    """Name in codjax, and the layer if it is in one, of a parameter of Tunix."""
    if path[0] == "layers":
        return _TUNIX_NAMES[".".join(path[2:])], int(path[1])
    return _TUNIX_NAMES[".".join(path)], None


def _tunix_state(state: Any, weights: dict[str, np.ndarray]) -> Any:
    """The state of Tunix's model with these weights in it."""
    from flax import nnx

    def filled(path: tuple[Any, ...], variable: Any) -> Any:
        name, layer = _place(path)
        value = weights[name] if layer is None else weights[name][layer]
        assert value.shape == variable[...].shape, path
        return variable.replace(jnp.asarray(value))

    flat = nnx.to_flat_state(state)
    return nnx.from_flat_state([(path, filled(path, variable)) for path, variable in flat])


def _codjax_weights(state: Any) -> dict[str, np.ndarray]:
    """The weights of Tunix's model by codjax's names, layers stacked."""
    from flax import nnx

    found: dict[str, dict[int | None, np.ndarray]] = {}
    for path, variable in nnx.to_flat_state(state):
        name, layer = _place(path)
        found.setdefault(name, {})[layer] = np.asarray(variable[...])
    return {
        name: values[None] if None in values else np.stack([values[i] for i in range(len(values))])
        for name, values in found.items()
    }


def _size_mib(tree: Any) -> float:
    return sum(x.nbytes for x in jax.tree.leaves(tree)) / _MIB


def _temporaries_mib(lowered: Any) -> float:
    """What a program takes beside its arguments and results."""
    return lowered.compile().memory_analysis().temp_size_in_bytes / _MIB


SIDES: dict[str, Callable[[Job, Way, Material], Trainer]] = {
    "codjax": codjax_trainer,
    "tunix": tunix_trainer,
}


def write_job(folder: pathlib.Path, job: Job, material: Material) -> None:
    """Put a job where `read_job` finds it."""
    (folder / "job.json").write_text(json.dumps(dataclasses.asdict(job)), encoding="utf-8")
    arrays: dict[str, Any] = material._asdict()
    weights = arrays.pop("weights")
    arrays |= {f"weights/{name}": value for name, value in weights.items()}
    np.savez(folder / "arrays.npz", **arrays)


def read_job(folder: pathlib.Path) -> tuple[Job, Material]:
    """What `write_job` has put there."""
    job = Job(**json.loads((folder / "job.json").read_text(encoding="utf-8")))
    with np.load(folder / "arrays.npz") as file:
        arrays = dict(file)
    prefix = "weights/"
    weights = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    plain = {name: arrays[name] for name in Material._fields if name != "weights"}
    return job, Material(**plain, weights=weights)


def serve(trainer: Trainer, folder: pathlib.Path) -> None:
    """Answer the commands on stdin; what others print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        answer: dict[str, Any]
        match line.strip():
            case "step":
                start, cpu_start = time.perf_counter(), time.process_time()
                trainer.step()
                wall, cpu = time.perf_counter() - start, time.process_time() - cpu_start
                answer = {"wall_s": wall, "cpu_s": cpu}
            case "weights":
                path = folder / f"weights-{os.getpid()}.npz"
                weights: dict[str, Any] = trainer.weights()
                np.savez(path, **weights)
                answer = {"path": str(path)}
            case "finish":
                peak = _process_peak_mib()  # before the programs are compiled once more
                answer = {
                    "metrics": trainer.first_metrics(),
                    "process_mib": peak,
                    "temporaries_mib": trainer.temporaries_mib(),
                    "version": trainer.version,
                    "jax": jax.__version__,
                }
            case other:
                raise ValueError(f"{other!r} is no command; they are step, weights and finish.")
        answers.write(json.dumps(answer) + "\n")


def _process_peak_mib() -> float | None:
    """Peak resident memory of this process so far; None where Linux does not tell it."""
    status = pathlib.Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(x.split()[1]) / 1024 for x in lines if x.startswith("VmHWM")), None)


if __name__ == "__main__":
    name, job_folder, way_json = sys.argv[1:]
    served_job, served_material = read_job(pathlib.Path(job_folder))
    serve(
        SIDES[name](served_job, Way(**json.loads(way_json)), served_material),
        pathlib.Path(job_folder),
    )
