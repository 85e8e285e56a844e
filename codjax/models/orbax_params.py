"""Parameters in an Orbax checkpoint, written and read a part at a time.

    write(folder / "params", {"embedding": Written(…), "layers.query": …})
    stores = open_stores(folder / "params")
    stores["embedding"].read((slice(10, 20),))
    StackReader(stores)("layers.query", (3,))           # of layer 3

The tree is that of `TrainState.params`: parameters of a run and converted ones are read alike, and
Orbax restores either. On disk, such a checkpoint is an OCDBT database of zarr arrays with dotted
names; TensorStore reads them here, since Orbax's own restore keeps all arrays in flight at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import math
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from orbax.checkpoint import type_handlers

from codjax.models import hf_names

METADATA_FILE = "_METADATA"  # of Orbax; a folder without it holds no checkpoint

_CHUNK_BYTES = 1 * 2**20  # is read as a whole; small, as every host wants another part
_PIECE_BYTES = 32 * 2**20  # what is in memory at once, when writing
_STACKED = ("layers", "experts")
_OS_ERROR = re.compile(r"os_error_code='(\d+)'")  # how TensorStore tells that of the system


class DamagedError(ValueError):
    """A checkpoint cannot be read; the message is one line."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Written:
    """A parameter that is made while it is written.

    Attributes:
        shape: of the whole.
        axes: logical axes; layers and experts get chunks of their own.
        dtype: to store in.
        read: makes a part of it.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    dtype: np.dtype
    read: Callable[[hf_names.Index], np.ndarray]

    @property
    def size(self) -> int:
        """Number of values; Orbax asks for it."""
        return math.prod(self.shape)

    @property
    def chunks(self) -> tuple[int, ...]:
        """Shape of what is compressed together."""
        chunks = [
            1 if axis in _STACKED else size
            for axis, size in zip(self.axes, self.shape, strict=True)
        ]
        while math.prod(chunks) * self.dtype.itemsize > _CHUNK_BYTES:
            longest = chunks.index(max(chunks))
            chunks[longest] = -(-chunks[longest] // 2)
        return tuple(chunks)

    def pieces(self) -> Iterator[hf_names.Index]:
        """Parts that are small enough to be in memory, made of whole chunks."""
        chunks = self.chunks
        num_stacked = sum(axis == "layers" for axis in self.axes)
        cut = num_stacked  # the axis that is cut into blocks; those behind it stay whole
        rest = math.prod(self.shape[cut + 1 :]) * self.dtype.itemsize * chunks[cut]
        block = max(1, _PIECE_BYTES // rest) * chunks[cut]
        for place in np.ndindex(self.shape[:num_stacked]):
            for begin in range(0, self.shape[cut], block):
                yield (
                    *(slice(i, i + 1) for i in place),
                    slice(begin, min(begin + block, self.shape[cut])),
                    *(slice(0, size) for size in self.shape[cut + 1 :]),
                )


def write(folder: pathlib.Path, params: Mapping[str, Written]) -> None:
    """Write a checkpoint of parameters, one piece in memory at a time; the folder appears last.

    Args:
        folder: that it will be; must not exist.
        params: by dotted name.

    Raises:
        OSError: the disk is full, or fails.
        Exception: whatever `Written.read` raises.
    """
    writer = _PieceByPiece()
    registry = type_handlers.create_type_handler_registry((Written, writer))
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    try:
        with _quietly(), ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(folder.resolve(), args=ocp.args.PyTreeSave(nested(params)))
    except ValueError as error:
        raise _of_system(writer.failure or error, folder) from error
    if writer.failure is not None:
        shutil.rmtree(folder)
        raise _of_system(writer.failure, folder)


def check(folder: pathlib.Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise unless the checkpoint has these parameters, no other, and each of its shape.

    Args:
        folder: of the checkpoint.
        shapes: wanted, by dotted name.

    Raises:
        ValueError: all that is wrong, in one line.
    """
    found = {name: stored.shape for name, stored in open_stores(folder).items()}
    problems = hf_names.mismatches(found, shapes)
    if problems:
        raise ValueError(
            f"{folder}: the parameters are not those of the config: {'; '.join(problems)}."
        )


@dataclasses.dataclass(frozen=True)
class Stored:
    """An array of a checkpoint.

    Attributes:
        name: dotted.
        folder: of the checkpoint.
        array: not read yet.
    """

    name: str
    folder: pathlib.Path
    array: ts.TensorStore

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        return self.array.shape

    @property
    def dtype(self) -> np.dtype:
        """That it is stored in."""
        return self.array.dtype.numpy_dtype

    @property
    def chunks(self) -> tuple[int, ...]:
        """Shape of what is read as a whole."""
        return self.array.chunk_layout.read_chunk.shape  # type: ignore[return-value]

    def read(self, index: hf_names.Index = ()) -> np.ndarray:
        """A part of it; all of it without an index."""
        with _named(f"{self.name} of {self.folder}"):
            return (self.array[index] if index else self.array).read().result()


def open_stores(folder: pathlib.Path) -> dict[str, Stored]:
    """The arrays of a checkpoint by dotted name, to be read by index.

    Raises:
        DamagedError: it cannot be read.
    """
    kvstore = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder.resolve()}/"}}
    with _named(str(folder)):
        keys = [key.decode() for key in ts.KvStore.open(kvstore).result().list().result()]
        names = sorted(key.removesuffix("/.zarray") for key in keys if key.endswith("/.zarray"))
        opened = {
            name: ts.open({"driver": "zarr", "kvstore": {**kvstore, "path": f"{name}/"}}, open=True)
            for name in names
        }
        return {name: Stored(name, folder, future.result()) for name, future in opened.items()}


class StackReader:
    """Reads parameters at an index of their stacked axes; what is stored in one piece, once.

    Holds the piece that it read last, which is large where layers are not stored apart.
    """

    def __init__(self, stores: Mapping[str, Stored]):
        """Read from these arrays."""
        self._stores = stores
        self._place: tuple[Any, ...] = ()
        self._piece = np.empty(0)

    def __call__(self, name: str, index: tuple[int, ...]) -> np.ndarray:
        """The values of a parameter at this index of the axes that it begins with."""
        store = self._stores[name]
        extents = store.chunks[: len(index)]
        first = tuple(i - i % extent for i, extent in zip(index, extents, strict=True))
        if self._place != (name, first):
            ends = zip(first, extents, store.shape[: len(index)], strict=True)
            block = tuple(slice(begin, min(begin + size, end)) for begin, size, end in ends)
            self._piece = np.empty(0)  # not two at once
            self._piece = store.read(block)
            self._place = (name, first)
        return self._piece[tuple(i - begin for i, begin in zip(index, first, strict=True))]


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """A tree from dotted names, as `nnx.to_pure_dict` has it."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = value
    return tree


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    """TensorStore's errors of reading, with what could not be read."""
    try:
        yield
    except ValueError as error:
        # The message may end in the whole of its specification.
        reason = " ".join(str(error).split(" [tensorstore_spec=", maxsplit=1)[0].split())
        raise DamagedError(
            f"{what} cannot be read, so the checkpoint is damaged; copy it again ({reason})."
        ) from error


def _of_system(error: Exception, folder: pathlib.Path) -> Exception:
    """The error of the system that TensorStore tells of in words; any other as it is."""
    code = _OS_ERROR.search(str(error)) if isinstance(error, ValueError) else None
    return error if code is None else OSError(int(code[1]), os.strerror(int(code[1])), str(folder))


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without Orbax's log of errors, each with its traceback: it raises them too."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


class _PieceByPiece(type_handlers.NumpyHandler):
    """Writes `Written` parameters, all of them through one piece of memory.

    Attributes:
        failure: what went wrong first; nothing is written after it. Raised here, it would leave the
            other parameters' writes hanging in an event loop that Orbax has closed.
    """

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)
        self._turn = asyncio.Lock()  # Orbax begins to write all arrays at once
        self.failure: Exception | None = None

    def typestr(self) -> str:
        return "jax.Array"  # what the trainer's own checkpoints say

    async def _open_and_write(
        self, value: Written, tspec: dict[str, Any], ts_context: ts.Context
    ) -> None:
        tspec["metadata"]["chunks"] = list(value.chunks)
        async with self._turn:
            if self.failure is not None:
                return
            try:
                store = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
                for index in value.pieces():
                    piece = value.read(index)
                    await store[index].write(piece, can_reference_source_data_indefinitely=True)
            except Exception as error:  # `write` raises it
                self.failure = error
