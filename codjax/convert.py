"""`codjax convert`: a Hugging Face folder → Orbax; a run's checkpoint or a converted folder → back.

    main("Qwen3-8B", "Qwen3-8B-orbax")              # config.json, tokenizer, params/ (Orbax)
    main("Qwen3-8B-orbax", "Qwen3-8B-again")        # the same tensors, byte by byte
    main("runs/mine", "agent", dtype="bfloat16")    # the newest checkpoint, for other programs

Weights go through memory a piece at a time. All is written to OUTPUT.partial, which gets the name
OUTPUT in one step when the last byte is on the disk; so half an output is never taken for a whole
one, and the same command goes on with what a killed one has left there.
"""

from __future__ import annotations

import logging
import pathlib
import shutil
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from codjax import checks, models, output_folder, weight_sources
from codjax.checks import ConfigError
from codjax.models import hf_folder, hf_names, hf_shards, json_files, orbax_params, weights
from codjax.models.config import DTYPES

_WIDEST = np.dtype(np.float64)  # holds what any tensor does, for layers of different dtypes
_COUNTED = 2**22  # values at a time

_logger = logging.getLogger(__name__)


def main(source: str, output: str, *, dtype: str | None = None, max_shard_size: str = "5GB") -> str:
    """Convert weights. Nothing is written before everything but the values was checked.

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
        WriteError: the disk is full, or fails.
    """
    began = time.monotonic()
    if dtype is not None:
        checks.choice("--dtype", dtype, DTYPES)
    max_bytes = output_folder.num_bytes_of(max_shard_size, "--max-shard-size")
    found = weight_sources.open_source(pathlib.Path(source).expanduser())
    target = _target(output, source)
    dtypes = _dtypes(found, dtype)
    counterparts = hf_names.counterparts(found.config)
    shards = hf_shards.plan_shards(counterparts, dtypes, max_bytes=max_bytes)
    record = _record(found, dtypes, max_bytes=max_bytes)
    if output_folder.is_there(target, record):
        return f"{output} is this conversion of {source} already; nothing was done.\n"
    fields = weight_sources.with_dtype(found.fields, dtypes) if dtype else found.fields
    num_bytes = sum(shard.num_bytes for shard in shards)
    with output_folder.begin(target, record, num_bytes) as out:
        try:
            if found.params is None:
                _write_orbax(out, found, counterparts, dtypes)
            else:
                _write_tensors(out, found.params, counterparts, dtypes, shards)
                fields = _for_loaders(fields, found.config, dtypes)
        except orbax_params.DamagedError as error:
            raise ConfigError(f"--source: {error}") from error
        for name, file in found.carried.items():
            _copy(file, out.path / name)
        json_files.write(out.path / "config.json", fields)
        out.add([*found.carried, "config.json"])
        found.check_unchanged()
    report = _text(record, out.non_finite)
    return report + f"wrote {output} in {time.monotonic() - began:.0f} s\n"


def _target(output: str, source: str) -> pathlib.Path:
    """The folder that it will be, which a link may lead to.

    Raises:
        ConfigError: it is in the source, which it would change.
    """
    try:
        target = pathlib.Path(output).expanduser().resolve()
    except (OSError, RuntimeError) as error:  # links in a circle
        raise ConfigError(f"--output={output} leads nowhere: {error}.") from error
    inside = pathlib.Path(source).expanduser().resolve()
    if target.is_relative_to(inside):
        raise ConfigError(
            f"--output={output} must not be in --source={source}; give a folder beside it."
        )
    return target


def _dtypes(found: weight_sources.Source, dtype: str | None) -> dict[str, np.dtype]:
    """What each parameter will be stored in."""
    mixed = [name for name, stored in found.dtypes.items() if stored is None]
    if mixed and dtype is None:
        raise ConfigError(
            f"--dtype must be given: layers of {', '.join(mixed)} are stored in different dtypes, "
            f"and a parameter has one; it is one of {', '.join(DTYPES)}."
        )
    return {name: np.dtype(dtype or stored) for name, stored in found.dtypes.items()}


class _Cast:
    """Casts values to the dtypes to store in, and counts those that are not finite.

    Attributes:
        non_finite: parameters → values that are not, as the source has them.
    """

    def __init__(self, dtypes: Mapping[str, np.dtype]):
        """To the dtype of each parameter."""
        self._dtypes = dtypes
        self.non_finite: Counter[str] = Counter()

    def __call__(self, name: str, values: np.ndarray) -> np.ndarray:
        """Values of a parameter, cast; every one of them is to come once.

        Raises:
            ConfigError: finite ones are not, in the other dtype.
        """
        dtype = self._dtypes[name]
        with np.errstate(over="ignore"):  # is refused below
            cast = values.astype(dtype, copy=False)
        before = _num_non_finite(values)
        if before:
            self.non_finite[name] += before
        num_made = _num_non_finite(cast) - before if cast is not values else 0
        if num_made:
            raise ConfigError(
                f"--dtype={dtype} cannot hold {num_made} values of {name}: they are finite in "
                f"{values.dtype}, and not in {dtype}; give another dtype, or none."
            )
        return cast


def _num_non_finite(values: np.ndarray) -> int:
    """Counted a few rows at a time: a mask of a whole table would be half as large as the table."""
    step = max(1, _COUNTED // (values.size // len(values)))
    blocks = (values[begin : begin + step] for begin in range(0, len(values), step))
    return sum(block.size - int(np.count_nonzero(np.isfinite(block))) for block in blocks)


# Writing.


def _write_orbax(
    out: output_folder.Output,
    found: weight_sources.Source,
    counterparts: Mapping[str, hf_names.Counterpart],
    dtypes: Mapping[str, np.dtype],
) -> None:
    """Write `params/`, from the beginning unless all of it is there."""
    assert found.read_tensor is not None
    read_tensor = found.read_tensor
    if out.has(weights.PARAMS_FOLDER):
        _logger.info("The parameters are there already, whole.")
        return
    for half in out.path.glob(f"{weights.PARAMS_FOLDER}*"):
        _logger.info("The parameters were not all written; they are begun again.")
        shutil.rmtree(half)
    specs = hf_names.param_specs(found.config)
    cast = _Cast(dtypes)

    def written(name: str) -> orbax_params.Written:
        stored = found.dtypes[name] or _WIDEST

        def read(index: hf_names.Index) -> np.ndarray:
            return cast(name, counterparts[name].read(index, read_tensor, stored))

        return orbax_params.Written(
            shape=specs[name].shape, axes=specs[name].axes, dtype=dtypes[name], read=read
        )

    orbax_params.write(
        out.path / weights.PARAMS_FOLDER, {name: written(name) for name in counterparts}
    )
    out.add([weights.PARAMS_FOLDER], cast.non_finite)


def _write_tensors(
    out: output_folder.Output,
    params: pathlib.Path,
    counterparts: Mapping[str, hf_names.Counterpart],
    dtypes: Mapping[str, np.dtype],
    shards: list[hf_shards.Shard],
) -> None:
    """Write the safetensors files that are not there yet, one after the other."""
    part = orbax_params.StackReader(orbax_params.open_stores(params))
    missing = [shard for shard in shards if not out.has(shard.file)]
    if len(missing) < len(shards):
        num_there = len(shards) - len(missing)
        _logger.info("%d of %d files are there already.", num_there, len(shards))
    for shard in missing:
        cast = _Cast(dtypes)

        def cast_part(name: str, index: tuple[int, ...], cast: _Cast = cast) -> np.ndarray:
            return cast(name, part(name, index))

        hf_shards.write_shard(out.path, shard, hf_shards.tensors_of(shard, counterparts, cast_part))
        out.add([shard.file], cast.non_finite)
        _logger.info("Wrote %s, %s.", shard.file, output_folder.size_text(shard.num_bytes))
    hf_shards.write_index(out.path, shards)
    if len(shards) > 1:
        out.add([hf_folder.INDEX_FILE])


def _for_loaders(
    fields: Mapping[str, Any], config: models.DecoderConfig, dtypes: Mapping[str, np.dtype]
) -> dict[str, Any]:
    """A config.json with the spellings that some loader insists on, beside what it says itself."""
    ours = config.to_hf()
    wanted = {
        "architectures": ours["architectures"],  # by which SGLang finds the model
        # Before transformers 5; elsewhere, or under another name, now.
        "rope_theta": config.rope_theta,
        "rope_scaling": ours.get("rope_scaling"),
        "num_experts": ours.get("num_experts"),
        "torch_dtype": fields.get("dtype") or str(next(iter(dtypes.values()))),
    }
    return dict(fields) | {
        name: value
        for name, value in wanted.items()
        if value is not None and fields.get(name) is None
    }


def _copy(file: pathlib.Path, target: pathlib.Path) -> None:
    target.parent.mkdir(exist_ok=True)
    shutil.copyfile(file, target)
    output_folder.sync(target)


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
        "stamps": found.stamps_of(found.files),
        "carried": found.stamps_of(found.carried),
        "config": found.fields,
    }


def _text(record: Mapping[str, Any], non_finite: Mapping[str, int]) -> str:
    """The record as a table to read, and the parameters with values that are not finite."""
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
    lines += [
        f"not finite: {number} values of {name}, as in the source"
        for name, number in non_finite.items()
    ]
    lines.append(
        f"{record['source']}: {record['num_tensors']} tensors, {record['num_reshaped']} of them "
        "reshaped; none missing, none unexpected"  # or it would have been refused
    )
    return "\n".join(lines) + "\n"
