"""The tensors of a Hugging Face folder, read part by part, without torch.

folder = Folder(path)
check(folder, counterparts(config), path=path, tie_embeddings=True)     # raises, with all problems
folder.read("model.norm.weight", (slice(0, 8),))
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from codjax.models import hf_names, json_files

DTYPES = {  # of floats, as safetensors spells them; anything else is quantised
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_OPEN_BYTES = 64 * 2**20  # what is read through a mapped file stays resident until it is closed
_COMPARED_BYTES = 64 * 2**20
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
            ValueError: a file that is damaged, or a tensor that is there twice.
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
                self._add(_each_expert(name, stored))

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

    def _add(self, tensors: Mapping[str, Stored]) -> None:
        """Take note of tensors, which must be new."""
        for name, stored in tensors.items():
            if name in self.tensors:
                other = self.tensors[name]
                raise ValueError(
                    f"{name} is stored twice: as {other.name} in {other.file} and as "
                    f"{stored.name} in {stored.file}; remove the one that is not meant."
                )
            self.tensors[name] = stored

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


def existing(file: pathlib.Path) -> pathlib.Path:
    """The file, which must be there."""
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} does not exist; give a Hugging Face folder on this machine with config.json "
            "and model.safetensors (or its index and parts)."
        )
    return file


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    index = folder / INDEX_FILE
    if not index.is_file():
        return [existing(folder / SINGLE_FILE)]
    weight_map = json_files.member(json_files.read_object(index), "weight_map", dict, path=index)
    for name in weight_map.values():
        if not isinstance(name, str) or name in ("", "..") or pathlib.Path(name).name != name:
            raise ValueError(
                f"{index}: weight_map must name files in the folder itself; it names {name!r}."
            )
    names = set(weight_map.values())
    if (folder / SINGLE_FILE).is_file() and names != {SINGLE_FILE}:
        raise ValueError(
            f"{folder} has both {SINGLE_FILE}, which transformers reads, and {INDEX_FILE}, which "
            "names other files; remove the one that is not meant."
        )
    return [existing(folder / name) for name in sorted(names)]


def _each_expert(name: str, stored: Stored) -> dict[str, Stored]:
    """The tensor, or the ones that a fused tensor `[E 2F D]` or `[E D F]` is made of."""
    for suffix, tails in (
        (_FUSED_GATE_UP, ("gate_proj", "up_proj")),
        (_FUSED_DOWN, ("down_proj",)),
    ):
        if name.endswith(suffix) and len(stored.shape) == 3:
            num_experts, num_rows, num_columns = stored.shape
            if num_rows % len(tails):
                raise ValueError(
                    f"{stored.file}: {name} must have an even number of rows, half of them for "
                    f"each of {' and '.join(tails)}; it has {num_rows}."
                )
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
