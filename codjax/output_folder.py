"""The folder that `codjax convert` writes: whole, or not there.

    if not is_there(target, record):
        with begin(target, record, num_bytes) as output:        # TARGET.partial
            if not output.has("model.safetensors"):
                …                                               # write it to output.path
                output.add(["model.safetensors"], {"embedding": 2})

`conversion.json` in it says what it is the conversion of (the record), which of its files are
whole, with their sizes, and which parameters have values that are not finite.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import pathlib
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from codjax.checks import ConfigError, WriteError
from codjax.models import json_files

RECORD_FILE = "conversion.json"
_LOCK_FILE = ".lock"
_PROGRESS = ("files", "non_finite")  # of conversion.json, beside the record
# Of the record: what is written again in any case, as it takes no time.
_SMALL = ("config", "carried")
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}

_logger = logging.getLogger(__name__)


class Output:
    """What is being written; made, finished and locked by `begin`.

    Attributes:
        path: of the folder.
        files: relative names of files that are whole → bytes.
        non_finite: parameters → how many of their values in these files are not finite.
    """

    def __init__(self, path: pathlib.Path, record: Mapping[str, Any], progress: Mapping[str, Any]):
        """Go on with what `progress` of an earlier conversion.json says, as far as it is there."""
        self.path = path
        self._record = record
        self.files: dict[str, int] = {
            name: size
            for name, size in progress.get("files", {}).items()
            if _size_of(path / name) == size
        }
        self.non_finite: Counter[str] = Counter(progress.get("non_finite", {}))

    def has(self, name: str) -> bool:
        """Whether a file, or a folder with all that was in it, is whole."""
        return name in self.files or any(file.startswith(f"{name}/") for file in self.files)

    def add(self, names: Iterable[str], non_finite: Mapping[str, int] | None = None) -> None:
        """Take note of files, or of folders with all that is in them, that are on the disk."""
        for name in names:
            path = self.path / name
            found = sorted(path.rglob("*")) if path.is_dir() else [path]
            for file in found:
                if file.is_file():
                    self.files[str(file.relative_to(self.path))] = file.stat().st_size
        self.non_finite.update(non_finite or {})
        self.write_record()

    def write_record(self) -> None:
        """Write conversion.json."""
        progress = {"files": self.files, "non_finite": dict(self.non_finite)}
        json_files.write(self.path / RECORD_FILE, {**self._record, **progress})

    def remove_others(self) -> None:
        """Remove what is left of an earlier beginning and is no part of the conversion."""
        for path in self.path.iterdir():
            if path.is_dir() and not self.has(path.name):
                shutil.rmtree(path)
        keep = {*self.files, RECORD_FILE, _LOCK_FILE}
        for file in self.path.rglob("*"):
            if file.is_file() and str(file.relative_to(self.path)) not in keep:
                file.unlink()


def is_there(target: pathlib.Path, record: Mapping[str, Any]) -> bool:
    """Whether the output is there, whole, of the same source as it is now.

    Raises:
        ConfigError: something else is, or a part of it is gone.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    found = _read_record(target)
    if found is None:
        raise ConfigError(
            f"--output={target} must not exist: another thing is there; remove it, or give "
            "another folder."
        )
    other = [key for key in record if found.get(key) != _as_json(record[key])]
    if other:
        raise ConfigError(
            f"--output={target} must not exist: it is the conversion of something else, or of an "
            f"earlier state ({', '.join(other)} differ; see its {RECORD_FILE}); remove it, or "
            "give another folder."
        )
    for name, size in found["files"].items():
        there = _size_of(target / name)
        if there != size:
            state = "is gone" if there is None else f"has {there} bytes, not {size}"
            raise ConfigError(
                f"--output={target} is this conversion, but {name} {state}; remove the folder, "
                "and convert again."
            )
    return True


@contextlib.contextmanager
def begin(target: pathlib.Path, record: Mapping[str, Any], num_bytes: int) -> Iterator[Output]:
    """The folder to write to, with what an interrupted conversion left; at the end, the output.

    Args:
        target: the output, which is not there.
        record: what it will be, as JSON values.
        num_bytes: that the weights will take.

    Raises:
        ConfigError: it cannot be written to, is not ours, or the disk is too small.
        WriteError: the disk fails meanwhile; what was written is kept.
    """
    folder = target.with_name(f"{target.name}.partial")
    _check_room(folder, num_bytes)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / _LOCK_FILE).open("w")
    except OSError as error:
        raise ConfigError(f"--output={target} cannot be written: {error.strerror}.") from error
    with lock:
        _lock(lock, folder)
        try:
            output = Output(folder, record, _take_over(folder, record))
            output.write_record()
            yield output
            output.remove_others()
            (folder / _LOCK_FILE).unlink()
            sync(folder)
            folder.replace(target)
            sync(target.parent)
        except OSError as error:
            raise WriteError(
                f"{error.filename or folder}: {error.strerror or error}; mend that, and the same "
                f"command goes on with what is in {folder}."
            ) from error


def num_bytes_of(text: str, flag: str) -> int:
    """Bytes of a size as "5GB"; powers of ten, as transformers has them."""
    number, unit = text[:-2], text[-2:].upper()
    is_number = number.isascii() and number.isdecimal() and int(number) > 0
    if unit not in _UNITS or not is_number:
        raise ConfigError(
            f"{flag} must be a whole number with {', '.join(_UNITS)}, as 5GB; got {text!r}."
        )
    return int(number) * _UNITS[unit]


def size_text(num_bytes: int) -> str:
    """Bytes for people."""
    for unit, size in reversed(_UNITS.items()):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes} bytes"


def sync(path: pathlib.Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock(lock: Any, folder: pathlib.Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(f"{folder} is being written by another codjax convert.") from error
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be locked ({error.strerror}), so that two conversions could write "
            "it at once; give an --output on another disk."
        ) from error


def _check_room(folder: pathlib.Path, num_bytes: int) -> None:
    """Raise if the folder is not ours, or its disk has no room for so many bytes."""
    files = list(folder.rglob("*"))
    beginning = {_LOCK_FILE, f"{RECORD_FILE}.partial"}  # all there is before the first record
    if {file.name for file in files} - beginning and _read_record(folder) is None:
        raise ConfigError(f"{folder} is in the way, and not of codjax convert; remove it.")
    num_bytes -= sum(_size_of(file) or 0 for file in files)
    disk = next(parent for parent in folder.parents if parent.is_dir())
    free = shutil.disk_usage(disk).free
    if num_bytes > free:
        raise ConfigError(
            f"--output needs {size_text(num_bytes)}, and the disk of {disk} has {size_text(free)} "
            "left; make room, or give a folder on another disk."
        )


def _take_over(folder: pathlib.Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Keep what a conversion of the same weights left in the folder, and remove all else.

    Returns:
        What is whole of it, as conversion.json says.
    """
    left = [path for path in folder.iterdir() if path.name != _LOCK_FILE]
    found = _read_record(folder) or {}
    heavy = [key for key in record if key not in _SMALL]
    if left and all(found.get(key) == _as_json(record[key]) for key in heavy):
        _logger.info("Going on with the interrupted conversion in %s.", folder)
        return {key: found[key] for key in _PROGRESS}
    if left:
        _logger.info("%s was the beginning of another conversion; it is removed.", folder)
    # The record goes last: without it, what is left would be nobody's.
    for path in sorted(left, key=lambda path: path.name == RECORD_FILE):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return {}


def _read_record(folder: pathlib.Path) -> dict[str, Any] | None:
    """What the folder is the conversion of; None where it does not say."""
    try:
        found = json_files.read_object(folder / RECORD_FILE)
    except ValueError:
        return None
    is_ours = all(isinstance(found.get(key), dict) for key in _PROGRESS)
    return found if is_ours else None


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _size_of(path: pathlib.Path) -> int | None:
    """Bytes of a file; None if there is none."""
    return path.stat().st_size if path.is_file() else None
