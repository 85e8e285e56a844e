"""The tensors of a Hugging Face folder: read part by part, written file by file, without torch.

folder = Folder(path)
check(folder, counterparts(config), tie_embeddings=True)      # raises, with all that is wrong
folder.read("model.norm.weight", (slice(0, 8),))

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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from codjax.models import hf_names

DTYPES = {  # of floats, as safetensors spells them; anything else is quantised
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
INDEX_FILE = "model.safetensors.index.json"

_SPELLINGS = {dtype: spelling for spelling, dtype in DTYPES.items()}
_OPEN_BYTES = 64 * 2**20  # what is read through a mapped file stays resident until it is closed
_COMPARED_BYTES = 64 * 2**20
_ALIGNMENT = 8  # of the data behind the header, in bytes
# A mixture's experts, as one tensor a layer: transformers 5 holds them so, and reads both.
_FUSED_GATE_UP, _FUSED_DOWN = ".mlp.experts.gate_up_proj", ".mlp.experts.down_proj"


class Stored(NamedTuple):
    """Where a tensor is."""

    file: pathlib.Path
    name: str  # in the file
    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it
    expert: int | None = None  # index along the first axis of a fused tensor
    first_row: int = 0  # of it


class Folder:
    """Reads the tensors of a folder; owns the files that it has open, until it is dropped.

    Attributes:
        tensors: name → where it is; fused experts are told as the tensors of each expert.
    """

    def __init__(self, folder: pathlib.Path):
        """Look at the headers of all files.

        Raises:
            FileNotFoundError: there are no safetensors, or a part is missing.
            ValueError: a file that is damaged.
        """
        self._open: dict[pathlib.Path, Any] = {}
        self._num_bytes = 0
        self.tensors: dict[str, Stored] = {}
        for file in _files(folder):
            handle = self._handle(file)
            names = handle.keys()
            for name in names:
                part = handle.get_slice(name)
                stored = Stored(file, name, tuple(part.get_shape()), part.get_dtype())
                self.tensors |= _each_expert(name, stored)

    def read(self, name: str, index: hf_names.Index) -> np.ndarray:
        """A part of a tensor, in the dtype it has."""
        stored = self.tensors[name]
        if self._num_bytes > _OPEN_BYTES:
            self._open.clear()
            self._num_bytes = 0
        part = self._handle(stored.file).get_slice(stored.name)
        if stored.expert is None:
            array = part[index]
        else:
            rows, columns = index
            rows = slice(stored.first_row + rows.start, stored.first_row + rows.stop)
            array = part[stored.expert : stored.expert + 1, rows, columns][0]
        # Whole rows: a part of each of them touches every page that they lie on.
        self._num_bytes += len(array) * math.prod(stored.shape[1:]) * array.itemsize
        return array

    def _handle(self, file: pathlib.Path) -> Any:
        if file not in self._open:
            try:
                self._open[file] = safetensors.safe_open(file, framework="numpy")
            except safetensors.SafetensorError as error:
                raise ValueError(
                    f"{file} is no whole safetensors file ({error}); copy it again."
                ) from error
        return self._open[file]


def check(
    folder: Folder,
    counterparts: Mapping[str, hf_names.Counterpart],
    *,
    path: pathlib.Path,
    tie_embeddings: bool,
) -> list[str]:
    """Raise unless the folder has every tensor, no other, each a float and of the right shape.

    Args:
        folder: opened.
        counterparts: of the parameters that its config.json describes.
        path: of the folder, for messages.
        tie_embeddings: whether the token table is the output table too; some published folders
            then store it twice.

    Returns:
        Names of tensors that are copies of another and not needed.

    Raises:
        ValueError: all that is wrong, in one line.
    """
    wanted = {
        name: counterpart.tensor_shape
        for counterpart in counterparts.values()
        for name, _ in counterpart.tensors()
    }
    found = {name: stored.shape for name, stored in folder.tensors.items()}
    copies = []
    if tie_embeddings and {hf_names.TABLE, hf_names.OUTPUT} <= set(found):
        copies.append(hf_names.OUTPUT)
        del found[hf_names.OUTPUT]
        if not _are_equal(folder, hf_names.TABLE, hf_names.OUTPUT):
            raise ValueError(
                f"{path}: config.json ties the embeddings, but {hf_names.OUTPUT} is not equal to "
                f"{hf_names.TABLE}; set tie_word_embeddings to what the weights are."
            )
    problems = hf_names.mismatches(found, wanted)
    by_dtype: dict[str, list[str]] = {}
    for name in found:
        by_dtype.setdefault(folder.tensors[name].dtype, []).append(name)
    for dtype in sorted(by_dtype.keys() - DTYPES.keys()):
        problems += [
            f"{name} is {dtype}, not a float: quantised weights are not supported"
            for name in hf_names.collapsed(by_dtype[dtype])
        ]
    if problems:
        raise ValueError(
            f"{path}: the tensors are not those of its config.json: {'; '.join(problems)}."
        )
    return copies


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
        return [Shard("model.safetensors", groups[0])]
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
    """Say which file holds which tensor, where there is more than one file."""
    if len(shards) == 1:
        (folder / INDEX_FILE).unlink(missing_ok=True)  # of an earlier export: it would be read
        return
    layouts = [layout for shard in shards for layout in shard.tensors.values()]
    index = {
        "metadata": {"total_size": sum(layout.num_bytes for layout in layouts)},
        "weight_map": {name: shard.file for shard in shards for name in sorted(shard.tensors)},
    }
    write_text(folder / INDEX_FILE, json.dumps(index, indent=2, sort_keys=True) + "\n")


def write_text(path: pathlib.Path, text: str) -> None:
    """Write a file in one step, on the disk when this returns."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def existing(file: pathlib.Path) -> pathlib.Path:
    """The file, which must be there."""
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} does not exist; give a Hugging Face folder on this machine with config.json "
            "and model.safetensors (or its index and parts)."
        )
    return file


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


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    index = folder / INDEX_FILE
    if not index.is_file():
        return [existing(folder / "model.safetensors")]
    names = set(json.loads(index.read_text())["weight_map"].values())
    return [existing(folder / name) for name in sorted(names)]


def _each_expert(name: str, stored: Stored) -> dict[str, Stored]:
    """The tensor, or the ones that a fused tensor `[E 2F D]` or `[E D F]` is made of."""
    for suffix, tails in (
        (_FUSED_GATE_UP, ("gate_proj", "up_proj")),
        (_FUSED_DOWN, ("down_proj",)),
    ):
        if name.endswith(suffix) and len(stored.shape) == 3:
            num_experts, num_rows, num_columns = stored.shape
            num_rows //= len(tails)
            return {
                f"{name.removesuffix(suffix)}.mlp.experts.{expert}.{tail}.weight": stored._replace(
                    shape=(num_rows, num_columns), expert=expert, first_row=i * num_rows
                )
                for expert in range(num_experts)
                for i, tail in enumerate(tails)
            }
    return {name: stored}


def _are_equal(folder: Folder, one: str, other: str) -> bool:
    """Whether two tables are, compared a few rows at a time."""
    shape = folder.tensors[one].shape
    if shape != folder.tensors[other].shape:
        return False

    def blocks(name: str) -> Iterator[np.ndarray]:
        step = max(1, _COMPARED_BYTES // (8 * math.prod(shape[1:])))
        for begin in range(0, shape[0], step):
            rows = slice(begin, min(begin + step, shape[0]))
            yield folder.read(name, (rows, *(slice(0, size) for size in shape[1:])))

    return all(map(np.array_equal, blocks(one), blocks(other)))
