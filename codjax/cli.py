"""The command line: `codjax COMMAND`, also `python -m codjax COMMAND`.

Reads the flags, validates the config, and calls one function; JAX and the other heavy libraries
are imported only then, so that a mistake is answered at once.

Exit status: 0 success; 2 bad usage or a bad config, with one line on stderr that says what is wrong
and how to mend it; 3 a metric became nan or infinite; 130 interrupted; 1 anything else, with a
traceback, or in one line where the world failed: a disk, servers, something awaited too long, every
run of an evaluation. A run that SIGTERM stopped, with a checkpoint, ends with 0, or with
CODJAX_STOP_STATUS where that is set: launchers that start again whatever has failed set it
(docs/launch.md).
"""

from __future__ import annotations

import dataclasses
import logging
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict

import codjax
from codjax import checks, config_files, interrupts, validation
from codjax.checks import (
    ConfigError,
    EvaluationError,
    NonFiniteMetricError,
    ServerError,
    StalledError,
    StoppedError,
    WriteError,
)
from codjax.validation import tasks

SUCCESS, FAILURE, BAD_USAGE, NOT_FINITE, INTERRUPTED = 0, 1, 2, 3, 130
STOPPED = 143  # by SIGTERM; what the process then ends with is `_stop_status`
STOP_STATUS = "CODJAX_STOP_STATUS"  # a variable of the environment
_IN_ONE_LINE = {
    ConfigError: BAD_USAGE,
    NonFiniteMetricError: NOT_FINITE,
    EvaluationError: FAILURE,
    ServerError: FAILURE,
    StalledError: FAILURE,
    WriteError: FAILURE,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flag:
    """A flag of a command: its default's type is how the value is read."""

    name: str
    default: bool | int | str | None
    help: str
    placeholder: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """One command.

    Attributes:
        summary: one line on what it does.
        run: config (None if it takes none), flags by name, positional arguments -> exit status,
            None for success.
        flags: its flags beside `--config`.
        takes_config: whether it reads a config file.
        positional: name of its one optional positional argument, if it has one.
        epilogue: further lines of its help.
    """

    summary: str
    run: Callable[[Any, dict[str, Any], list[str]], int | None]
    flags: tuple[Flag, ...]
    takes_config: bool = True
    positional: str = ""
    epilogue: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status.

    Args:
        argv: the arguments after the program's name; None for those of the process.
    """
    if argv is None:
        interrupts.take(INTERRUPTED)
    status = _status(list(sys.argv[1:] if argv is None else argv))
    if "codjax.distributed" in sys.modules:
        from codjax import distributed

        # What all do together ends with all; a failure leaves the others no choice.
        distributed.finish() if status in (SUCCESS, STOPPED) else distributed.leave(status)
    return _stop_status() if status == STOPPED else status


def _status(args: list[str]) -> int:
    """Runs one command and says how it ended, to the user and as an exit status."""
    program = " ".join(["codjax", *args[:1]] if args and args[0] in COMMANDS else ["codjax"])
    try:
        return _answer(args)
    except tuple(_IN_ONE_LINE) as error:
        _write(f"{program}: {error}\n", to=sys.stderr)
        _tell_others(args, error)
        return next(status for kind, status in _IN_ONE_LINE.items() if isinstance(error, kind))
    except StoppedError as stopped:
        _write(f"{program}: {stopped}.\n", to=sys.stderr)
        return STOPPED
    except KeyboardInterrupt:
        train = program == "codjax train"
        resume = "; the same command goes on from the newest checkpoint" if train else ""
        _write(f"\n{program}: interrupted{resume}.\n", to=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception:
        traceback.print_exc()
        return FAILURE
    return SUCCESS


def _answer(args: list[str]) -> int:
    """Helps, or runs the command that is named first; the exit status."""
    name = args[0] if args else ""
    if name in ("-h", "--help", "help"):
        _write(_help())
    elif name == "--version":
        _write(f"codjax {codjax.__version__}\n")
    elif name not in COMMANDS:
        problem = f"there is no command {name}{checks.nearest(name, COMMANDS)}" if name else ""
        raise ConfigError(
            f"{problem or 'no command was given'}; the commands are {', '.join(COMMANDS)}, and "
            "codjax --help tells what they do."
        )
    elif any(arg in ("-h", "--help") for arg in args[1:]):
        _write(_command_help(name, COMMANDS[name]))
    else:
        return _run(COMMANDS[name], args[1:])
    return SUCCESS


def _run(command: Command, args: list[str]) -> int:
    """Reads the arguments, validates the config, does the work; the exit status."""
    values = flags.FlagValues()
    for flag in command.flags:
        if isinstance(flag.default, bool):
            flags.DEFINE_boolean(flag.name, flag.default, flag.help, flag_values=values)
        elif isinstance(flag.default, int):
            flags.DEFINE_integer(flag.name, flag.default, flag.help, flag_values=values)
        else:
            flags.DEFINE_string(flag.name, flag.default, flag.help, flag_values=values)
    config, positional = config_files.parse(args, values, takes_config=command.takes_config)
    limit = 1 if command.positional else 0
    if len(positional) > limit:
        raise ConfigError(
            f"unexpected argument {positional[limit]!r}: flags look like --name=value, and a true "
            "or false one must have its value after the equals sign."
        )
    if config is not None:
        validation.validate(config)
    _set_up_logging()
    options = {flag.name: values[flag.name].value for flag in command.flags}
    return command.run(config, options, positional) or SUCCESS


def _set_up_logging() -> None:
    """Our own sentences, other libraries' warnings, and none of their standing remarks."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("codjax").setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax on opening a folder to read
    # "PyTorch was not found": we only want the tokenizers.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def _train(config: ConfigDict, options: dict[str, Any], _: list[str]) -> None:
    if not options["dry-run"]:
        _check_workdir(options["workdir"])
        _stop_status()
    from codjax import train

    if options["dry-run"]:
        _write(train.dry_run(config).rstrip("\n") + "\n")
        return
    _join(options["distributed"])
    train.main(config, options["workdir"])


def _tell_others(args: list[str], problem: Exception) -> None:
    """A mistake that one process finds before it joins the others must end those too."""
    asks = any(re.fullmatch(r"--distributed(=(true|t|yes|y|1))?", arg, re.I) for arg in args)
    is_one_of_several = asks or os.environ.get("CODJAX_COORDINATOR")
    is_dry = any(arg.startswith("--dry-run") for arg in args)
    is_for_all = isinstance(problem, ConfigError) and args[:1] in (["train"], ["eval"])
    if is_for_all and is_one_of_several and not is_dry:
        from codjax import distributed

        distributed.tell(problem, autodetect=asks)


def _stop_status() -> int:
    """The exit status of a run that SIGTERM stopped: 0, unless who started it wants another."""
    text = os.environ.get(STOP_STATUS) or "0"
    if not text.isdecimal() or int(text) > 255:
        raise ConfigError(f"{STOP_STATUS} must be an exit status from 0 to 255; got {text!r}.")
    return int(text)


def _join(autodetect: bool) -> None:
    """Becomes one of several processes, where there are several; one of them does the talking."""
    from codjax import distributed

    distributed.initialize(autodetect=autodetect)
    distributed.on_all(lambda: None)  # that all came so far; see `_tell_others`
    if not distributed.is_main():
        logging.getLogger("codjax").setLevel(logging.WARNING)


def _eval(config: ConfigDict, options: dict[str, Any], _: list[str]) -> None:
    _check_workdir(options["workdir"])
    which = options["checkpoint"]
    is_step = which in ("latest", "base") or which.isdecimal()
    if tasks.is_address(which):
        tasks.check_address(which)
    elif not is_step and not pathlib.Path(which).is_dir():
        raise ConfigError(
            "--checkpoint must be latest, base, a step, the folder of a run, of a step "
            "(DIR/checkpoints/50) or of a Hugging Face model, or the address of an endpoint "
            f"(http://host:8000/v1); got {which!r}."
        )
    if not config.evaluation.matrix:
        raise ConfigError(
            "evaluation.matrix must have an entry: it says what to evaluate; add one in the "
            "config file, config.evaluation.matrix.NAME = evaluation(…)."
        )
    from codjax import evaluate

    _join(options["distributed"])
    evaluate.main(config, options["checkpoint"], options["workdir"])


def _plan(config: ConfigDict, options: dict[str, Any], _: list[str]) -> int:
    if not options["topology"]:
        raise ConfigError(
            "--topology=NAME must be given: the TPU slice to plan for, as v5e:16x16 or v5p:4x4x4."
        )
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs on the devices of this machine
    from codjax import plan

    fits = plan.main(config, options["topology"], options["output"])
    return SUCCESS if fits else FAILURE


def _data(config: ConfigDict, options: dict[str, Any], _: list[str]) -> None:
    from codjax import data

    _write(data.main(config, options["taskset"], num=options["num"], output=options["output"]))


def _serve(config: ConfigDict, options: dict[str, Any], _: list[str]) -> None:
    _check_workdir(options["workdir"])
    from codjax import serve

    serve.main(config, options["model"], options["workdir"])


def _convert(_: None, options: dict[str, Any], __: list[str]) -> None:
    for name, what in (("source", "weights to convert"), ("output", "folder to write")):
        if not options[name]:
            raise ConfigError(f"--{name}=DIR must be given: the {what}.")
    from codjax import convert

    _write(
        convert.main(
            options["source"],
            options["output"],
            dtype=options["dtype"],
            max_shard_size=options["max-shard-size"],
        )
    )


def _bench(_: None, options: dict[str, Any], positional: list[str]) -> None:
    from codjax import bench

    name = positional[0] if positional else None
    if name is not None:
        checks.choice("NAME", name, bench.BENCHES)
    of_kernels = {flag.name: options[flag.name] for flag in _KERNEL_FLAGS}
    if name == "kernels":
        of_kernels["topology"] = of_kernels["topology"] or "v5e"
        bench.main(name, options["output"], **of_kernels)
        return
    for flag in _KERNEL_FLAGS:
        if of_kernels[flag.name] != flag.default:
            raise ConfigError(f"--{flag.name} is for codjax bench kernels only; leave it out.")
    bench.main(name, options["output"])


def _check_workdir(workdir: str | None) -> None:
    if not workdir:
        raise ConfigError("--workdir=DIR must be given: the run is written there and resumed.")
    if pathlib.Path(workdir).exists() and not pathlib.Path(workdir).is_dir():
        raise ConfigError(f"--workdir={workdir} must be a folder; it is a file.")


def _help() -> str:
    lines = [f"  {name:<7} {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: codjax COMMAND [flags]",
            "",
            "Trains language-model agents that keep learning after deployment.",
            "",
            *lines,
            "",
            "codjax COMMAND --help tells its flags; codjax --version, the version.",
            "",
        ]
    )


def _command_help(name: str, command: Command) -> str:
    rows = []
    usage = ["usage: codjax", name]
    if command.positional:
        usage.append(f"[{command.positional}]")
    if command.takes_config:
        usage.append("--config=FILE.py")
        rows += [
            ("--config=FILE.py", "Python file with get_config(), such as those in configs/"),
            ("--config.KEY=VALUE", "sets one key of it, as --config.optimizer.learning_rate=3e-6"),
        ]
    for flag in command.flags:
        text = f"--{flag.name}" + (f"={flag.placeholder}" if flag.placeholder else "")
        default = f" (default: {flag.default})" if flag.default not in (None, False) else ""
        rows.append((text, flag.help + default))
    lines = [f"  {left:<20} {right}" for left, right in rows]
    end = [command.epilogue, ""] if command.epilogue else []
    return "\n".join([" ".join([*usage, "[flags]"]), "", command.summary, "", *lines, "", *end])


def _write(text: str, *, to: Any = None) -> None:
    stream = sys.stdout if to is None else to
    stream.write(text)
    stream.flush()


_KERNEL_FLAGS = (
    Flag(
        name="topology",
        default=None,
        placeholder="NAME",
        help="bench kernels: the TPU whose cycles and memory are told; v5e unless given",
    ),
    Flag(
        name="tune",
        default=False,
        help="bench kernels: search block shapes for that TPU instead, by simulated cycles",
    ),
)
_WORKDIR = Flag(name="workdir", default=None, placeholder="DIR", help="folder of the run")
_DISTRIBUTED = Flag(
    name="distributed",
    default=False,
    help="be one of the processes of a TPU pod, GKE or SLURM job (docs/launch.md)",
)
COMMANDS = {
    "train": Command(
        summary="Trains by a config file; goes on by itself where the workdir has a checkpoint.",
        run=_train,
        flags=(
            _WORKDIR,
            _DISTRIBUTED,
            Flag(
                name="dry-run",
                default=False,
                help="print the resolved config and what follows from it, and exit",
            ),
        ),
    ),
    "eval": Command(
        summary="Evaluates a checkpoint on the config's evaluation matrix; writes eval.json.",
        run=_eval,
        flags=(
            _WORKDIR,
            _DISTRIBUTED,
            Flag(
                name="checkpoint",
                default="latest",
                placeholder="WHICH",
                help="latest, base (before training), a step, a folder, or http://host:port/v1",
            ),
        ),
    ),
    "serve": Command(
        summary="Starts the SGLang servers of server.local and keeps them up, for runs elsewhere.",
        run=_serve,
        flags=(
            Flag(
                name="workdir",
                default=None,
                placeholder="DIR",
                help="folder for their logs, DIR/servers",
            ),
            Flag(
                name="model",
                default=None,
                placeholder="DIR",
                help="Hugging Face folder to start from; model.source unless given",
            ),
        ),
        epilogue="SIGTERM or Ctrl-C ends them. Needs SGLang, and neither JAX nor a checkpoint.",
    ),
    "plan": Command(
        summary="Compiles the train step for a TPU slice without one: memory, time floor, advice.",
        run=_plan,
        flags=(
            Flag(
                name="topology",
                default=None,
                placeholder="NAME",
                help="the slice, as v5e:16x16, v5p:4x4x4 or v6e:16x16",
            ),
            Flag(
                name="output",
                default=None,
                placeholder="FILE.json",
                help="also write the plan there (docs/file_formats.md)",
            ),
        ),
        epilogue="Exit status: 0 if the config fits, 1 if not. Needs libtpu, and no TPU.",
    ),
    "data": Command(
        summary="Prints tasks of a task set as an agent first sees them, or writes JSON lines.",
        run=_data,
        flags=(
            Flag(name="taskset", default=None, placeholder="NAME", help="one of config.tasksets"),
            Flag(
                name="output",
                default=None,
                placeholder="FILE.jsonl",
                help="write there, one object a line, instead of printing",
            ),
            Flag(name="num", default=5, placeholder="N", help="how many tasks, from the first"),
        ),
    ),
    "convert": Command(
        summary="Converts weights: a Hugging Face folder to Orbax, a checkpoint to Hugging Face.",
        run=_convert,
        takes_config=False,
        flags=(
            Flag(
                name="source",
                default=None,
                placeholder="DIR",
                help="a Hugging Face folder, to Orbax; or a run, a step of it (DIR/checkpoints/50) "
                "or a converted folder, to Hugging Face",
            ),
            Flag(name="output", default=None, placeholder="DIR", help="folder to write"),
            Flag(
                name="dtype",
                default=None,
                placeholder="DTYPE",
                help="float32 or bfloat16, to store in; else each tensor's own",
            ),
            Flag(
                name="max-shard-size",
                default="5GB",
                placeholder="SIZE",
                help="of a safetensors file",
            ),
        ),
        epilogue="The same command goes on with what an interrupted one left.",
    ),
    "bench": Command(
        summary="Runs the project's benchmarks, one or all; prints a table.",
        run=_bench,
        takes_config=False,
        positional="NAME",
        flags=(
            Flag(
                name="output",
                default=None,
                placeholder="FILE.json",
                help="also write the numbers there",
            ),
            *_KERNEL_FLAGS,
        ),
    ),
}
