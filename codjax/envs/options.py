"""Checked construction of an environment's settings and data options from plain values.

The fields and types of a frozen dataclass are the only list of what may be set; the messages name
the key as the user typed it in `config.tasksets.*.settings` or `.data`.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

T = TypeVar("T")


def build(options: type[T], values: Mapping[str, Any], *, label: str) -> T:
    """`options(**values)` after checking names, types and, by its `__post_init__`, ranges.

    Args:
        options: a frozen dataclass whose fields all have defaults.
        values: what to set; lists are taken for tuples.
        label: where the values come from, e.g. "frozen_lake_obscure: settings".

    Raises:
        ValueError: an unknown name (with the nearest valid one), a wrong type, a bad range.
    """
    hints = typing.get_type_hints(options)
    names = [field.name for field in dataclasses.fields(options)]  # type: ignore[arg-type]
    checked = {}
    for key, value in dict(values).items():
        if key not in names:
            raise ValueError(f"{label}.{key} does not exist:{_advice(key, names)}")
        if not _fits(value, hints[key]):
            wanted = _describe(hints[key])
            raise ValueError(f"{label}.{key} must be {wanted}; got {value!r:.200}.")
        checked[key] = tuple(value) if isinstance(value, list) else value
    try:
        return options(**checked)
    except ValueError as error:
        raise ValueError(f"{label}.{error}") from error


def unknown(name: object, valid: Iterable[str], *, what: str) -> str:
    """An error message for a name that does not exist: the nearest valid one, then all of them.

    >>> unknown("chest", ["chess", "go"], what="game")
    "unknown game 'chest': did you mean 'chess'? Valid: chess, go."
    """
    return f"unknown {what} {name!r}:{_advice(name, valid)}"


def _advice(name: object, valid: Iterable[str]) -> str:
    choices = sorted(valid)
    near = difflib.get_close_matches(str(name), choices, n=1, cutoff=0.5)
    nearest = f" did you mean {near[0]!r}?" if near else ""
    return f"{nearest} Valid: {', '.join(choices)}."


def _fits(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, arg) for arg in args)
    if origin is Literal:
        return isinstance(value, str) and value in args
    if origin is tuple:
        return isinstance(value, (tuple, list)) and all(_fits(item, args[0]) for item in value)
    if hint in (int, float):  # a bool is an int to Python, but never a number in a config
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_describe(arg) for arg in args)
    if origin is Literal:
        return "one of " + ", ".join(repr(arg) for arg in args)
    if origin is tuple:
        return f"a list of {_describe(args[0])}"
    names = {int: "an integer", float: "a number", bool: "True or False", str: "a string"}
    return "None" if hint is type(None) else names.get(hint, str(hint))
