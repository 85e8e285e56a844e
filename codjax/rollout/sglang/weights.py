"""Weights on their way to servers: checked tensor by tensor, and staged for one of two routes.

    staged = stage_folder(weights, folder=…)        # a directory, for the disk route
    staged = stage_payloads(weights)                # request bodies, for the bytes route

SGLang believes what it is given: missing and unknown names and nan are "Succeeded", and a tensor of
a wrong shape kills the server. So nothing is staged that was not checked, and no server is called
before all of it is staged.

Both functions block, on the devices and on the disk. They belong to the learner's thread; the event
loop gets what they return.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import safetensors
import safetensors.numpy

from codjax.checks import ServerError, WriteError
from codjax.rollout.sglang import tensor_bytes

Layout: TypeAlias = tuple[np.dtype, tuple[int, ...]]  # of a tensor: dtype, shape

_TABLE, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
_CHECKED = 2**22  # values whose finiteness is looked at together; they stay in the cache


class WeightsError(ServerError):
    """Weights that must not be served, or not by this route; no server was called."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe:
    """What a server must answer if it has the weights.

    Attributes:
        tokens: int32 `[n]`, n >= 2.
        logprobs: float32 `[n-1]`, of each next token at temperature 1, by the learner.
    """

    tokens: np.ndarray
    logprobs: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class NamedWeights:
    """One version of the policy, as the learner gives it.

    Attributes:
        run_id: of the run; with the version it is the name on the wire.
        policy_version: number of updates behind the weights.
        layouts: dtype and shape of every tensor of the model by its Hugging Face name, in order.
        tensors: name and values of each, in the same order; read once.
        config: what `config.json` is to say, with both spellings of the rotary settings.
        files: that a server needs too when it starts from the folder, such as the tokenizer's.
        probe: to verify the servers with.
    """

    run_id: str
    policy_version: int
    layouts: Mapping[str, Layout]
    tensors: Iterable[tuple[str, np.ndarray]]
    config: Mapping[str, Any]
    files: tuple[pathlib.Path, ...] = ()
    probe: Probe

    @property
    def version(self) -> str:
        """`weight_version` of the servers that have them."""
        return f"{self.run_id}-{self.policy_version}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Staged:
    """Weights that are ready to be pushed, as often as it takes.

    Attributes:
        run_id: as in `NamedWeights`.
        version: `weight_version` of the servers that have them.
        num_bytes: of the values.
        probe: to verify the servers with.
        folder: that servers load; None by the bytes route.
        payloads: request bodies; empty by the disk route.
    """

    run_id: str
    version: str
    num_bytes: int
    probe: Probe
    folder: pathlib.Path | None = None
    payloads: tuple[str, ...] = dataclasses.field(default=(), repr=False)


def stage_folder(
    weights: NamedWeights, *, folder: pathlib.Path, max_shard_bytes: int = 10**9
) -> Staged:
    """Write `weights-VERSION` into a folder; it has this name when all of it is on the disk.

    Args:
        weights: what to write.
        folder: made if it is not there; /dev/shm where the servers are on this machine.
        max_shard_bytes: of a file; so much is in memory at once, twice.

    Raises:
        WeightsError: the weights must not be served; nothing is left of them.
        WriteError: the disk is full, or fails; nothing is left of them.
    """
    shards = _grouped(weights.layouts, max_shard_bytes)
    num_bytes = sum(map(num_bytes_of, weights.layouts.values()))
    target = folder / f"weights-{weights.version}"
    partial = folder / f"{target.name}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        _check_room(folder, num_bytes)
        partial.mkdir()
        arrays = checked(weights)
        for names, file in zip(shards, _shard_names(len(shards)), strict=True):
            shard = dict(itertools.islice(arrays, len(names)))
            safetensors.numpy.save_file(shard, partial / file, {"format": "pt"})
        next(arrays, None)  # so that the end is checked too
        _write_small_files(partial, weights, shards, num_bytes)
        for path in (*partial.iterdir(), partial):
            _sync(path)
        _put(partial, target)
    except (OSError, safetensors.SafetensorError) as error:
        raise WriteError(
            f"the weights {weights.version} ({num_bytes / 1e9:.2f} GB) cannot be written to "
            f"{folder}: {error}; make room there, or give another folder; the servers keep the "
            "weights that they have."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # after a success it is gone already
    return Staged(
        run_id=weights.run_id,
        version=weights.version,
        num_bytes=num_bytes,
        probe=weights.probe,
        folder=target,
    )


def stage_payloads(weights: NamedWeights, *, bucket_bytes: int = 2**28) -> Staged:
    """Make the request bodies of the bytes route, which stay in memory: 4/3 of the weights.

    Args:
        weights: what to send.
        bucket_bytes: of the values in one request, unless a single tensor is larger.

    Raises:
        WeightsError: the weights must not be served.
    """
    arrays = checked(weights)
    payloads = tuple(
        tensor_bytes.payload(list(itertools.islice(arrays, len(names))))
        for names in _grouped(weights.layouts, bucket_bytes)
    )
    next(arrays, None)  # so that the end is checked too
    return Staged(
        run_id=weights.run_id,
        version=weights.version,
        num_bytes=sum(map(num_bytes_of, weights.layouts.values())),
        probe=weights.probe,
        payloads=payloads,
    )


def checked(weights: NamedWeights) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors, each checked before it comes; the end comes when none is missing.

    Raises:
        WeightsError: a name, shape, dtype or value that a server must not get.
    """
    _check_whole(weights)
    found = iter(weights.tensors)
    for name, (dtype, shape) in weights.layouts.items():
        got, array = next(found, (None, np.empty(0)))
        if got is None:
            raise WeightsError(f"{name} and what follows it are missing of {weights.version}.")
        if got != name:
            raise WeightsError(f"{got} came where {name} was expected in {weights.version}.")
        if (array.dtype, array.shape) != (dtype, tuple(shape)):
            raise WeightsError(
                f"{name} of {weights.version} must be {dtype} of shape {tuple(shape)}, as the "
                f"model has it; got {array.dtype} of shape {array.shape}."
            )
        num_bad = _num_non_finite(array)
        if num_bad:
            raise WeightsError(
                f"{name} of {weights.version} must be finite; {num_bad} of {array.size} values "
                f"are not, in {dtype}."
            )
        yield name, array
    extra, _ = next(found, (None, None))
    if extra is not None:
        raise WeightsError(f"{extra} of {weights.version} is no tensor of the model.")


def num_bytes_of(layout: Layout) -> int:
    """Of the values of a tensor."""
    dtype, shape = layout
    return math.prod(shape) * dtype.itemsize


def _check_whole(weights: NamedWeights) -> None:
    """What can be said before the first tensor is read."""
    is_tied = bool(weights.config["tie_word_embeddings"])
    if is_tied == (_OUTPUT in weights.layouts):
        raise WeightsError(
            f"tie_word_embeddings is {is_tied}, so {_OUTPUT} must {'not ' * is_tied}be sent: a "
            f"server takes it from {_TABLE if is_tied else 'there alone'}."
        )
    for name, (dtype, _) in weights.layouts.items():
        if dtype.name not in tensor_bytes.STORAGES:
            allowed = ", ".join(tensor_bytes.STORAGES)
            raise WeightsError(f"{name} must be one of {allowed}; it is {dtype}.")
    tokens, logprobs = weights.probe.tokens, weights.probe.logprobs
    vocab_size = weights.config["vocab_size"]
    if len(tokens) < 2 or tokens.min() < 0 or tokens.max() >= vocab_size:
        raise WeightsError(  # an id outside kills the server
            f"the probe must be at least 2 tokens in [0, {vocab_size}); got {tokens.tolist()}."
        )
    if logprobs.shape != (len(tokens) - 1,) or not np.isfinite(logprobs).all():
        raise WeightsError(
            f"the probe must have {len(tokens) - 1} finite log-probs; got {logprobs.tolist()}."
        )


def _num_non_finite(array: np.ndarray) -> int:
    flat = array.reshape(-1)
    blocks = (flat[begin : begin + _CHECKED] for begin in range(0, flat.size, _CHECKED))
    return sum(block.size - int(np.count_nonzero(np.isfinite(block))) for block in blocks)


def _grouped(layouts: Mapping[str, Layout], max_bytes: int) -> list[list[str]]:
    """Names in order, in groups of at most so many bytes, or of one tensor."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, layout in layouts.items():
        num_bytes = num_bytes_of(layout)
        if groups[-1] and size + num_bytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += num_bytes
    return groups


# The directory.


def _shard_names(num_shards: int) -> list[str]:
    """As transformers calls them."""
    if num_shards == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05d}-of-{num_shards:05d}.safetensors" for i in range(num_shards)]


def _write_small_files(
    folder: pathlib.Path, weights: NamedWeights, shards: list[list[str]], num_bytes: int
) -> None:
    (folder / "config.json").write_text(json.dumps(dict(weights.config), indent=2) + "\n")
    if len(shards) > 1:
        files = zip(_shard_names(len(shards)), shards, strict=True)
        where = {name: file for file, names in files for name in names}
        index = {"metadata": {"total_size": num_bytes}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    for file in weights.files:
        shutil.copyfile(file, folder / file.name)


def _check_room(folder: pathlib.Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OSError(f"{free / 1e9:.2f} GB are free")


def _put(partial: pathlib.Path, target: pathlib.Path) -> None:
    """Give a directory its name; never a file in place of another that a server may have open."""
    if target.exists():  # of this run before it was resumed
        old = target.with_name(f"{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        target.replace(old)
        partial.replace(target)
        shutil.rmtree(old)
    else:
        partial.replace(target)
    _sync(target.parent)


def _sync(path: pathlib.Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
