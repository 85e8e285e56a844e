"""`codjax convert`: a Hugging Face folder → Orbax; a run's checkpoint or a converted folder → back.

    main("Qwen3-8B", "Qwen3-8B-orbax")              # config.json, tokenizer, params/ (Orbax)
    main("Qwen3-8B-orbax", "Qwen3-8B-again")        # the same tensors, byte by byte
    main("runs/mine", "agent", dtype="bfloat16")    # the newest checkpoint, for other programs

Weights go through memory a piece at a time. All is written to OUTPUT.partial, which gets the name
OUTPUT in one step when the last byte is on the disk; so half an output is never taken for a whole
one, and the same command goes on with what a killed one has left there.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import logging
import os
import pathlib
import shutil
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from codjax import checks, models, weight_sources
from codjax.checks import ConfigError
from codjax.models import hf_folder, hf_names, orbax_params, weights
from codjax.models.config import DTYPES

RECORD_FILE = "conversion.json"
_LOCK_FILE = ".lock"
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}

_logger = logging.getLogger(__name__)


def main(source: str, output: str, *, dtype: str | None = None, max_shard_size: str = "5GB") -> str:
    """Convert weights. Nothing is written before everything was checked.

    Args:
        source: a Hugging Face folder, which becomes a converted one; or a converted one, the folder
            of a run or of a step of it, which become a Hugging Face folder.
        output: folder that it will be; must not exist, or be empty.
        dtype: "float32" | "bfloat16", to store in; None for each tensor's own.
        max_shard_size: of a safetensors file, as "5GB" or "500MB".

    Returns:
        What became of every tensor, as a table.

    Raises:
        ConfigError: what was asked for cannot be done.
    """
    began = time.monotonic()
    if dtype is not None:
        checks.choice("--dtype", dtype, DTYPES)
    max_bytes = _num_bytes(max_shard_size)
    found = weight_sources.open_source(pathlib.Path(source).expanduser())
    dtypes = _dtypes(found, dtype)
    counterparts = hf_names.counterparts(found.config)
    shards = hf_folder.plan_shards(counterparts, dtypes, max_bytes=max_bytes)
    record = _record(found, dtypes, max_bytes=max_bytes)
    target = pathlib.Path(output).expanduser().absolute()
    if _is_there(target, record):
        return f"{output} is this conversion of {source} already; nothing was done.\n"
    fields = weight_sources.with_dtype(found.fields, dtypes) if dtype else found.fields
    with _partial_folder(target, record, sum(shard.num_bytes for shard in shards)) as folder:
        if found.params is None:
            _write_orbax(folder, found, counterparts, dtypes)
        else:
            _write_tensors(folder, found.params, counterparts, shards)
            fields = _for_loaders(fields, found.config)
        for name, file in found.carried.items():
            _copy(file, folder / name)
        _write_json(folder / "config.json", fields)
    return _text(record) + f"wrote {output} in {time.monotonic() - began:.0f} s\n"


def _num_bytes(text: str) -> int:
    """Bytes of a size as "5GB"; powers of ten, as transformers has them."""
    number, unit = text[:-2], text[-2:].upper()
    if unit not in _UNITS or not number.isdigit() or int(number) < 1:
        raise ConfigError(
            f"--max-shard-size must be a whole number with {', '.join(_UNITS)}, as 5GB; "
            f"got {text!r}."
        )
    return int(number) * _UNITS[unit]


def _dtypes(found: weight_sources.Source, dtype: str | None) -> dict[str, np.dtype]:
    """What each parameter will be stored in."""
    mixed = [name for name, stored in found.dtypes.items() if stored is None]
    if mixed and dtype is None:
        raise ConfigError(
            f"--dtype must be given: layers of {', '.join(mixed)} are stored in different dtypes, "
            f"and a parameter has one; it is one of {', '.join(DTYPES)}."
        )
    return {name: np.dtype(dtype or stored) for name, stored in found.dtypes.items()}


# Writing.


def _write_orbax(
    folder: pathlib.Path,
    found: weight_sources.Source,
    counterparts: Mapping[str, hf_names.Counterpart],
    dtypes: Mapping[str, np.dtype],
) -> None:
    """Write `params/`, from the beginning unless all of it is there."""
    assert found.read_tensor is not None
    if (folder / weights.PARAMS_FOLDER).exists():
        _logger.info("The parameters are there already, whole.")
        return
    for half in folder.glob(f"{weights.PARAMS_FOLDER}.*"):
        _logger.info("The parameters were not all written; they are begun again.")
        shutil.rmtree(half)
    specs = hf_names.param_specs(found.config)
    written = {
        name: orbax_params.Written(
            shape=specs[name].shape,
            axes=specs[name].axes,
            dtype=dtypes[name],
            read=functools.partial(
                counterpart.read, read_tensor=found.read_tensor, dtype=dtypes[name]
            ),
        )
        for name, counterpart in counterparts.items()
    }
    orbax_params.write(folder / weights.PARAMS_FOLDER, written)


def _write_tensors(
    folder: pathlib.Path,
    params: pathlib.Path,
    counterparts: Mapping[str, hf_names.Counterpart],
    shards: list[hf_folder.Shard],
) -> None:
    """Write the safetensors files that are not there yet, one after the other."""
    part = orbax_params.StackReader(orbax_params.open_stores(params))
    missing = [shard for shard in shards if not (folder / shard.file).is_file()]
    if len(missing) < len(shards):
        num_there = len(shards) - len(missing)
        _logger.info("%d of %d files are there already.", num_there, len(shards))
    for shard in missing:
        hf_folder.write_shard(folder, shard, hf_folder.tensors_of(shard, counterparts, part))
        _logger.info("Wrote %s, %s.", shard.file, _size(shard.num_bytes))
    hf_folder.write_index(folder, shards)


def _for_loaders(fields: Mapping[str, Any], config: models.DecoderConfig) -> dict[str, Any]:
    """A config.json with the spellings that some loader insists on, beside what it says itself."""
    ours = config.to_hf()
    return {
        "architectures": ours["architectures"],  # by which SGLang finds the model
        "rope_theta": config.rope_theta,  # before transformers 5, elsewhere now
        "torch_dtype": fields.get("dtype", ours["torch_dtype"]),  # likewise
        **fields,
    }


def _copy(file: pathlib.Path, target: pathlib.Path) -> None:
    target.parent.mkdir(exist_ok=True)
    shutil.copyfile(file, target)
    _sync(target)


def _write_json(path: pathlib.Path, value: Any) -> None:
    hf_folder.write_text(path, json.dumps(value, indent=2) + "\n")


# The output folder, whole or not there.


def _is_there(target: pathlib.Path, record: Mapping[str, Any]) -> bool:
    """Whether the output is there, from the same source.

    Raises:
        ConfigError: something else is.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    if _read_record(target) == record:
        return True
    raise ConfigError(
        f"--output={target} must not exist: another thing is there; remove it, or give another "
        "folder."
    )


@contextlib.contextmanager
def _partial_folder(
    target: pathlib.Path, record: Mapping[str, Any], num_bytes: int
) -> Iterator[pathlib.Path]:
    """The folder to write to, with what an interrupted conversion left; at the end, the output.

    Raises:
        ConfigError: it cannot be written to, is not ours, or the disk is too small.
    """
    folder = target.with_name(f"{target.name}.partial")
    _check_room(folder, num_bytes)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / _LOCK_FILE).open("w")
    except OSError as error:
        raise ConfigError(f"--output={target} cannot be written: {error.strerror}.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"{folder} is being written by another codjax convert.") from error
        _take_over(folder, record)
        yield folder
        (folder / _LOCK_FILE).unlink()
        _sync(folder)
        folder.replace(target)
        _sync(target.parent)


def _check_room(folder: pathlib.Path, num_bytes: int) -> None:
    """Raise if the folder is not ours, or its disk has no room for so many bytes."""
    files = list(folder.rglob("*"))
    if {file.name for file in files} - {_LOCK_FILE} and _read_record(folder) is None:
        raise ConfigError(f"{folder} is in the way, and not of codjax convert; remove it.")
    num_bytes -= sum(file.stat().st_size for file in files if file.is_file())
    disk = next(parent for parent in folder.parents if parent.is_dir())
    free = shutil.disk_usage(disk).free
    if num_bytes > free:
        raise ConfigError(
            f"--output needs {_size(num_bytes)}, and the disk of {disk} has {_size(free)} left; "
            "make room, or give a folder on another disk."
        )


def _take_over(folder: pathlib.Path, record: Mapping[str, Any]) -> None:
    """Keep what an equal conversion left in the folder, remove what another one did."""
    left = [path for path in folder.iterdir() if path.name != _LOCK_FILE]
    if left and _read_record(folder) == record:
        _logger.info("Going on with the interrupted conversion in %s.", folder)
        return
    if left:
        _logger.info("%s was the beginning of another conversion; it is removed.", folder)
    # The record goes last: without it, what is left would be nobody's.
    for path in sorted(left, key=lambda path: path.name == RECORD_FILE):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    _write_json(folder / RECORD_FILE, record)


def _read_record(folder: pathlib.Path) -> Any:
    """What the folder is the conversion of; None where it does not say."""
    try:
        return json.loads((folder / RECORD_FILE).read_text())
    except (OSError, ValueError):
        return None


def _sync(path: pathlib.Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# The report.


def _record(
    found: weight_sources.Source, dtypes: Mapping[str, np.dtype], *, max_bytes: int
) -> dict[str, Any]:
    """What is converted and how, as JSON; equal for equal conversions."""
    parameters = {}
    num_reshaped = 0
    for name, counterpart in hf_names.counterparts(found.config).items():
        tensors = [tensor for tensor, _ in counterpart.tensors()]
        num_reshaped += len(tensors) * counterpart.is_reshaped
        parameters[name] = {
            "shape": list(counterpart.shape),
            "dtype": str(dtypes[name]),
            "dtype_before": str(found.dtypes[name] or "mixed"),
            "tensors": hf_names.collapsed(tensors),
            "num_tensors": len(tensors),
            "tensor_shape": list(counterpart.tensor_shape),
            "is_reshaped": counterpart.is_reshaped,
        }
    return {
        "source": found.label,
        "to": "orbax" if found.params is None else "hugging_face",
        "max_shard_bytes": None if found.params is None else max_bytes,
        "num_tensors": sum(entry["num_tensors"] for entry in parameters.values()),
        "num_reshaped": num_reshaped,
        "copies_left_out": found.copies,
        "parameters": parameters,
        "stamps": dict(found.stamps),
    }


def _text(record: Mapping[str, Any]) -> str:
    """The record as a table to read."""
    rows = [("parameter", "shape", "tensors", "each", "dtype", "")]
    for name, entry in record["parameters"].items():
        before, after = entry["dtype_before"], entry["dtype"]
        rows.append(
            (
                name,
                str(entry["shape"]),
                ", ".join(entry["tensors"]),
                str(entry["tensor_shape"]),
                after if before == after else f"{before} → {after}",
                "reshaped" if entry["is_reshaped"] else "",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines += [f"left out: {name}, a copy of {hf_names.TABLE}" for name in record["copies_left_out"]]
    lines.append(
        f"{record['source']}: {record['num_tensors']} tensors, {record['num_reshaped']} of them "
        "reshaped; none missing, none unexpected"  # or it would have been refused
    )
    return "\n".join(lines) + "\n"


def _size(num_bytes: int) -> str:
    for unit, size in reversed(_UNITS.items()):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes} bytes"
