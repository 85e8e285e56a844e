"""`codjax bench tunix`: a whole GRPO step, against Tunix through its public API.

Both sides take AdamW steps on the same plain rows (nothing to share, no padding, the second half of
each sampled), from the same weights, with the same token-level PPO clip; each contender in a
process of its own (`trainers.py`). After the first step they must agree on what they report and on
the weights, or there is no table. What differs is how they go about it:

* Tunix makes the logits of every token, prompts included, takes those of the completion, and from
  them log-probs and, as a metric, the entropy. Its Qwen3 writes out the attention scores.
* codjax projects the scored entries only, a chunk at a time.

Tunix is not a dependency: `pip install google-tunix==0.1.7`. It wants an older safetensors than
ours, so give it an environment of its own and name that one's interpreter in
`CODJAX_TUNIX_PYTHON`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from codjax import build, models
from codjax.bench import material, trainers
from codjax.checks import ConfigError

TUNIX = "google-tunix"
TUNIX_VERSION = "0.1.7"
PYTHON_VARIABLE = "CODJAX_TUNIX_PYTHON"
# Of metrics and gradient norm, relative; float32 sums in another order.
_TOLERANCE = 1e-4
# Of the change of the weights, relative. Adam's first step is little more than the sign of the
# gradient, which rounding turns where the gradient is next to nothing. 7e-5 was seen.
_CHANGE_TOLERANCE = 1e-3


class Contender(NamedTuple):
    """A side and its way."""

    side: str  # a key of `trainers.SIDES`
    is_whole: bool  # all rows at once, or one after the other
    remat: str  # "none" | "full"


CONTENDERS = {  # the first is what the others are compared with
    "codjax": Contender("codjax", True, "full"),
    "codjax, row by row": Contender("codjax", False, "full"),
    "Tunix": Contender("tunix", True, "full"),
    "Tunix, row by row": Contender("tunix", False, "full"),
    "Tunix, layers kept": Contender("tunix", True, "none"),
}


def bench(
    *,
    num_rows: int = 8,
    row_length: int = 1024,
    vocab_size: int = 32768,
    hidden_size: int = 256,
    num_layers: int = 4,
    rounds: int = 5,
) -> list[material.Row]:
    """Seconds and memory of a GRPO step, for every contender.

    Args:
        num_rows: B, samples of the step.
        row_length: T; the first half is prompt.
        vocab_size: V.
        hidden_size: D; heads of 64 and an MLP of 3 D, two query heads a key-value head.
        num_layers: L.
        rounds: timed steps of each contender, taken in turn, after one that compiles.

    Returns:
        A row a contender: its version and JAX's; how it goes about it; a step's median and fastest
        time and median time of the processor; temporaries of its largest program, with gradients
        (which codjax adds up in an argument) counted among them; peak memory of the process; and,
        as `x_…`, what is a multiple of the first contender's.

    Raises:
        ConfigError: Tunix is not there, or is another version.
        RuntimeError: the contenders do not make the same step.
    """
    pythons = {"codjax": sys.executable}
    if any(contender.side == "tunix" for contender in CONTENDERS.values()):
        pythons["tunix"] = tunix_python()
    job, given = make_job(
        num_rows=num_rows,
        row_length=row_length,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
    )
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        trainers.write_job(folder, job, given)
        ways = {
            name: trainers.Way(num_rows if contender.is_whole else 1, contender.remat)
            for name, contender in CONTENDERS.items()
        }
        workers: dict[str, Worker] = {}
        changes: dict[str, dict[str, np.ndarray]] = {}
        for name, contender in CONTENDERS.items():  # one compiles before the next one starts
            one = _worker(pythons[contender.side], contender.side, folder, ways[name])
            workers[name] = stack.enter_context(one)
            changes[name] = _first_change(workers[name], given)
        taken = _in_turn(workers, rounds=rounds)
        ends = {name: worker.ask("finish") for name, worker in workers.items()}
    check_same({name: end["metrics"] for name, end in ends.items()}, changes)
    rows = [_row(name, ways[name], taken[name], ends[name]) for name in CONTENDERS]
    return material.compare(
        rows, {"x_seconds": "step_s", "x_cpu": "cpu_s", "x_temporaries": "temporaries_mib"}
    )


def tunix_python() -> str:
    """The interpreter that has Tunix: the one that the environment names, or this one.

    Raises:
        ConfigError: it has not, or not the version that the page in docs/ compares with.
    """
    python = os.environ.get(PYTHON_VARIABLE, sys.executable)
    ask = f"import importlib.metadata as m; print(m.version({TUNIX!r}))"
    try:
        asked = subprocess.run(
            [python, "-P", "-c", ask], capture_output=True, text=True, check=False
        )
        found = asked.stdout.strip() if asked.returncode == 0 else "none"
    except OSError as error:
        found = f"none ({error})"
    if found != TUNIX_VERSION:
        raise ConfigError(
            f"it compares with {TUNIX} {TUNIX_VERSION}, and {python} has {found}; install it in "
            f"an environment of its own (python -m venv tunix; tunix/bin/pip install "
            f"{TUNIX}=={TUNIX_VERSION}) and set {PYTHON_VARIABLE}=tunix/bin/python."
        )
    return python


def make_job(
    *, num_rows: int, row_length: int, vocab_size: int, hidden_size: int, num_layers: int
) -> tuple[trainers.Job, trainers.Material]:
    """Random rows, fresh weights, and a sampler near enough that most ratios are not clipped."""
    num_heads = max(hidden_size // 64, 2)
    sizes = material.model_config(vocab_size=vocab_size, num_layers=num_layers) | {
        "hidden_size": hidden_size,
        "intermediate_size": 3 * hidden_size,
        "num_heads": num_heads,
        "num_kv_heads": num_heads // 2,
        "head_dim": hidden_size // num_heads,
    }
    del sizes["remat"]
    model = models.init(models.DecoderConfig(**sizes, remat="none"), seed=0)
    weights = traverse_util.flatten_dict(build.params_of(model), sep=".")
    rng = np.random.default_rng(0)
    shape = (num_rows, row_length)
    job = trainers.Job(
        model=sizes,
        num_prompt=row_length // 2,
        learning_rate=1e-4,
        clip_norm=1.0,
        clip_ratio=0.2,
    )
    return job, trainers.Material(
        tokens=rng.integers(trainers.NUM_SPECIAL, vocab_size, shape, np.int32),
        advantages=rng.normal(size=num_rows).astype(np.float32),
        # A fresh model is close to uniform, so that ratios spread about 1.
        sampler_logprobs=rng.normal(-math.log(vocab_size), 0.15, shape).astype(np.float32),
        weights={name: np.asarray(value) for name, value in weights.items()},
    )


def check_same(
    metrics: Mapping[str, Mapping[str, float]], changes: Mapping[str, Mapping[str, np.ndarray]]
) -> None:
    """Raise unless all made the same first step: equal metrics, weights changed alike.

    Args:
        metrics: of each contender; a metric that one does not report is not compared for it.
        changes: what the step added to each weight.
    """
    (first, of_first), *others = metrics.items()
    for name, found in others:
        for key in found.keys() & of_first.keys():
            if not abs(found[key] - of_first[key]) <= _TOLERANCE * abs(of_first[key]):
                raise RuntimeError(
                    f"{key} is {found[key]!r} in {name!r} and {of_first[key]!r} in {first!r}: "
                    "they are not the same step, so their times mean nothing."
                )
        difference = _distance(changes[name], changes[first])
        if not difference <= _CHANGE_TOLERANCE:
            raise RuntimeError(
                f"the weights after a step of {name!r} and of {first!r} differ by {difference:.3g} "
                f"of the step, more than {_CHANGE_TOLERANCE}: they are not the same step, so "
                "their times mean nothing."
            )


def _distance(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> float:
    """L2 norm of the difference over that of `other`, all weights together."""
    difference = sum(float(np.sum((one[name] - other[name]) ** 2.0)) for name in other)
    return math.sqrt(difference / sum(float(np.sum(x**2.0)) for x in other.values()))


class Worker:
    """A process of `trainers.py` and the pipe to it; `_worker` starts and ends it."""

    def __init__(self, process: subprocess.Popen[str], log: pathlib.Path):
        self._process, self._log = process, log

    def ask(self, command: str) -> dict[str, Any]:
        """The answer to a command.

        Raises:
            RuntimeError: the process died of it; with its last words.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it is dead: then there is no answer either
            stdin.write(command + "\n")
            stdin.flush()
        line = stdout.readline()
        if not line:
            words = self._log.read_text(encoding="utf-8", errors="replace")[-2000:]
            raise RuntimeError(f"{self._process.args!r} ended at {command!r}:\n{words}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextlib.contextmanager
def _worker(python: str, side: str, folder: pathlib.Path, way: trainers.Way) -> Iterator[Worker]:
    log = folder / f"{side}-{way.rows_at_once}-{way.remat}.log"
    command = [python, "-P", trainers.__file__, side, str(folder), json.dumps(way._asdict())]
    with log.open("w", encoding="utf-8") as stderr:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True
        )
        with process:
            try:
                yield Worker(process, log)
            finally:
                process.kill()


def _first_change(worker: Worker, given: trainers.Material) -> dict[str, np.ndarray]:
    """What the first step, which also compiles, adds to the weights."""
    worker.ask("step")
    with np.load(worker.ask("weights")["path"]) as file:
        return {name: file[name] - value for name, value in given.weights.items()}


def _in_turn(workers: Mapping[str, Worker], *, rounds: int) -> dict[str, material.Timing]:
    """Steps in turn, as `material.in_turn`; the processor's time is that of each process."""
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            taken[name].append(worker.ask("step"))
    return {
        name: material.Timing(
            median_s=float(np.median([step["wall_s"] for step in steps])),
            fastest_s=min(step["wall_s"] for step in steps),
            cpu_s=float(np.median([step["cpu_s"] for step in steps])),
        )
        for name, steps in taken.items()
    }


def _row(
    name: str, way: trainers.Way, timing: material.Timing, end: Mapping[str, Any]
) -> material.Row:
    return {
        "variant": name,
        "version": end["version"],
        "jax": end["jax"],
        "rows_at_once": way.rows_at_once,
        "remat": way.remat,
        "step_s": timing.median_s,
        "fastest_s": timing.fastest_s,
        "cpu_s": timing.cpu_s,
        "temporaries_mib": end["temporaries_mib"],
        "process_mib": end["process_mib"],
    }
