"""From a validated config to the parts of a run; what training and evaluation have in common.

Nothing here decides anything: each function reads one section of the config and makes one part.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import codjax_kernels
import jax
from flax import nnx
from ml_collections import ConfigDict

from codjax import chat as chats
from codjax import checks, envs, learner, losses, models, optim, sharding, types
from codjax.rollout import decoding, engine, runner


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskSet:
    """A task set of the config, loaded.

    Attributes:
        name: its key in `config.tasksets`.
        taskset_id: its position among the sorted names there, part of the pack seeds.
        env: name of its environment.
        settings: of the environment.
        records: its rows.
        show_reward: whether the hint writer sees the reward.
    """

    name: str
    taskset_id: int
    env: str
    settings: Mapping[str, Any]
    records: Sequence[envs.Record]
    show_reward: bool

    def rules(self) -> runner.TasksetRules:
        """What running one of its tasks takes."""
        return runner.TasksetRules(
            env_factory=lambda: envs.make(self.env, **self.settings),
            show_reward=self.show_reward,
        )

    def tasks(self, num_tasks: int) -> list[types.Task]:
        """The first rows, in order; the last row is followed by the first again."""
        return [
            types.Task(
                taskset=self.name,
                taskset_id=self.taskset_id,
                index=index % len(self.records),
                record=self.records[index % len(self.records)],
            )
            for index in range(num_tasks)
        ]


def load_tasksets(config: ConfigDict, names: Sequence[str]) -> dict[str, TaskSet]:
    """The named task sets, in the order given."""
    ids = {name: index for index, name in enumerate(sorted(config.tasksets))}
    return {
        name: TaskSet(
            name=name,
            taskset_id=ids[name],
            env=config.tasksets[name].env,
            settings=config.tasksets[name].settings.to_dict(),
            records=envs.load_records(
                config.tasksets[name].env,
                split=config.tasksets[name].split,
                num_records=config.tasksets[name].num_records,
                data=config.tasksets[name].data.to_dict(),
            ),
            show_reward=config.tasksets[name].show_reward,
        )
        for name in names
    }


def make_model(config: ConfigDict, chat: chats.Chat) -> models.Decoder:
    """The structure of the model, without weights: shapes stand in their place.

    Raises:
        ConfigError: `model.source` cannot be read, or the tokenizer has ids that the model has no
            embedding for.
    """
    if config.model.source == "init":
        sizes = config.model.to_dict()
        del sizes["source"]
        sizes["vocab_size"] = sizes["vocab_size"] or chat.vocab_size
        shape = models.DecoderConfig(**sizes)
    else:
        with checks.reading("model.source"):
            shape = models.read_config(_folder(config), **_numerics(config))
    checks.require(
        chat.vocab_size <= shape.vocab_size,
        "tokenizer.source",
        f"have at most {shape.vocab_size} tokens",
        "the model has no embeddings for more",
        chat.vocab_size,
    )
    return nnx.eval_shape(lambda: models.init(shape, seed=0))


def first_params(
    config: ConfigDict, model: models.Decoder, mesh: jax.sharding.Mesh
) -> learner.Params:
    """The weights that a run begins with, on the mesh: random, or those of the folder.

    Raises:
        ConfigError: the folder cannot be read, or lacks weights.
    """
    if config.model.source != "init":
        with checks.reading("model.source"):
            return params_of(
                models.from_pretrained(
                    _folder(config), **_numerics(config), place=sharding.place(mesh)
                )
            )
    return jax.jit(
        lambda: params_of(models.init(model.config, seed=config.seed)),
        out_shardings=sharding.param_shardings(model, mesh),
    )()


def abstract_params(model: models.Decoder, mesh: jax.sharding.Mesh) -> learner.Params:
    """Shapes and shardings of the parameters, to restore them to."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        params_of(model),
        sharding.param_shardings(model, mesh),
    )


def params_of(model: models.Decoder) -> learner.Params:
    """The parameters of a model, as `TrainState` and the sampler hold them."""
    return nnx.to_pure_dict(nnx.state(model))


def make_mesh(config: ConfigDict, model: models.Decoder) -> jax.sharding.Mesh:
    """The mesh of `config.mesh` over the devices of this run.

    Raises:
        ConfigError: the devices, the rows or the sizes of the model do not divide as it says.
    """
    try:
        mesh = sharding.make_mesh(**config.mesh.to_dict())
    except ValueError as error:
        raise checks.ConfigError(f"mesh: {error}") from error
    check_mesh(config, model, mesh)
    return mesh


def check_mesh(config: ConfigDict, model: models.Decoder, mesh: jax.sharding.Mesh) -> None:
    """Raise unless everything that the mesh cuts divides.

    Raises:
        ConfigError: the rows or the sizes of the model do not divide, or the kernels that the
            config names do not run on the mesh's devices.
    """
    try:
        sharding.check_divisible(model.config.axis_sizes, mesh.shape)
    except ValueError as error:
        raise checks.ConfigError(f"mesh: {error}") from error
    checks.require(
        model.config.num_experts > 0 or mesh.shape["expert"] == 1,
        "mesh.expert",
        "be 1",
        "the model has no experts to cut; give the devices to mesh.fsdp",
        mesh.shape["expert"],
    )
    num_parts = math.prod(mesh.shape[axis] for axis in sharding.RULES["batch"])
    checks.require(
        config.batching.rows_per_microbatch % num_parts == 0,
        "batching.rows_per_microbatch",
        f"be a multiple of {num_parts}",
        "the rows are split over mesh.data times mesh.fsdp times mesh.expert of the devices found",
        config.batching.rows_per_microbatch,
    )
    checks.require(
        config.batching.row_length % mesh.shape["context"] == 0,
        "batching.row_length",
        f"be a multiple of {mesh.shape['context']}",
        "the tokens of a row are split over mesh.context of the devices found",
        config.batching.row_length,
    )
    _check_kernels(config, model.config, mesh.devices.flat[0].platform)


def _check_kernels(config: ConfigDict, sizes: models.DecoderConfig, platform: str) -> None:
    """Raise if the chosen kernels do not run on these devices, or cannot run the model."""
    name = config.kernels.implementation
    runs_on = {"pallas_tpu": "tpu", "pallas_gpu": "gpu"}
    checks.require(
        runs_on.get(name, platform) == platform,
        "kernels.implementation",
        f"run on the devices found, which are {platform}s",
        'leave it out for the choice of the platform, or take "xla", which runs everywhere',
        name,
    )
    chosen = name or codjax_kernels.implementation_of(platform)
    reason = codjax_kernels.why_not(
        chosen, head_dim=sizes.head_dim, width=sizes.hidden_size, dtype=sizes.dtype
    )
    checks.require(
        reason is None,
        "kernels.implementation",
        'be "xla" for this model',
        f"{chosen!r} cannot run it: {reason}",
        name,
    )


def make_objective(config: ConfigDict) -> learner.Objective:
    """The objective of `config.loss`, at the rollout's temperature."""
    loss = config.loss
    policy_loss = functools.partial(
        losses.rec_loss,
        clip_mode=loss.clip_mode,
        weight_mode=loss.weight_mode,
        eps_low=loss.eps_low,
        eps_high=loss.eps_high,
        eps_low_outer=loss.eps_low_outer,
        eps_high_outer=loss.eps_high_outer,
        advantage_temperature=loss.advantage_temperature,
        regulariser=loss.regulariser,
        regulariser_coef=loss.regulariser_coef,
    )
    return learner.Objective(
        policy_loss=policy_loss,
        is_per_token=losses.is_per_token(loss.clip_mode, loss.weight_mode),
        temperature=config.rollout.temperature,
        kl_coef=loss.kl_coef,
        kl_estimator=loss.kl_estimator,
        entropy_coef=loss.entropy_coef,
    )


def make_learner(
    config: ConfigDict,
    model: models.Decoder,
    mesh: jax.sharding.Mesh,
    *,
    optimizer: ConfigDict,
    objective: learner.Objective,
    num_steps: int,
) -> learner.Learner:
    """A learner for `num_steps` steps of one objective."""
    return learner.Learner(
        model,
        optimizer=optim.make_optimizer(optimizer, num_steps=num_steps),
        schedule=optim.make_schedule(optimizer, num_steps=num_steps),
        objective=objective,
        mesh=mesh,
        rows_per_microbatch=config.batching.rows_per_microbatch,
        implementation=config.kernels.implementation,
    )


def policy_learner(
    config: ConfigDict, model: models.Decoder, mesh: jax.sharding.Mesh
) -> learner.Learner:
    """The learner of the run itself, after any warm-up."""
    return make_learner(
        config,
        model,
        mesh,
        optimizer=config.optimizer,
        objective=make_objective(config),
        num_steps=config.num_steps,
    )


def make_engine(
    config: ConfigDict, model: models.Decoder, mesh: jax.sharding.Mesh
) -> engine.Engine:
    """The in-process sampler; it has no weights until `load_weights`."""
    graphdef, _ = nnx.split(model)

    def merged(weights: learner.Params) -> models.Decoder:
        return nnx.merge(graphdef, weights)

    cached = decoding.CachedModel(
        init_cache=lambda rows, length: models.init_cache(model.config, rows, length),
        extend=lambda weights, *args: models.extend(merged(weights), *args),
        unembedding=lambda weights: merged(weights).unembedding,
        score=lambda weights, tokens: models.score_rows(
            graphdef, weights, tokens, implementation=config.kernels.implementation
        ),
    )
    return engine.Engine(
        cached,
        **config.engine.to_dict(),
        cache_sharding=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()),
    )


def _numerics(config: ConfigDict) -> dict[str, Any]:
    return {name: config.model[name] for name in ("dtype", "param_dtype", "remat")}


def _folder(config: ConfigDict) -> pathlib.Path:
    return pathlib.Path(config.model.source).expanduser()
