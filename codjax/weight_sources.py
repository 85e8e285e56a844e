"""Where weights to be converted come from, opened and checked; nothing of them is read yet.

source = open_source(pathlib.Path("runs/mine/checkpoints/50"))
source.read_tensor, source.counterparts, source.fields, …
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from codjax import checkpoints, models, workdirs
from codjax.checks import ConfigError
from codjax.models import hf_folder, hf_names, orbax_params, weights

_CARRIED = (  # what a model's folder has beside weights and config.json
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates/*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)
_GENERATION = ("generation_config.json",)
# Parameters do not depend on these.
_NUMERICS = {"dtype": "float32", "param_dtype": "float32", "remat": "none"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Weights that are there, whole and of the right shapes.

    Attributes:
        label: what they are, for people.
        config: of the decoder.
        fields: its config.json, in Hugging Face's spelling.
        params: folder of the Orbax checkpoint; None for safetensors.
        read_tensor: a part of a tensor; of safetensors only.
        dtypes: that each parameter is stored in; None where its tensors differ.
        copies: tensors that are copies of another and need not be carried.
        carried: files that belong to the model, by name: tokenizer, generation config, licence.
        stamps: size and time of change of the files that hold the weights, by name.
    """

    label: str
    config: models.DecoderConfig
    fields: dict[str, Any]
    params: pathlib.Path | None
    read_tensor: hf_names.ReadTensor | None
    dtypes: Mapping[str, np.dtype | None]
    copies: list[str]
    carried: Mapping[str, pathlib.Path]
    stamps: Mapping[str, list[int]]


def open_source(folder: pathlib.Path) -> Source:
    """The weights of a folder, whichever kind it is.

    Args:
        folder: of Hugging Face; of a run, for its newest checkpoint; of one of its steps
            (`DIR/checkpoints/50`); or made by `codjax convert`.

    Raises:
        ConfigError: none of these, or weights that are not those of their config.
    """
    folder = folder.resolve()
    try:
        if (folder / "checkpoints").is_dir():
            return _of_run(folder, _newest_step(folder))
        if folder.parent.name == "checkpoints" and folder.name.isdigit():
            return _of_run(folder.parent.parent, int(folder.name))
        if weights.is_converted(folder):
            return _of_converted(folder)
        if (folder / "config.json").is_file():
            return _of_hugging_face(folder)
    except checkpoints.CheckpointError:
        raise
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(f"--source: {error}") from error
    raise ConfigError(
        "--source must be a Hugging Face folder (config.json and safetensors), the folder of a run "
        f"or of a step of it (DIR/checkpoints/50), or one that was converted; got {folder}."
    )


def with_dtype(fields: Mapping[str, Any], dtypes: Mapping[str, np.dtype | None]) -> dict[str, Any]:
    """A config.json that says the dtype of the parameters: the first's, the token table.

    transformers writes "dtype" since version 5, and older programs read "torch_dtype" only: those
    that are there are set, and the latter where there is none.
    """
    name = str(next(iter(dtypes.values())))
    present = [key for key in ("torch_dtype", "dtype") if key in fields] or ["torch_dtype"]
    return {**fields, **dict.fromkeys(present, name)}


def _of_hugging_face(folder: pathlib.Path) -> Source:
    config = models.read_config(folder, **_NUMERICS)
    opened, counterparts = hf_folder.Folder(folder), hf_names.counterparts(config)
    copies = hf_folder.check(
        opened, counterparts, path=folder, tie_embeddings=config.tie_embeddings
    )
    dtypes: dict[str, np.dtype | None] = {}
    for param, counterpart in counterparts.items():
        found = {opened.tensors[name].dtype for name, _ in counterpart.tensors()}
        dtypes[param] = hf_folder.DTYPES[found.pop()] if len(found) == 1 else None
    return Source(
        label=f"Hugging Face folder {folder}",
        config=config,
        fields=json.loads((folder / "config.json").read_text()),
        params=None,
        read_tensor=opened.read,
        dtypes=dtypes,
        copies=copies,
        carried=_files(folder, _CARRIED),
        stamps=_stamps({stored.file for stored in opened.tensors.values()}),
    )


def _of_converted(folder: pathlib.Path) -> Source:
    config = models.read_config(folder, **_NUMERICS)
    params = folder / weights.PARAMS_FOLDER
    return Source(
        label=f"converted folder {folder}",
        config=config,
        fields=json.loads((folder / "config.json").read_text()),
        carried=_files(folder, _CARRIED),
        **_of_params(params, config),
    )


def _of_run(workdir: pathlib.Path, step: int) -> Source:
    """A step of a run: parameters of the checkpoint, sizes and tokenizer of the run's config."""
    params = workdir / "checkpoints" / str(step) / "params"
    if not (params / orbax_params.METADATA_FILE).is_file():
        raise ConfigError(f"--source: {workdir} holds no finished checkpoint of step {step}.")
    path = workdir / workdirs.CONFIG_FILE
    if not path.is_file():
        raise ConfigError(f"--source: {path} is missing: it tells the sizes of the model.")
    run = json.loads(path.read_text())
    sizes, tokenizer = dict(run["model"]), str(run["tokenizer"]["source"])
    first = sizes.pop("source")
    carried: dict[str, pathlib.Path] = {}
    if first == "init":
        vocab_size = orbax_params.open_stores(params)["embedding"].shape[0]
        config = models.DecoderConfig(vocab_size=vocab_size, **sizes)
        fields = config.to_hf()
    else:
        folder = pathlib.Path(first).expanduser()
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"--source: the run began from model.source = {first}, whose config.json is not on "
                f"this machine; put that folder back, or change model.source in {path}."
            )
        config = models.read_config(folder, **_NUMERICS)
        fields = json.loads((folder / "config.json").read_text())
        carried |= _files(folder, _GENERATION)
    if not tokenizer.startswith("builtin:"):
        of_tokenizer = _files(pathlib.Path(tokenizer).expanduser(), _CARRIED)
        carried |= {name: file for name, file in of_tokenizer.items() if name not in _GENERATION}
    of_params = _of_params(params, config)
    return Source(
        label=f"step {step} of the run in {workdir}",
        config=config,
        fields=with_dtype(fields, of_params["dtypes"]),
        carried=carried,
        **of_params,
    )


def _of_params(params: pathlib.Path, config: models.DecoderConfig) -> dict[str, Any]:
    """What a `Source` says of an Orbax checkpoint of parameters, in the order of the tables."""
    counterparts = hf_names.counterparts(config)
    orbax_params.check(params, {name: c.shape for name, c in counterparts.items()})
    stores = orbax_params.open_stores(params)
    return {
        "params": params,
        "read_tensor": None,
        "dtypes": {name: stores[name].dtype.numpy_dtype for name in counterparts},
        "copies": [],
        "stamps": _stamps([params / orbax_params.METADATA_FILE, params / "manifest.ocdbt"]),
    }


def _newest_step(workdir: pathlib.Path) -> int:
    store = checkpoints.Checkpoints(workdir, keep=1, read_only=True)
    try:
        step = store.latest_step()
    finally:
        store.close()
    if step is None:
        raise ConfigError(f"--source: {workdir} holds no finished checkpoint yet.")
    return step


def _files(folder: pathlib.Path, patterns: Iterable[str]) -> dict[str, pathlib.Path]:
    """Files by their name in the folder."""
    found = [file for pattern in patterns for file in folder.glob(pattern) if file.is_file()]
    return {str(file.relative_to(folder)): file for file in sorted(found)}


def _stamps(files: Iterable[pathlib.Path]) -> dict[str, list[int]]:
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(files)}
