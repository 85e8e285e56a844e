"""Weights in a folder: a Hugging Face folder, or what `codjax convert` makes of one.

A model's folder has a Hugging Face `config.json` and either safetensors or, converted, `params/`,
an Orbax checkpoint of the parameters alone, which hosts read their own parts of.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from codjax.models import decoder, hf_folder, hf_names, hf_shards, json_files, orbax_params
from codjax.models.config import DecoderConfig

PARAMS_FOLDER = "params"

# Sharding of a parameter with these shape and logical axes.
Place = Callable[[tuple[int, ...], tuple[str, ...]], jax.sharding.Sharding]


def read_config(
    folder: str | pathlib.Path, *, dtype: str, param_dtype: str, remat: str
) -> DecoderConfig:
    """The sizes of the model of a folder; reads its config.json alone.

    Raises:
        FileNotFoundError: no such folder, or it has no config.json.
        ValueError: a config.json that is damaged, or that we cannot honour.
    """
    path = hf_folder.existing(pathlib.Path(folder) / "config.json")
    fields = json_files.read_object(path)
    try:
        return DecoderConfig.from_hf(fields, dtype=dtype, param_dtype=param_dtype, remat=remat)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def is_converted(folder: pathlib.Path) -> bool:
    """Whether a model's folder holds an Orbax checkpoint in place of safetensors."""
    return (folder / PARAMS_FOLDER / orbax_params.METADATA_FILE).is_file()


def from_pretrained(
    folder: str | pathlib.Path,
    dtype: str = "float32",
    *,
    param_dtype: str | None = None,
    remat: str = "none",
    place: Place | None = None,
) -> decoder.Decoder:
    """The model of a folder, whole or sharded; of what is sharded, hosts read their parts only.

    Args:
        folder: on this machine: of Hugging Face with `config.json` and safetensors, or converted.
        dtype: "float32" | "bfloat16", of activations.
        param_dtype: of parameters; None for `dtype`.
        remat: see `DecoderConfig`.
        place: sharding of a parameter, given its shape and logical axes; `sharding.place(mesh)`
            makes one. None for the default device.

    Raises:
        FileNotFoundError: no such folder, or it lacks a file.
        ValueError: a config that we cannot honour; tensors missing, unexpected, quantised or of
            another shape, all of them listed.
    """
    folder = pathlib.Path(folder)
    config = read_config(folder, dtype=dtype, param_dtype=param_dtype or dtype, remat=remat)
    place = place or _on_default_device
    shapes = {
        name: jax.ShapeDtypeStruct(
            spec.shape, config.param_dtype, sharding=place(spec.shape, spec.axes)
        )
        for name, spec in decoder.param_specs(config).items()
    }
    read = _from_orbax if is_converted(folder) else _from_tensors
    return decoder.Decoder(config, read(folder, config, shapes))


def save_pretrained(
    model: decoder.Decoder,
    folder: str | pathlib.Path,
    *,
    dtype: str | None = None,
    extra_fields: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write `config.json` and safetensors, which transformers and SGLang load.

    Safetensors that an earlier call left in the folder are replaced, or removed.

    Args:
        model: the decoder; of a sharded one, every part must be reachable from this process.
        folder: made if it is not there.
        dtype: "float32" | "bfloat16", to store in; None for the parameters' own.
        extra_fields: fields that `config.json` gets besides the model's, such as `eos_token_id`.
        max_shard_bytes: of a file.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = dtype or model.config.param_dtype
    counterparts = hf_names.counterparts(model.config)
    params = {
        ".".join(map(str, path)): value[...] for path, value in nnx.to_flat_state(nnx.state(model))
    }

    def part(name: str, index: tuple[int, ...]) -> np.ndarray:
        return np.asarray(params[name])[index]

    dtypes = dict.fromkeys(counterparts, np.dtype(dtype))
    shards = hf_shards.plan_shards(counterparts, dtypes, max_bytes=max_shard_bytes)
    for shard in shards:
        hf_shards.write_shard(folder, shard, hf_shards.tensors_of(shard, counterparts, part))
    hf_shards.write_index(folder, shards)
    fields = {**(extra_fields or {}), **model.config.to_hf(), "torch_dtype": dtype}
    json_files.write(folder / "config.json", fields)


def _from_tensors(
    path: pathlib.Path, config: DecoderConfig, like: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Parameters from safetensors, a part at a time, in no wider a dtype than they are stored."""
    folder, counterparts = hf_folder.Folder(path), hf_names.counterparts(config)
    hf_folder.check(folder, counterparts, path=path, tie_embeddings=config.tie_embeddings)

    def load(name: str) -> jax.Array:
        counterpart, dtype = counterparts[name], like[name].dtype
        return _placed(like[name], lambda index: counterpart.read(index, folder.read, dtype))

    return {name: load(name) for name in counterparts}


def _from_orbax(
    path: pathlib.Path, config: DecoderConfig, like: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Parameters from a converted folder, a part at a time."""
    params = path / PARAMS_FOLDER
    orbax_params.check(params, {name: shape.shape for name, shape in like.items()})
    stores = orbax_params.open_stores(params)

    def load(name: str) -> jax.Array:
        store, dtype = stores[name], like[name].dtype
        return _placed(like[name], lambda index: store.read(index).astype(dtype, copy=False))

    return {name: load(name) for name in like}


def _placed(like: jax.ShapeDtypeStruct, read: Callable[[hf_names.Index], np.ndarray]) -> jax.Array:
    """A parameter on its devices; what several of them hold is read once."""
    parts: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def part(index: hf_names.Index | None) -> np.ndarray:
        assert index is not None  # as for every array that has a value
        sizes = zip(index, like.shape, strict=True)
        key = tuple(of_axis.indices(size)[:2] for of_axis, size in sizes)
        if key not in parts:
            parts[key] = read(index)
        return parts[key]

    return jax.make_array_from_callback(like.shape, like.sharding, part)


def _on_default_device(
    shape: tuple[int, ...], axes: tuple[str, ...]
) -> jax.sharding.SingleDeviceSharding:
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
