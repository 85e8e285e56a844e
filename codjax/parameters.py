"""Which parameters `codjax eval --checkpoint` names: of a run, of a step, or published ones."""

from __future__ import annotations

import pathlib

import jax
from ml_collections import ConfigDict

from codjax import (
    build,
    checkpoints,
    checks,
    distributed,
    learner,
    models,
    sharding,
    workdirs,
)

# What a checkpoint cannot tell by its shapes, and must be as in training.
_SAME = (
    "tokenizer",
    "model.source",
    "model.num_layers",
    "model.hidden_size",
    "model.intermediate_size",
    "model.num_heads",
    "model.num_kv_heads",
    "model.head_dim",
    "model.rope_theta",
    "model.norm_eps",
    "model.tie_embeddings",
)
_SAME_EXPERTS = ("model.experts_per_token", "model.norm_topk_prob")


def find(
    config: ConfigDict,
    model: models.Decoder,
    mesh: jax.sharding.Mesh,
    checkpoint: str | int,
    workdir: str,
) -> dict[str, learner.Params]:
    """Parameters to evaluate by label: the checkpoint asked for, then the base model.

    Which they are is decided on one process: another may have an older list of the same folder.

    Args:
        config: of the run.
        model: that it describes.
        mesh: where the parameters go.
        checkpoint: "latest", "base" (step 0), a step, or a folder: of a run, of an Orbax step, or
            of a Hugging Face model, converted or not.
        workdir: of the run.

    Raises:
        checkpoints.CheckpointError: there is no such checkpoint, or it is of another model.
    """
    workdir, text, is_run = distributed.on_main(lambda: _where(str(checkpoint), workdir))
    if not is_run:
        folder = pathlib.Path(workdir)
        with checks.reading("--checkpoint"):
            published = models.from_pretrained(
                folder,
                dtype=config.model.dtype,
                param_dtype=config.model.param_dtype,
                place=sharding.place(mesh),
            )
        _check_same_model(folder, published, model)
        return {workdir: build.params_of(published)}
    same = _SAME + (_SAME_EXPERTS if model.config.num_experts else ())
    distributed.on_main(lambda: workdirs.check_same(pathlib.Path(workdir), config, same))
    store = checkpoints.Checkpoints(workdir, keep=config.checkpoint.keep, read_only=True)
    like = build.abstract_params(model, mesh)
    try:
        steps = distributed.on_main(lambda: _steps_of(text, store, workdir, config))
        return {f"step {step}": store.restore_params(step, like) for step in steps}
    finally:
        store.close()


def _where(checkpoint: str, workdir: str) -> tuple[str, str, bool]:
    """The folder that holds a checkpoint, which one of it, and whether it is that of a run."""
    folder = pathlib.Path(checkpoint)
    if (folder / "checkpoints").is_dir():  # of another run
        return checkpoint, "latest", True
    if (folder / "config.json").exists():  # published weights
        return checkpoint, "", False
    if folder.is_dir() and folder.name.isdecimal():  # the folder of an Orbax step
        return str(folder.resolve().parent.parent), folder.name, True
    return workdir, checkpoint, True


def _check_same_model(
    folder: pathlib.Path, published: models.Decoder, model: models.Decoder
) -> None:
    """Weights alone do not tell the sizes of heads or the rotary base: those are the config's."""
    found, wanted = published.config.to_hf(), model.config.to_hf()
    # The longest text that is served changes no weight; a family may lack fields of another.
    names = (found.keys() | wanted.keys()) - {"max_position_embeddings"}
    different = sorted(name for name in names if found.get(name) != wanted.get(name))
    if different:
        raise checkpoints.CheckpointError(
            f"{folder} holds another model than the config's: {', '.join(different)} differ; set "
            "config.model to the sizes in its config.json, or config.model.source to the folder."
        )


def _steps_of(
    text: str, store: checkpoints.Checkpoints, workdir: str, config: ConfigDict
) -> list[int]:
    """The step that was asked for, and step 0 if it is to be compared with that."""
    step = _step_of(text, store, workdir)
    has_base = config.evaluation.compare_base and step != 0 and 0 in store.steps()
    return [step, 0] if has_base else [step]


def _step_of(text: str, store: checkpoints.Checkpoints, workdir: str) -> int:
    latest = store.latest_step()
    if latest is None:
        raise checkpoints.CheckpointError(
            f"{workdir} holds no finished checkpoint; train first: codjax train --workdir={workdir}"
        )
    if text in ("latest", "base"):
        return latest if text == "latest" else 0
    if not text.isdecimal():
        raise checkpoints.CheckpointError(
            "--checkpoint must be latest, base, a step, the folder of a run, of a step "
            "(DIR/checkpoints/50) or of a Hugging Face model, or the address of an endpoint "
            f"(http://host:8000/v1); got {text!r}."
        )
    return int(text)
