"""Config files and what the command line changes in them.

A config file is a Python file with a function `get_config()` that returns a ConfigDict, made by
`codjax.config.default_config()`. On the command line

    --config=configs/quickstart.py --config.optimizer.learning_rate=3e-6 --config.seed=1

names one and sets keys of it, each read as the type that the key has. Whatever is wrong with any
of this is a `ConfigError` of one line.
"""

from __future__ import annotations

import difflib
import pathlib
import re
import runpy
import traceback
from collections.abc import Iterator, Sequence

from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from codjax.checks import ConfigError

EXAMPLE = "configs/quickstart.py"
_OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]*)")
_CONFIG = re.compile(r"--?config(?:=(.*))?$", re.DOTALL)


def load(path: str) -> ConfigDict:
    """The locked config that the file's `get_config` returns.

    Args:
        path: of the Python file; what follows a colon in it is the argument of `get_config`.

    Raises:
        ConfigError: no such file, it raises, it has no `get_config`, or that returns no config.
    """
    file, colon, argument = path.partition(":")
    if not pathlib.Path(file).is_file():
        raise ConfigError(
            f"--config={path}: there is no file {file}; give a Python file with a function "
            f"get_config(), such as {EXAMPLE}."
        )
    try:
        get_config = runpy.run_path(file).get("get_config")
        if not callable(get_config):
            raise ConfigError(
                f"--config={path}: the file has no function get_config(); define one that "
                "returns default_config() with some values set."
            )
        config = get_config(*([argument] if colon else []))
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:  # anything may go wrong in a file that users write
        raise ConfigError(f"--config={path}: {_describe(error, file)}") from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(
            f"--config={path}: get_config() must return a ConfigDict, as default_config() gives; "
            f"got {type(config).__name__}."
        )
    return config.lock()


def parse(
    args: Sequence[str], values: flags.FlagValues, *, takes_config: bool
) -> tuple[ConfigDict | None, list[str]]:
    """Reads all flags of a command, the config's among them.

    Args:
        args: the arguments after the command's name.
        values: the other flags of the command; they are set here.
        takes_config: whether the command has a `--config`, which then must be given.

    Returns:
        The config with the command line's values, or None, and the arguments that are no flags.

    Raises:
        ConfigError: anything is wrong with the arguments or the config file.
    """
    path, rest = _take_path(args) if takes_config else (None, list(args))
    config = None
    argv = ["codjax", *rest]
    try:
        if path is not None:
            config = load(path)
            for key in _overridden(rest):
                _check_known(config, key)
            config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
        positional = values(argv)[1:]
    except flags.IllegalFlagValueError as error:
        raise ConfigError(_describe_value(str(error), config)) from error
    except flags.Error as error:
        raise ConfigError(_one_line(str(error))) from error
    return config, positional


def _take_path(args: Sequence[str]) -> tuple[str, list[str]]:
    """The value of `--config=FILE` or `--config FILE`, and the other arguments."""
    rest, paths, coming = [], [], iter(args)
    for arg in coming:
        match = _CONFIG.match(arg)
        if match is None:
            rest.append(arg)
        else:
            paths.append(match[1] if match[1] is not None else next(coming, ""))
    if len(paths) != 1 or not paths[0]:
        wrong = "given once" if len(paths) > 1 else "given"
        raise ConfigError(f"--config=FILE.py must be {wrong}, for example --config={EXAMPLE}.")
    return paths[0], rest


def _overridden(args: Sequence[str]) -> list[str]:
    """The keys that the arguments set: `optimizer.b1` of `--config.optimizer.b1=0.8`."""
    return [match[1] for match in map(_OVERRIDE.match, args) if match]


def _check_known(config: ConfigDict, key: str) -> None:
    """Raises unless the config has the key, naming the nearest that it has."""
    section: object = config
    for name in key.split("."):
        if not isinstance(section, ConfigDict) or name not in section:
            keys = list(_keys(config))
            # The same place or the same last name: what people mistype or forget to spell out.
            last = key.rsplit(".", 1)[-1]
            close = difflib.get_close_matches(key, keys, n=1, cutoff=0.75) or [
                known for known in keys if known.rsplit(".", 1)[-1] == last
            ]
            hint = f"did you mean config.{close[0]}?" if close else "--dry-run shows all keys."
            raise ConfigError(f"config.{key} is not a config key; {hint}")
        section = section[name]


def _keys(section: ConfigDict, prefix: str = "") -> Iterator[str]:
    for name, value in section.items():
        yield prefix + name
        if isinstance(value, ConfigDict):
            yield from _keys(value, f"{prefix}{name}.")


def _describe(error: BaseException, file: str) -> str:
    """What a config file raised, and where in it."""
    line = error.lineno if isinstance(error, SyntaxError) else None
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename == file:
            line = frame.lineno
    where = f"line {line} of the file" if line else "the file"
    message = error.msg if isinstance(error, SyntaxError) else str(error).strip("'")
    # A locked ConfigDict lists all of its fields, and then the one that was meant.
    message = re.sub(r' Other fields present: "\{.*\}"', "", message, flags=re.DOTALL)
    message = message.replace("\\n", " ")  # its message is the repr of another
    return f"{where} raises {type(error).__name__}: {_one_line(message)}"


def _describe_value(message: str, config: ConfigDict | None) -> str:
    """absl's "flag --config.seed=x: invalid literal …" in the words of this project."""
    match = re.match(r"flag --config\.([^=]*)=(.*?): ", message, flags=re.DOTALL)
    if match is None or config is None:
        return _one_line(message)
    section_name, _, name = match[1].rpartition(".")
    section = config
    for part in filter(None, section_name.split(".")):
        section = section[part]
    wanted = {int: "an integer", float: "a number", bool: "true or false"}
    kind = wanted.get(section.get_type(name), "a section of keys, as {'key': value}")
    return f"config.{match[1]} must be {kind}; got {match[2]!r}."


def _one_line(text: str) -> str:
    return " ".join(text.split())
