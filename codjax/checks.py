"""What `codjax.validation` checks single values and sections with, and the error it raises.

Every message says, in one breath, which key, what it must be, why, and what was found:

    rollout.group_size must be at least 2: the baseline is a mean over the group; got 1.

Most functions take the section and the whole key as the user types it; the value is the section's
entry by the key's last part.
"""

from __future__ import annotations

import contextlib
import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict


class StoppedError(Exception):
    """A run was asked to stop and did, at a step, with a checkpoint; the same command goes on."""


class NonFiniteMetricError(ValueError):
    """A metric is nan or infinite, which ends the run: nothing after it could be trusted."""


class WriteError(Exception):
    """A disk failed or is full; the message is one line, and the same command goes on."""


class EvaluationError(Exception):
    """Nothing came of an evaluation that could be reported; the message is one line."""


class StalledError(Exception):
    """Something that was awaited did not come in time; the message is one line."""


class ServerError(Exception):
    """A server does not do what the run needs of it; the message is one line."""


class ConfigError(ValueError):
    """A config, or the command line that makes it, cannot work; the message is one line."""


@contextlib.contextmanager
def reading(key: str) -> Iterator[None]:
    """What cannot be read from a file that a key names is a ConfigError, in one line.

    Args:
        key: as the user typed it.
    """
    try:
        yield
    except ConfigError:
        raise  # it names its key already
    except (ValueError, OSError) as error:
        raise ConfigError(f"{key}: {' '.join(str(error).split())}") from error


def require(ok: bool, key: str, must: str, why: str, value: Any) -> None:
    """Raises unless `ok`: "`key` must `must`: `why`; got `value`."."""
    if not ok:
        raise ConfigError(f"{key} must {must}: {why}; got {value!r}.")


def at_least(section: ConfigDict, key: str, limit: float, why: str) -> None:
    """The value is `limit` or more."""
    value = _value(section, key)
    require(value >= limit, key, f"be at least {limit}", why, value)


def positive(section: ConfigDict, key: str) -> None:
    """The value is above 0."""
    value = _value(section, key)
    require(value > 0, key, "be above 0", "it scales or divides", value)


def fraction(section: ConfigDict, key: str) -> None:
    """The value is from 0 to 1, both included."""
    value = _value(section, key)
    require(0 <= value <= 1, key, "be from 0 to 1", "it is a fraction", value)


def choice(key: str, value: Any, names: Iterable[Any], of: str = "one of") -> None:
    """The value is one of `names`; the message suggests the nearest."""
    names = tuple(names)
    if value not in names:
        valid = ", ".join(map(str, names)) or "there is none yet"
        hint = nearest(str(value), map(str, names))
        raise ConfigError(f"{key} must be {of} {valid}; got {value!r}{hint}.")


def goes_with(section: ConfigDict, key: str, switch: str, setting: str) -> None:
    """An optional value that one setting of `switch` needs and no other reads."""
    value, chosen = _value(section, key), _value(section, switch)
    if chosen == setting:
        require(value is not None, key, "be given", f"{switch} is {setting}", value)
    else:
        why = f"{switch} is {chosen}, and only {setting} reads it"
        require(value is None, key, "be left unset", why, value)


def default_unless(section: ConfigDict, key: str, default: Any, switch: str, setting: str) -> None:
    """A value that is left at its default unless `switch` has the one setting that reads it."""
    value, chosen = _value(section, key), _value(section, switch)
    why = f"{switch} is {chosen}, and only {setting} reads it"
    require(chosen == setting or value == default, key, f"be {default}", why, value)


def nearest(name: str, names: Iterable[str]) -> str:
    """The name that was meant, for the end of a message; empty when none is close.

    >>> nearest("learning_rat", ["learning_rate", "schedule"])
    ' (did you mean learning_rate?)'
    """
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def matches(
    section: ConfigDict, template: ConfigDict, prefix: str, is_open: Callable[[str], bool]
) -> None:
    """The section has the keys of `template`, no others, and values of their types.

    Args:
        section: what the user has.
        template: the same section of the default config.
        prefix: how the section's keys begin, "" or ending in a dot.
        is_open: key -> whether the user chooses the keys below it, so that none is checked.
    """
    for name in section:
        if name not in template:
            raise ConfigError(f"{prefix}{name} is not a config key{nearest(name, template)}.")
    for name in template:
        key = prefix + name
        if name not in section:
            raise ConfigError(
                f"{key} is missing: start from default_config() and set single keys, "
                "rather than replacing a whole section."
            )
        if isinstance(template[name], ConfigDict):
            if not isinstance(section[name], ConfigDict):
                raise ConfigError(f"{key} must be a section of keys; got {section[name]!r}.")
            if not is_open(key):
                matches(section[name], template[name], key + ".", is_open)
        else:
            is_optional = template[name] is None
            _check_type(section[name], key, template.get_type(name), is_optional=is_optional)


def entries(section: ConfigDict, prefix: str, maker: str) -> Mapping[str, ConfigDict]:
    """The entries of a section whose keys the user chooses, each a section itself.

    Args:
        section: the section.
        prefix: its key.
        maker: the function of `codjax.config` that makes an entry.
    """
    for name, entry in section.items():
        if not name or "/" in name or "." in name:
            raise ConfigError(
                f"{prefix} must have names without slashes and dots: they become parts of metric "
                f"names and of keys; got {name!r}."
            )
        if not isinstance(entry, ConfigDict):
            raise ConfigError(f"{prefix}.{name} must be made by {maker}(…); got {entry!r}.")
    return section


def _check_type(value: Any, key: str, expected: type, *, is_optional: bool) -> None:
    """A value of the default's type, where a bool is no number and an integer is a float too."""
    if value is None and is_optional:
        return
    accepted: dict[type, tuple[type, ...]] = {float: (float, int), tuple: (tuple, list)}
    is_bool_by_mistake = isinstance(value, bool) and expected is not bool
    if is_bool_by_mistake or not isinstance(value, accepted.get(expected, (expected,))):
        names = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
        raise ConfigError(f"{key} must be {names.get(expected, 'a tuple')}; got {value!r}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key} must be a finite number; got {value!r}.")


def _value(section: ConfigDict, key: str) -> Any:
    return section[key.rsplit(".", 1)[-1]]
