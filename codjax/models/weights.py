"""Hugging Face folders: `config.json` and safetensors, read and written without torch.

transformers stores a matrix as `[out in]` with heads and channels merged and every layer apart;
we store `[in out]` with heads apart and layers stacked. `_LAYER` and `_TOP` are the whole
correspondence.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from codjax.models import decoder
from codjax.models.config import DecoderConfig

_TOP = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "output": "lm_head.weight",
}
_LAYER = {
    "attention_norm": "input_layernorm.weight",
    "query": "self_attn.q_proj.weight",
    "key": "self_attn.k_proj.weight",
    "value": "self_attn.v_proj.weight",
    "query_norm": "self_attn.q_norm.weight",
    "key_norm": "self_attn.k_norm.weight",
    "attention_output": "self_attn.o_proj.weight",
    "query_bias": "self_attn.q_proj.bias",
    "key_bias": "self_attn.k_proj.bias",
    "value_bias": "self_attn.v_proj.bias",
    "attention_output_bias": "self_attn.o_proj.bias",
    "mlp_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
    "gate_bias": "mlp.gate_proj.bias",
    "up_bias": "mlp.up_proj.bias",
    "down_bias": "mlp.down_proj.bias",
    "router": "mlp.gate.weight",
}
_EXPERT = {name: f"{name}_proj.weight" for name in ("gate", "up", "down")}
Place = Callable[[np.ndarray, tuple[str, ...]], jax.Array]

_FLOATS = {"F64", "F32", "F16", "BF16"}  # anything else is quantised


class _Slot(NamedTuple):
    """Where one tensor of a folder belongs."""

    param: str  # name in `decoder.param_specs`
    at: tuple[int, ...]  # index of the layer, of the expert
    shape: tuple[int, ...]  # of what the index picks


def read_config(
    folder: str | pathlib.Path, *, dtype: str, param_dtype: str, remat: str
) -> DecoderConfig:
    """The sizes of the model of a Hugging Face folder; reads its config.json alone.

    Raises:
        FileNotFoundError: no such folder, or it has no config.json.
        ValueError: a config that we cannot honour.
    """
    fields = json.loads(_existing(pathlib.Path(folder) / "config.json").read_text())
    return DecoderConfig.from_hf(fields, dtype=dtype, param_dtype=param_dtype, remat=remat)


def from_pretrained(
    folder: str | pathlib.Path,
    dtype: str = "float32",
    *,
    param_dtype: str | None = None,
    remat: str = "none",
    place: Place | None = None,
) -> decoder.Decoder:
    """The model of a Hugging Face folder with `config.json` and safetensors, whole or sharded.

    Args:
        folder: on this machine.
        dtype: "float32" | "bfloat16", of activations.
        param_dtype: of parameters; None for `dtype`.
        remat: see `DecoderConfig`.
        place: puts a parameter, given as a host array with its logical axes, on devices;
            `sharding.place(mesh)` makes one that sends every device its part only. None for
            the default device.

    Raises:
        FileNotFoundError: no such folder, or it lacks a file.
        ValueError: a config that we cannot honour; tensors missing, unexpected, quantised or of
            another shape, all of them listed.
    """
    folder = pathlib.Path(folder)
    config = read_config(folder, dtype=dtype, param_dtype=param_dtype or dtype, remat=remat)
    files = _tensor_files(folder)
    slots = _slots(config)
    _check_tensors(folder, files, slots, config)
    params = {}
    for name, spec in decoder.param_specs(config).items():
        array = np.empty(spec.shape, config.param_dtype)
        for tensor, slot in slots.items():
            if slot.param == name:
                array[slot.at] = _from_hf(name, _read(files[tensor], tensor), slot.shape)
        params[name] = place(array, spec.axes) if place else jnp.asarray(array)
    return decoder.Decoder(config, params)


def save_pretrained(
    model: decoder.Decoder,
    folder: str | pathlib.Path,
    *,
    dtype: str | None = None,
    extra_fields: Mapping[str, Any] | None = None,
) -> None:
    """Write `config.json` and `model.safetensors`, which transformers and SGLang load.

    Args:
        model: the decoder; of a sharded one, every part must be reachable from this process.
        folder: made if it is not there.
        dtype: "float32" | "bfloat16", to store in; None for the parameters' own.
        extra_fields: fields that `config.json` gets besides the model's, such as `eos_token_id`.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = dtype or model.config.param_dtype
    flat = {".".join(path): value for path, value in _flatten(nnx.to_pure_dict(nnx.state(model)))}
    host = {name: np.asarray(value) for name, value in flat.items()}
    tensors = {}
    for tensor, slot in _slots(model.config).items():
        array = host[slot.param][slot.at]
        tensors[tensor] = np.ascontiguousarray(_to_hf(slot.param, array).astype(dtype))
    metadata = {"format": "pt"}  # transformers refuses files that do not say so
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata=metadata)
    fields = {**(extra_fields or {}), **model.config.to_hf(), "torch_dtype": dtype}
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")


def _from_hf(name: str, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """`[out in]` with heads merged → our shape; tables stay as they are."""
    if _is_matrix(name):
        return tensor.T.reshape(shape)
    return tensor.reshape(shape)


def _to_hf(name: str, array: np.ndarray) -> np.ndarray:
    if not _is_matrix(name):
        return array.reshape(-1) if name.startswith("layers.") else array
    # Heads and channels are neighbours: the last two of what goes in, the first of what comes out.
    num_in = array.shape[0] * array.shape[1] if name == "layers.attention_output" else len(array)
    return array.reshape(num_in, -1).T


def _is_matrix(name: str) -> bool:
    return name.startswith("layers.") and not name.endswith(("norm", "bias"))


def _slots(config: DecoderConfig) -> dict[str, _Slot]:
    """Name in the folder → its place, for every tensor that the folder must have."""
    slots = {}
    for name, spec in decoder.param_specs(config).items():
        if name in _TOP:
            slots[_TOP[name]] = _Slot(name, (), spec.shape)
            continue
        ours = name.removeprefix("layers.")
        for layer in range(config.num_layers):
            prefix = f"model.layers.{layer}."
            if config.num_experts and ours in _EXPERT:
                for expert in range(config.num_experts):
                    tensor = f"{prefix}mlp.experts.{expert}.{_EXPERT[ours]}"
                    slots[tensor] = _Slot(name, (layer, expert), spec.shape[2:])
            else:
                slots[prefix + _LAYER[ours]] = _Slot(name, (layer,), spec.shape[1:])
    return slots


def _check_tensors(
    folder: pathlib.Path,
    files: Mapping[str, pathlib.Path],
    slots: Mapping[str, _Slot],
    config: DecoderConfig,
) -> None:
    """Raise unless the folder has every tensor, no other, and each of the right shape."""
    found = set(files)
    if config.tie_embeddings and _TOP["output"] in found:
        # Some published folders store the tied table twice.
        found.remove(_TOP["output"])
        table, output = (_read(files[_TOP[name]], _TOP[name]) for name in ("embedding", "output"))
        if not np.array_equal(table, output):
            raise ValueError(
                f"{folder}: config.json ties the embeddings, but {_TOP['output']} is not equal to "
                f"{_TOP['embedding']}; set tie_word_embeddings to what the weights are."
            )
    problems = [f"missing {name}" for name in sorted(set(slots) - found)]
    problems += [f"unexpected {name}" for name in sorted(found - set(slots))]
    for name in sorted(found & set(slots)):
        shape, dtype = _shape_and_dtype(files[name], name)
        expected = _to_hf(slots[name].param, np.broadcast_to(np.int8(0), slots[name].shape)).shape
        if shape != expected:
            problems.append(f"{name} has shape {shape}, not {expected}")
        if dtype not in _FLOATS:
            problems.append(f"{name} is {dtype}, not a float: quantised weights are not supported")
    if problems:
        raise ValueError(
            f"{folder}: the tensors are not those of its config.json: {_listing(problems)}."
        )


def _listing(problems: list[str], limit: int = 20) -> str:
    more = len(problems) - limit
    return "; ".join(problems[:limit]) + (f"; and {more} more" if more > 0 else "")


def _tensor_files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Tensor name → the file that holds it."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = json.loads(index.read_text())["weight_map"]
        return {name: _existing(folder / file) for name, file in weight_map.items()}
    file = _existing(folder / "model.safetensors")
    with safetensors.safe_open(file, framework="numpy") as tensors:
        return dict.fromkeys(tensors.keys(), file)


def _read(file: pathlib.Path, name: str) -> np.ndarray:
    with safetensors.safe_open(file, framework="numpy") as tensors:
        return tensors.get_tensor(name)


def _shape_and_dtype(file: pathlib.Path, name: str) -> tuple[tuple[int, ...], str]:
    with safetensors.safe_open(file, framework="numpy") as tensors:
        part = tensors.get_slice(name)
        return tuple(part.get_shape()), part.get_dtype()


def _existing(file: pathlib.Path) -> pathlib.Path:
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} does not exist; give a Hugging Face folder on this machine with config.json "
            "and model.safetensors (or its index and parts)."
        )
    return file


def _flatten(tree: Mapping[str, Any]) -> Iterable[tuple[tuple[str, ...], jax.Array]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from (((name, *path), leaf) for path, leaf in _flatten(value))
        else:
            yield (name,), value
