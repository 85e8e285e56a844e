"""Where weights to be converted come from, opened and checked; nothing of them is read yet.

source = open_source(pathlib.Path("runs/mine/checkpoints/50"))
source.read_tensor, source.config, source.fields, …
source.check_unchanged()                            # when all of it was read
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from codjax import checkpoints, checks, models, workdirs
from codjax import config as config_lib
from codjax.checks import ConfigError
from codjax.models import hf_folder, hf_names, json_files, orbax_params, weights

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
# Without them, a run's config.json does not tell what the model is; other keys of `config.model`
# came later, with a default that is what older runs had.
_NEEDED = tuple(
    field.name
    for field in dataclasses.fields(models.DecoderConfig)
    if field.default is dataclasses.MISSING and field.name != "vocab_size"
)


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
        files: that hold the weights, by name.
        configs: files that `config` and `fields` were read from.
        stamps: of all of these files when they were opened, by path: size and time of change, of
            configs what is in them, since a run writes its own again at every start.
    """

    label: str
    config: models.DecoderConfig
    fields: dict[str, Any]
    params: pathlib.Path | None
    read_tensor: hf_names.ReadTensor | None
    dtypes: Mapping[str, np.dtype | None]
    copies: list[str]
    carried: Mapping[str, pathlib.Path]
    files: Mapping[str, pathlib.Path]
    configs: tuple[pathlib.Path, ...]
    stamps: Mapping[pathlib.Path, Any] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "stamps", self._stamps_now())

    def stamps_of(self, files: Mapping[str, pathlib.Path]) -> dict[str, Any]:
        """The stamps of `files` or of `carried`, by name."""
        return {name: self.stamps[file] for name, file in files.items()}

    def check_unchanged(self) -> None:
        """Raises ConfigError if a file is not the one that was opened."""
        now = self._stamps_now()
        changed = [file for file, stamp in self.stamps.items() if now[file] != stamp]
        if changed:
            raise ConfigError(
                f"--source changed while it was converted: {', '.join(map(str, changed))}; give "
                "the command again when nothing writes to it."
            )

    def _stamps_now(self) -> dict[pathlib.Path, Any]:
        files = (*self.files.values(), *self.carried.values())
        return {file: _stamp(file) for file in files} | {
            file: file.read_bytes() if file.is_file() else None for file in self.configs
        }


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
    except ConfigError:
        raise  # it names the flag already
    except (ValueError, OSError) as error:
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
        fields=json_files.read_object(folder / "config.json"),
        params=None,
        read_tensor=opened.read,
        dtypes=dtypes,
        copies=copies,
        carried=_files(folder, _CARRIED),
        files=_by_name({stored.file for stored in opened.tensors.values()}),
        configs=(folder / "config.json",),
    )


def _of_converted(folder: pathlib.Path) -> Source:
    config = models.read_config(folder, **_NUMERICS)
    params = folder / weights.PARAMS_FOLDER
    return Source(
        label=f"converted folder {folder}",
        config=config,
        fields=json_files.read_object(folder / "config.json"),
        carried=_files(folder, _CARRIED),
        configs=(folder / "config.json",),
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
    run = json_files.read_object(path)
    sizes = json_files.member(run, "model", dict, path=path)
    section = json_files.member(run, "tokenizer", dict, path=path)
    first = json_files.member(sizes, "model.source", str, path=path)
    tokenizer = json_files.member(section, "tokenizer.source", str, path=path)
    carried: dict[str, pathlib.Path] = {}
    configs = [path]
    if first == "init":
        vocab_size = orbax_params.open_stores(params)["embedding"].shape[0]
        config = _config_of_run(sizes, vocab_size, path)
        fields = config.to_hf()
    else:
        folder = pathlib.Path(first).expanduser()
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"--source: the run began from model.source = {first}, whose config.json is not on "
                f"this machine; put that folder back, or change model.source in {path}."
            )
        config = models.read_config(folder, **_NUMERICS)
        fields = json_files.read_object(folder / "config.json")
        carried |= _files(folder, _GENERATION)
        configs.append(folder / "config.json")
    if not tokenizer.startswith("builtin:"):
        of_tokenizer = _files(pathlib.Path(tokenizer).expanduser(), _CARRIED)
        carried |= {name: file for name, file in of_tokenizer.items() if name not in _GENERATION}
    of_params = _of_params(params, config)
    return Source(
        label=f"step {step} of the run in {workdir}",
        config=config,
        fields=with_dtype(fields, of_params["dtypes"]),
        carried=carried,
        configs=tuple(configs),
        **of_params,
    )


def _config_of_run(
    model: Mapping[str, Any], vocab_size: int, path: pathlib.Path
) -> models.DecoderConfig:
    """The decoder of a run with fresh weights.

    Args:
        model: `config.model` of the run, from `path`.
        vocab_size: of the weights, since the config may leave it to the tokenizer.
        path: of the run's config.json, for messages.
    """
    missing = [f"model.{name}" for name in _NEEDED if name not in model]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}.")
    template = config_lib.default_config().model
    try:
        sizes = {**template.to_dict(), **model}
        checks.matches(ConfigDict(sizes), template, "model.", lambda _: False)
        del sizes["source"]
        return models.DecoderConfig(**{**sizes, "vocab_size": vocab_size})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _of_params(params: pathlib.Path, config: models.DecoderConfig) -> dict[str, Any]:
    """What a `Source` says of an Orbax checkpoint of parameters, in the order of the tables."""
    counterparts = hf_names.counterparts(config)
    orbax_params.check(params, {name: c.shape for name, c in counterparts.items()})
    stores = orbax_params.open_stores(params)
    return {
        "params": params,
        "read_tensor": None,
        "dtypes": {name: stores[name].dtype for name in counterparts},
        "copies": [],
        "files": _by_name([params / orbax_params.METADATA_FILE, params / "manifest.ocdbt"]),
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


def _by_name(files: Iterable[pathlib.Path]) -> dict[str, pathlib.Path]:
    return {file.name: file for file in sorted(files)}


def _stamp(file: pathlib.Path) -> list[int] | None:
    """Size and time of change; None if it is gone."""
    try:
        status = file.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]
