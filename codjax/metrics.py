"""Numbers of a rollout step, and the files they and sampled trajectories are written to.

Once per step: `rollout_metrics` reduces the trajectories to `area/name` numbers, `MetricsWriter`
writes them (with the learner's) as one line of metrics.jsonl, and now and then
`TrajectoryWriter` writes whole groups to trajectories/. docs/metrics.md tells every metric,
docs/file_formats.md every field.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from codjax import scoring, seeds
from codjax.checks import NonFiniteMetricError
from codjax.types import Episode, EpisodeKind, StopReason, Trajectory, Turn, VersionSpan

METRICS_FILE = "metrics.jsonl"


def rollout_metrics(
    groups: Sequence[Sequence[Trajectory]], *, policy_version: int
) -> dict[str, float]:
    """Every number about the rollouts of one step (spec/algorithm.md §15).

    Dropped runs (those with a `failure`) are counted and are part of no other number. Means are
    over what is there: a key of something that nobody reached is absent, not 0.

    Args:
        groups: the runs of each pack.
        policy_version: of the weights about to be updated; ages are counted from it.

    Returns:
        `area/name` -> number; see docs/metrics.md.
    """
    runs = [run for group in groups for run in group]
    kept = [run for run in runs if run.failure is None]
    solves = [e for run in kept for e in run.episodes_of(EpisodeKind.SOLVE_TASK)]
    updates = [e for run in kept for e in run.episodes_of(EpisodeKind.UPDATE_CONTEXT)]
    turns = [turn for episode in [*solves, *updates] for turn in episode.turns]
    spans = [span for turn in turns for span in turn.version_spans]
    metrics = {
        "rollout/num_runs": float(len(runs)),
        "rollout/dropped_runs": float(len(runs) - len(kept)),
        "rollout/response_tokens": float(sum(len(turn.response_tokens) for turn in turns)),
    }
    metrics |= _mean("rollout/truncated_frac", [t.stop_reason is StopReason.LENGTH for t in turns])
    too_long = [e.stop_reason is StopReason.PROMPT_TOO_LONG for e in [*solves, *updates]]
    metrics |= _mean("rollout/prompt_too_long_frac", too_long)
    metrics |= _staleness(spans, policy_version)
    metrics |= _reward_metrics(solves, "")
    for name, value in {
        "turns": lambda e: len(e.turns),
        "response_tokens": _response_tokens,
        "format_error": lambda e: e.has_format_error,
    }.items():
        metrics |= _by_position(f"{name}/", solves, value)
    metrics |= _hint_metrics(updates)
    metrics |= _taskset_metrics(kept)
    return metrics


def _staleness(spans: Sequence[VersionSpan], policy_version: int) -> dict[str, float]:
    """Age of the weights that sampled a token, over tokens."""
    sizes = [span.end - span.start for span in spans]
    if not sum(sizes):
        return {}
    ages = [policy_version - span.version for span in spans]
    total = sum(age * size for age, size in zip(ages, sizes, strict=True))
    return {"staleness/mean": total / sum(sizes), "staleness/max": float(max(ages))}


def _reward_metrics(solves: Sequence[Episode], taskset: str) -> dict[str, float]:
    """Rewards and success; `taskset` is "" for all, else the name and a slash."""
    metrics = _mean(f"reward/{taskset}mean", [episode.reward for episode in solves])
    rewards = _by_position(f"reward/{taskset}", solves, lambda e: e.reward)
    metrics |= rewards
    metrics |= _by_position(f"raw_reward/{taskset}", solves, lambda e: e.raw_reward)
    metrics |= _by_position(f"success/{taskset}", solves, lambda e: e.is_success)
    if len(rewards) > 1:
        by_position = list(rewards.values())
        metrics[f"reward/{taskset}gap"] = by_position[-1] - by_position[0]
    return metrics


def _hint_metrics(updates: Sequence[Episode]) -> dict[str, float]:
    """How the writing of hints goes; position k is the update after task k."""
    parsed = [episode for episode in updates if episode.is_success]
    return {
        **_mean("hint/parse_frac", [episode.is_success for episode in updates]),
        **_by_position("hint/parse_frac_", updates, lambda e: e.is_success),
        **_by_position("hint/length_chars_", parsed, lambda e: len(e.hint_out)),
        **_by_position("hint/response_tokens_", updates, _response_tokens),
    }


def _taskset_metrics(runs: Sequence[Trajectory]) -> dict[str, float]:
    """The rewards again, per task set, where a step has more than one."""
    solves: dict[str, list[Episode]] = {}
    for run in runs:
        solves.setdefault(run.pack.tasks[0].taskset, []).extend(
            run.episodes_of(EpisodeKind.SOLVE_TASK)
        )
    metrics: dict[str, float] = {}
    if len(solves) > 1:
        for name in sorted(solves):
            metrics |= _reward_metrics(solves[name], f"{name}/")
    return metrics


def _by_position(
    prefix: str, episodes: Sequence[Episode], value: Callable[[Episode], float]
) -> dict[str, float]:
    """Mean of a value at each position that was reached, in order of position."""
    values: dict[int, list[float]] = {}
    for episode in episodes:
        values.setdefault(episode.position, []).append(value(episode))
    return {
        f"{prefix}position_{position}": math.fsum(values[position]) / len(values[position])
        for position in sorted(values)
    }


def _mean(key: str, values: Sequence[float]) -> dict[str, float]:
    return {key: math.fsum(values) / len(values)} if values else {}


def _response_tokens(episode: Episode) -> int:
    return sum(len(turn.response_tokens) for turn in episode.turns)


class MetricsWriter:
    """Owns metrics.jsonl and the TensorBoard events of a workdir, until `close`.

    On start, lines of `start_step` and later, and a line torn by a crash, are removed: what a run
    resumes from a checkpoint is written again, and the file ends up as if it had never stopped.
    One process per workdir may write. Use it as a context manager, or call `close`.

    Args:
        workdir: folder of the run; made if missing.
        start_step: the first step that will be written.
        tensorboard: whether to write event files too, to `workdir/tensorboard`.
        writes: False on all processes of a run but the first: they check the numbers, since all
            must stop at the same one, and write nothing.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        start_step: int,
        tensorboard: bool,
        *,
        writes: bool = True,
    ) -> None:
        folder = pathlib.Path(workdir)
        self._last_step = start_step - 1
        self._path = folder / METRICS_FILE
        self._file: Any = None
        self._events: Any = None
        if writes:
            folder.mkdir(parents=True, exist_ok=True)
            _truncate(self._path, start_step)
            self._file = self._path.open("a", encoding="utf-8")
        if writes and tensorboard:
            import tensorboardX

            self._events = tensorboardX.SummaryWriter(
                logdir=str(folder / "tensorboard"), purge_step=start_step
            )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes the numbers of one step; steps must rise.

        Equal numbers give equal bytes: keys are sorted, floats are written shortest.

        Raises:
            NonFiniteMetricError: a value is nan or infinite; nothing is written then.
            ValueError: the step was written before.
        """
        if step <= self._last_step:
            raise ValueError(
                f"metrics of step {step} come after those of step {self._last_step}: every step "
                "is written once, in order."
            )
        line: dict[str, int | float] = {"step": step}
        for key in sorted(metrics):
            value = metrics[key]
            if not math.isfinite(value):
                raise NonFiniteMetricError(
                    f"{key} is {float(value)} at step {step}: the run stops here; look at the "
                    f"steps before it in {self._path}, and at optimizer.learning_rate and "
                    "optimizer.grad_clip_norm."
                )
            line[key] = int(value) if isinstance(value, (int, np.integer)) else float(value)
        self._last_step = step
        if self._file is not None:
            self._file.write(json.dumps(line, sort_keys=True) + "\n")
            self._file.flush()
        if self._events is not None:
            for key in sorted(metrics):
                self._events.add_scalar(key, float(metrics[key]), global_step=step)
            self._events.flush()

    def close(self) -> None:
        """Closes the files; nothing may be written afterwards."""
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl, without a last one that a crash has torn.

    Raises:
        ValueError: a line that is not the last one is no JSON object.
    """
    lines = pathlib.Path(path).read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{path} line {number} is not JSON; remove or mend it.") from error
            # After the last newline stands nothing, or the beginning of a line.
    return rows


def _truncate(path: pathlib.Path, start_step: int) -> None:
    """Drops the lines of `start_step` and later, and a torn one, in one atomic step."""
    if not path.exists():
        return
    rows = read_metrics(path)
    kept = [json.dumps(row, sort_keys=True) + "\n" for row in rows if row["step"] < start_step]
    _write_atomically(path, kept)


class TrajectoryWriter:
    """Writes sampled groups to trajectories/step_000010.jsonl, a file a step, for people to read.

    Holds nothing open. A step that is written again after a resume replaces its file.

    Args:
        workdir: folder of the run.
        seed: of the run; draws the random group of each step.
        packs_per_step: how many groups to write: a random one, the best, the worst, then more
            random ones. With one, it is the random one, which flatters nobody.
        decode: token ids -> text, special tokens shown.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        seed: int,
        packs_per_step: int,
        decode: Callable[[np.ndarray], str],
    ) -> None:
        self._folder = pathlib.Path(workdir) / "trajectories"
        self._seed = seed
        self._packs_per_step = packs_per_step
        self._decode = decode

    def write(
        self,
        step: int,
        groups: Sequence[Sequence[Trajectory]],
        scored: Sequence[Sequence[scoring.ScoredTrajectory]] | None = None,
    ) -> pathlib.Path:
        """Writes whole groups of this step, one JSON object a trajectory.

        Args:
            step: the step that the trajectories were sampled for.
            groups: the runs of each pack.
            scored: their credit, as `scoring.score_trajectories` gives it, group by group.

        Returns:
            The file.
        """
        seed = seeds.derive_seed(self._seed, "trajectories", step)
        lines = []
        for index, picked in pick_groups(groups, self._packs_per_step, seed=seed):
            scores = {s.trajectory.run: s for s in scored[index]} if scored is not None else {}
            for run in groups[index]:
                row = {"step": step, "group": index, "picked": picked}
                row |= trajectory_json(run, self._decode, scores.get(run.run))
                lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"step_{step:06d}.jsonl"
        _write_atomically(path, lines)
        return path


def pick_groups(
    groups: Sequence[Sequence[Trajectory]], num_groups: int, *, seed: int
) -> list[tuple[int, str]]:
    """Which groups to show: (index, "random" | "best" | "worst"), without repetition.

    Best and worst go by the mean reward of a group's kept runs; a group that has none is neither.
    """
    means: dict[int, float] = {}
    for index, group in enumerate(groups):
        rewards = [
            episode.reward
            for run in group
            if run.failure is None
            for episode in run.episodes_of(EpisodeKind.SOLVE_TASK)
        ]
        if rewards:
            means[index] = math.fsum(rewards) / len(rewards)
    order = list(range(len(groups)))
    random.Random(seed).shuffle(order)
    wishes = [(index, "random") for index in order]
    extremes = []
    if means:
        extremes = [
            (max(means, key=lambda index: means[index]), "best"),
            (min(means, key=lambda index: means[index]), "worst"),
        ]
    picked: dict[int, str] = {}
    for index, why in [*wishes[:1], *extremes, *wishes[1:]]:
        if len(picked) < num_groups:
            picked.setdefault(index, why)
    return list(picked.items())


def trajectory_json(
    run: Trajectory,
    decode: Callable[[np.ndarray], str],
    scored: scoring.ScoredTrajectory | None = None,
) -> dict[str, Any]:
    """A trajectory as plain JSON values; docs/file_formats.md tells the fields."""
    episodes = []
    for index, episode in enumerate(run.episodes):
        row = _episode_json(episode, decode)
        if scored is not None:
            row |= {"score": scored.scores[index], "return": scored.returns[index]}
        episodes.append(row)
    pack = run.pack
    return {
        "pack": {
            "mode": str(pack.mode),
            "seed": pack.seed,
            "taskset": pack.tasks[0].taskset,
            "tasks": [{"index": task.index, "record": dict(task.record)} for task in pack.tasks],
        },
        "run": run.run,
        "failure": None if run.failure is None else str(run.failure),
        "episodes": episodes,
    }


def _episode_json(episode: Episode, decode: Callable[[np.ndarray], str]) -> dict[str, Any]:
    return {
        "kind": str(episode.kind),
        "position": episode.position,
        "raw_reward": episode.raw_reward,
        "reward": episode.reward,
        "is_success": episode.is_success,
        "has_format_error": episode.has_format_error,
        "stop_reason": str(episode.stop_reason),
        "hint_in": episode.hint_in,
        "hint_out": episode.hint_out,
        "feedback": episode.feedback,
        "observations": list(episode.observations),
        "actions": list(episode.actions),
        "turns": [_turn_json(turn, decode) for turn in episode.turns],
    }


def _turn_json(turn: Turn, decode: Callable[[np.ndarray], str]) -> dict[str, Any]:
    return {
        "prompt": decode(turn.prompt_tokens),
        "response": decode(turn.response_tokens),
        "prompt_tokens": np.asarray(turn.prompt_tokens).tolist(),
        "response_tokens": np.asarray(turn.response_tokens).tolist(),
        # Shortest text that gives the float32 back: a third of the digits of a float64.
        "sampler_logprobs": [float(str(x)) for x in turn.sampler_logprobs.astype(np.float32)],
        "policy_version": turn.policy_version,
        "version_spans": [[s.version, s.start, s.end] for s in turn.version_spans],
        "stop_reason": str(turn.stop_reason),
    }


def _write_atomically(path: pathlib.Path, lines: Iterable[str]) -> None:
    """The file is the old one or the new one at any moment, never a part of it."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
