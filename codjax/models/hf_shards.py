"""Safetensors files, planned and written one tensor at a time, without torch.

shards = plan_shards(counterparts, dtypes, max_bytes=5 * 10**9)
for shard in shards:
    write_shard(path, shard, tensors_of(shard, counterparts, part))     # one after the other
write_index(path, shards)
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from codjax.models import hf_folder, hf_names, json_files

_SPELLINGS = {dtype: spelling for spelling, dtype in hf_folder.DTYPES.items()}
_ALIGNMENT = 8  # of the data behind the header, in bytes
_OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")  # files that we, or transformers, write


class Layout(NamedTuple):
    """A tensor before it has values."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


class Shard(NamedTuple):
    """A file that is to be written."""

    file: str
    tensors: dict[str, Layout]

    @property
    def num_bytes(self) -> int:
        """Of the file."""
        return len(_header(self)) + sum(layout.num_bytes for layout in self.tensors.values())


def plan_shards(
    counterparts: Mapping[str, hf_names.Counterpart],
    dtypes: Mapping[str, np.dtype],
    *,
    max_bytes: int,
) -> list[Shard]:
    """The files for these parameters, each with as many tensors as fit, and one at least.

    The tensors of a parameter stand together, since a stacked one may be stored as one piece that
    is better read once.

    Args:
        counterparts: of every parameter.
        dtypes: to write each parameter's tensors in.
        max_bytes: of the values in a file.
    """
    groups: list[dict[str, Layout]] = [{}]
    size = 0
    # Wide dtypes first, so that every tensor lies at a multiple of its own item size.
    for param in sorted(counterparts, key=lambda name: -dtypes[name].itemsize):
        layout = Layout(dtypes[param], counterparts[param].tensor_shape)
        for name, _ in counterparts[param].tensors():
            if groups[-1] and size + layout.num_bytes > max_bytes:
                groups.append({})
                size = 0
            groups[-1][name] = layout
            size += layout.num_bytes
    if len(groups) == 1:
        return [Shard(hf_folder.SINGLE_FILE, groups[0])]
    files = (f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups)))
    return [Shard(file, group) for file, group in zip(files, groups, strict=True)]


def tensors_of(
    shard: Shard,
    counterparts: Mapping[str, hf_names.Counterpart],
    part: Callable[[str, tuple[int, ...]], np.ndarray],
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a file, made one at a time.

    Args:
        shard: of `plan_shards`.
        counterparts: of every parameter.
        part: the values of a parameter at an index of its stacked axes.
    """
    where = {
        name: (param, index)
        for param, counterpart in counterparts.items()
        for name, index in counterpart.tensors()
    }
    for name, layout in shard.tensors.items():
        param, index = where[name]
        yield (
            name,
            counterparts[param].to_tensor(part(param, index).astype(layout.dtype, copy=False)),
        )


def write_shard(
    folder: pathlib.Path, shard: Shard, arrays: Iterable[tuple[str, np.ndarray]]
) -> None:
    """Write one file; it bears its name only when all of it is on the disk.

    Args:
        folder: to write to.
        shard: what goes in.
        arrays: name and values of its tensors, in its order; made one at a time.
    """
    partial = folder / f"{shard.file}.partial"
    with partial.open("wb") as file:
        file.write(_header(shard))
        for (name, layout), (found, array) in zip(shard.tensors.items(), arrays, strict=True):
            if (found, array.dtype, array.shape) != (name, *layout):
                raise AssertionError(f"{found} {array.dtype} {array.shape} in place of {name}")
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / shard.file)


def write_index(folder: pathlib.Path, shards: Sequence[Shard]) -> None:
    """Say which file holds which tensor, where there is more than one file.

    Files that an earlier export to the folder left are removed: of a single file and an index,
    some programs read the one and some the other.
    """
    index_file = folder / hf_folder.INDEX_FILE
    if len(shards) == 1:
        index_file.unlink(missing_ok=True)
    else:
        layouts = [layout for shard in shards for layout in shard.tensors.values()]
        files = {name: shard.file for shard in shards for name in shard.tensors}
        index = {
            "metadata": {"total_size": sum(layout.num_bytes for layout in layouts)},
            "weight_map": dict(sorted(files.items())),
        }
        json_files.write(index_file, index)
    written = {shard.file for shard in shards}
    for file in folder.iterdir():
        if _OURS.fullmatch(file.name) and file.name not in written:
            file.unlink()


def _header(shard: Shard) -> bytes:
    """What a safetensors file begins with: the header's length, then the header as JSON."""
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses others
    begin = 0
    for name, layout in shard.tensors.items():
        end = begin + layout.num_bytes
        fields[name] = {
            "dtype": _SPELLINGS[layout.dtype],
            "shape": list(layout.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
