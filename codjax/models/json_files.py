"""JSON files: read with errors of one line that name the file, written in one step."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: the file cannot be read, is not JSON, or holds something other than an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); restore it.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object; it holds {_kind(value)}.")
    return value


def member(fields: dict[str, Any], name: str, kind: type, *, path: pathlib.Path) -> Any:
    """A field that must be there, an object (`dict`) or a string (`str`).

    Args:
        fields: what was read from `path`, or an object in it.
        name: of the field; dotted, its last part is looked up and the whole of it is told.
        kind: `dict` or `str`.
        path: of the file, for messages.

    Raises:
        ValueError: it is not there, or of another kind.
    """
    last = name.rsplit(".", 1)[-1]
    if last not in fields:
        raise ValueError(f"{path} lacks {name}.")
    if not isinstance(fields[last], kind):
        wanted = "an object" if kind is dict else "a string"
        raise ValueError(f"{path}: {name} must be {wanted}; it is {_kind(fields[last])}.")
    return fields[last]


def write(path: pathlib.Path, value: Any) -> None:
    """Write a file in one step, on the disk when this returns."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _kind(value: Any) -> str:
    """A value in the words of JSON; the value itself where it is short by nature."""
    names: dict[type, str] = {dict: "an object", list: "a list", str: f"the string {value!r}"}
    return names.get(type(value), json.dumps(value))
