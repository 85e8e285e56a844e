"""Reward by position on held-out packs: `codjax eval`.

    find who is asked (parameters, or an endpoint) → run every entry of `config.evaluation.matrix`
    → means and intervals per position → eval.json, a table, a plot, a few packs to read

The protocol is that of training, one run per pack. Hidden worlds follow from the members of a
pack, so two checkpoints meet the same worlds and can be compared pack by pack.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import rich.console
import rich.table
from ml_collections import ConfigDict

from codjax import (
    build,
    checks,
    distributed,
    metrics,
    models,
    packs,
    parameters,
    plots,
    policies,
    seeds,
    serving,
    types,
    validation,
    waits,
    workdirs,
)
from codjax import chat as chats
from codjax.envs import ladder
from codjax.rollout import episode as episodes_lib
from codjax.rollout import runner
from codjax.validation import tasks

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluator:
    """What the entries of an evaluation matrix share; one checkpoint after the other goes in."""

    config: ConfigDict
    chat: chats.Chat
    tasksets: Mapping[str, build.TaskSet]
    policy: policies.Policy
    stalls: waits.Waits

    def run(self, candidates: Mapping[str, Any]) -> dict[str, dict[str, list[types.Trajectory]]]:
        """Trajectories of every candidate in every entry of the matrix, one per pack.

        Args:
            candidates: label → parameters for the policy to load.

        Raises:
            EvaluationError: no run came to its end.
        """
        return asyncio.run(self._run(candidates))

    async def _run(
        self, candidates: Mapping[str, Any]
    ) -> dict[str, dict[str, list[types.Trajectory]]]:
        self.stalls.watch("the evaluation", asyncio.get_running_loop())
        # One event loop for all of it: connections belong to the loop that they were made in.
        runs = {}
        try:
            await self.policy.open()
            for label, params in candidates.items():
                _logger.info("Evaluating %s.", label)
                runs[label] = await self._run_matrix(params)
        finally:
            await self.policy.close()
        return runs

    async def _run_matrix(self, params: Any) -> dict[str, list[types.Trajectory]]:
        matrix = self.config.evaluation.matrix
        found: dict[str, list[types.Trajectory]] = {}
        plain: dict[str, list[types.Trajectory]] = {}
        # A swapped hint comes from an undisturbed run of another pack, so those go first.
        for name in sorted(matrix, key=lambda name: matrix[name].condition == "hint_swapped"):
            entry = matrix[name]
            twin = json.dumps([entry.taskset, entry.mode, entry.pack_size, entry.num_packs])
            if entry.condition == "hint_swapped":
                if twin not in plain:
                    plain[twin] = await self._run_entry(params, entry, [])
                    _check_any_succeeded([*found.values(), plain[twin]])
                hints = _swapped_hints(plain[twin])
                found[name] = await self._run_entry(params, entry, hints) if hints else []
            elif entry.condition == "hint_blanked":
                found[name] = await self._run_entry(params, entry, [], blanks_hints=True)
            else:
                found[name] = plain[twin] = await self._run_entry(params, entry, [])
            _check_any_succeeded(list(found.values()))
        return {name: found[name] for name in entry_names(self.config)}

    async def _run_entry(
        self,
        params: Any,
        entry: ConfigDict,
        overrides: list[runner.HintOverride],
        *,
        blanks_hints: bool = False,
    ) -> list[types.Trajectory]:
        await self.policy.load(params)
        taskset = self.tasksets[entry.taskset]
        settings = dataclasses.replace(
            episodes_lib.settings_from(
                self.config.rollout, keep_env_memory=self.config.packs.keep_env_memory
            ),
            temperature=self.config.evaluation.temperature,
            top_p=self.config.evaluation.top_p,
            top_k=self.config.evaluation.top_k,
            blanks_hints=blanks_hints or self.config.rollout.blank_hints,
        )
        all_packs = distributed.share(entry_packs(entry, taskset))
        overrides = distributed.share(overrides)
        at_once = self.policy.num_at_once or max(len(all_packs), 1)
        trajectories: list[types.Trajectory] = []
        for begin in range(0, len(all_packs), at_once):
            part = slice(begin, begin + at_once)
            wait = waits.Wait(
                who="evaluation",
                what=f"{len(all_packs[part])} runs of {taskset.name}",
                deadline_s=self.config.rollout.deadline_s,
                key="rollout.deadline_s",
            )
            runs = runner.run_packs(
                all_packs[part],
                group_size=1,
                tasksets={taskset.name: taskset.rules()},
                sampler=self.policy.sampler,
                chat=self.chat,
                settings=settings,
                seed=seeds.derive_seed(self.config.evaluation.seed, "evaluation"),
                hint_overrides=overrides[part] if overrides else None,
                on_done=lambda: self.stalls.note("evaluation", "a run was over"),
            )
            groups = await self.stalls.within(runs, wait)
            trajectories += [trajectory for (trajectory,) in groups]
        return distributed.merge(distributed.gather(trajectories))


def main(config: ConfigDict, checkpoint: str | int, workdir: str) -> dict[str, Any]:
    """Evaluates a checkpoint and writes eval.json, eval_packs.txt and the plot to the workdir.

    Args:
        config: of the run.
        checkpoint: "latest", "base" (step 0), a step, or a folder: of a run, of an Orbax step, or
            of a Hugging Face model, converted or not; or the address of an endpoint, as
            "http://host:8000/v1".
        workdir: of the run.

    Returns:
        What eval.json holds; see docs/file_formats.md.

    Raises:
        checkpoints.CheckpointError: there is no such checkpoint.
        ConfigError: the endpoint cannot be asked.
        EvaluationError: no run came to its end.
    """
    validation.validate(config)
    folder = pathlib.Path(workdir)
    distributed.check_joined()
    distributed.check_equal(config.to_json_best_effort(sort_keys=True), "the config")
    distributed.check_equal(workdir, "--workdir")
    distributed.check_equal(str(checkpoint), "--checkpoint")
    if distributed.on_main(lambda: _prepare_if_there(folder)):
        distributed.check_shared(folder)
    chat, tasksets = distributed.on_all(lambda: _played(config))
    policy, candidates = _asked(config, chat, checkpoint, workdir)
    stalls = waits.Waits(folder)
    evaluator = Evaluator(config=config, chat=chat, tasksets=tasksets, policy=policy, stalls=stalls)
    runs = evaluator.run(candidates)
    _warn_of_failures(runs)
    (label, trajectories), *others = runs.items()
    report: dict[str, Any] = {"checkpoint": label, **_summary(config, chat, trajectories)}
    for base, base_trajectories in others:
        report["base"] = {"checkpoint": base, **_summary(config, chat, base_trajectories)}
    report["ladder"] = _ladders(config)
    if distributed.is_main():
        workdirs.prepare(folder)
        _write(folder, report, runs)
        show(report)
        _show_packs(runs)
    return report


def _prepare_if_there(folder: pathlib.Path) -> bool:
    """Whether the folder exists; that it can be written to is better known before than after."""
    if folder.exists():
        workdirs.prepare(folder)
    return folder.exists()


def _played(config: ConfigDict) -> tuple[chats.Chat, dict[str, build.TaskSet]]:
    """What is played, and in which tokens."""
    chat = chats.load_chat(config.tokenizer.source)
    names = dict.fromkeys(entry.taskset for entry in config.evaluation.matrix.values())
    return chat, build.load_tasksets(config, list(names))


def _asked(
    config: ConfigDict, chat: chats.Chat, checkpoint: str | int, workdir: str
) -> tuple[policies.Policy, dict[str, Any]]:
    """Who plays, and the parameters to load there, by label."""
    if tasks.is_address(str(checkpoint)):
        address = str(checkpoint)
        tasks.check_address(address)
        endpoint = distributed.on_all(
            lambda: policies.Endpoint(address, config.evaluation.endpoint, chat)
        )
        return endpoint, {endpoint.label: None}
    model, mesh, policy = distributed.on_all(lambda: _parts(config, chat, workdir))
    return policy, parameters.find(config, model, mesh, checkpoint, workdir)


def _parts(
    config: ConfigDict, chat: chats.Chat, workdir: str
) -> tuple[models.Decoder, jax.sharding.Mesh, policies.Policy]:
    """What the config describes, but for the parameters."""
    model = build.make_model(config, chat)
    mesh = build.make_mesh(config, model)
    if config.rollout.sampler == "engine":
        made = build.make_engine(config, model, distributed.sampling_mesh(mesh))
        return model, mesh, policies.InProcess(made, num_at_once=config.engine.num_slots)
    # Not the run's own folder: it may be training meanwhile.
    folder = pathlib.Path(workdir) / "evaluation"
    return model, mesh, policies.Served(serving.make(config, chat, model, mesh, folder=folder))


def entry_names(config: ConfigDict) -> list[str]:
    """Names of the matrix in the order of reports: undisturbed entries, then controls."""
    matrix = config.evaluation.matrix
    return sorted(matrix, key=lambda name: (matrix[name].condition != "none", name))


def entry_packs(entry: ConfigDict, taskset: build.TaskSet) -> list[types.Pack]:
    """The packs of an entry of the matrix: consecutive rows from the start of the task set."""
    per_pack = 1 if entry.mode == types.PackMode.RALPH_FULL else entry.pack_size
    wanted = entry.num_packs * per_pack
    if wanted > len(taskset.records):
        raise ValueError(
            f"evaluation.matrix needs {wanted} rows of tasksets.{taskset.name}, which has "
            f"{len(taskset.records)}; lower num_packs or use more records."
        )
    return packs.make_packs(
        taskset.tasks(wanted), size=entry.pack_size, mode=entry.mode, pad_to_full=False
    )


def summarise(trajectories: Sequence[types.Trajectory], chat: chats.Chat) -> list[dict[str, float]]:
    """Means over packs, position by position, with the half width of their 95 % intervals.

    Args:
        trajectories: one per pack; those with a failure are left out.
        chat: measures the hints.

    Returns:
        Per position: reward, reward_ci95, raw_reward, success, success_ci95, turns, format_error,
        hint_tokens (of the hint that the episode was given), response_tokens; and
        hint_parse_frac, of the updates after the task, where there are any.
    """
    kept = [t for t in trajectories if not t.failure]
    solves = [t.episodes_of(types.EpisodeKind.SOLVE_TASK) for t in kept]
    updates = [t.episodes_of(types.EpisodeKind.UPDATE_CONTEXT) for t in kept]
    positions = [_summarise_solves(episodes, chat) for episodes in zip(*solves, strict=True)]
    for position, episodes in zip(positions, zip(*updates, strict=True), strict=False):
        position["hint_parse_frac"] = float(np.mean([e.is_success for e in episodes]))
    return positions


def _summarise_solves(episodes: Sequence[types.Episode], chat: chats.Chat) -> dict[str, float]:
    """Means over the solve episodes of one position."""
    reward, reward_ci95 = mean_and_ci95([e.reward for e in episodes])
    success, success_ci95 = mean_and_ci95([e.is_success for e in episodes])
    hint_tokens = [len(chat.respond(e.hint_in)) - 1 for e in episodes]
    response_tokens = [sum(len(turn.response_tokens) for turn in e.turns) for e in episodes]
    return {
        "reward": reward,
        "reward_ci95": reward_ci95,
        "raw_reward": float(np.mean([e.raw_reward for e in episodes])),
        "success": success,
        "success_ci95": success_ci95,
        "turns": float(np.mean([len(e.turns) for e in episodes])),
        "format_error": float(np.mean([e.has_format_error for e in episodes])),
        "hint_tokens": float(np.mean(hint_tokens)),
        "response_tokens": float(np.mean(response_tokens)),
    }


def mean_and_ci95(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its normal 95 % interval (0 for a single value)."""
    array = np.asarray(values, np.float64)
    if len(array) < 2:
        return float(array.mean()), 0.0
    return float(array.mean()), float(1.96 * array.std(ddof=1) / np.sqrt(len(array)))


def show(report: Mapping[str, Any]) -> None:
    """Print the report as a table: a line per checkpoint and entry, a column per position."""
    sources = {"base": report["base"]} if "base" in report else {}
    sources["trained" if sources else report["checkpoint"]] = report
    num_positions = max(
        len(entry["positions"]) for source in sources.values() for entry in _entries(source)
    )
    table = rich.table.Table(title=f"Mean reward by position ({report['checkpoint']})")
    table.add_column("")
    for position in range(num_positions):
        table.add_column(f"pos {position}", justify="right")
    for label, source in sources.items():
        for name, entry in source["tasksets"].items():
            rows = {key: [p[key] for p in entry["positions"]] for key in ("reward", "success")}
            for key in rows if rows["reward"] != rows["success"] else ("reward",):
                cells = [f"{p[key]:.3f}±{p[f'{key}_ci95']:.3f}" for p in entry["positions"]]
                table.add_row(
                    f"{label}: {name}" + (", success" if key == "success" else ""), *cells
                )
    for players in report["ladder"].values():
        for player, values in players.items():
            table.add_row(f"exact: {player}", *(f"{value:.3f}" for value in values))
    rich.console.Console().print(table)


def pack_text(trajectory: types.Trajectory) -> str:
    """A trajectory to read: per task the hint, what was seen and done, the reward, the new hint."""
    lines = [f"pack seed {trajectory.pack.seed}"]
    for e in trajectory.episodes:
        turns = "  ".join(
            f"{observation}→{action}"
            for observation, action in zip(e.observations, e.actions, strict=False)
        )
        if e.kind is types.EpisodeKind.SOLVE_TASK:
            lines.append(f"  task {e.position}  hint {e.hint_in}  {turns}  reward {e.reward:.2f}")
        else:
            lines.append(f"          new hint {e.hint_out}")
    return "\n".join(lines)


def _show_packs(runs: Mapping[str, Mapping[str, Sequence[types.Trajectory]]]) -> None:
    """Print the first pack of the first entry, before and after."""
    console = rich.console.Console()
    for label, entries in reversed(list(runs.items())):
        name, trajectories = next(iter(entries.items()))
        console.print(f"\nThe first pack of {name}, {label}:")
        console.print(pack_text(trajectories[0]), markup=False, highlight=False)


def _check_any_succeeded(entries: Sequence[Sequence[types.Trajectory]]) -> None:
    """Raises if every run so far failed: the others would as well, after long waits."""
    runs = [run for entry in entries for run in entry]
    if not runs or any(run.failure is None for run in runs):
        return
    last = runs[-1]
    words = [episode.feedback for episode in last.episodes[-1:] if episode.feedback]
    raise checks.EvaluationError(
        f"all {len(runs)} runs failed, so that there is nothing to report; the last one by "
        f"{': '.join([str(last.failure), *words])}"
    )


def _warn_of_failures(runs: Mapping[str, Mapping[str, Sequence[types.Trajectory]]]) -> None:
    """Says which entries are means over fewer runs than were asked for."""
    for label, entries in runs.items():
        for name, trajectories in entries.items():
            num_failed = sum(trajectory.failure is not None for trajectory in trajectories)
            if num_failed:
                _logger.warning(
                    "%s, %s: %d of %d runs failed and are left out (dropped_packs in eval.json).",
                    label,
                    name,
                    num_failed,
                    len(trajectories),
                )


def _swapped_hints(donors: Sequence[types.Trajectory]) -> list[runner.HintOverride]:
    """Per pack, the hints that the next intact pack had at the same positions; [] without two."""
    intact = [i for i, donor in enumerate(donors) if donor.failure is None]
    if len(intact) < 2:
        _logger.warning("No hints to swap: fewer than two packs ran to their end.")
        return []

    def override(index: int) -> runner.HintOverride:
        after = [i for i in intact if i > index] + [i for i in intact if i < index]
        solves = donors[after[0]].episodes_of(types.EpisodeKind.SOLVE_TASK)
        return lambda position, hint: solves[position].hint_in

    return [override(index) for index in range(len(donors))]


def _summary(
    config: ConfigDict, chat: chats.Chat, runs: Mapping[str, Sequence[types.Trajectory]]
) -> dict[str, Any]:
    matrix = config.evaluation.matrix
    return {
        "tasksets": {
            name: {
                "taskset": matrix[name].taskset,
                "mode": matrix[name].mode,
                "condition": matrix[name].condition,
                "num_packs": sum(t.failure is None for t in trajectories),
                "dropped_packs": sum(t.failure is not None for t in trajectories),
                "positions": summarise(trajectories, chat),
            }
            for name, trajectories in runs.items()
        }
    }


def _entries(source: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return list(source["tasksets"].values())


def _ladders(config: ConfigDict) -> dict[str, dict[str, list[float]]]:
    """Exact rewards of reference players, for the undisturbed entries where they are known."""
    found = {}
    for name in entry_names(config):
        entry = config.evaluation.matrix[name]
        if entry.condition == "none" and entry.mode == "cod":
            taskset = config.tasksets[entry.taskset]
            exact = ladder.LADDERS.get(taskset.env)
            if exact is not None:
                found[name] = exact(
                    entry.pack_size, taskset.settings.to_dict(), taskset.data.to_dict()
                )
    return found


def _write(
    workdir: pathlib.Path,
    report: Mapping[str, Any],
    runs: Mapping[str, Mapping[str, Sequence[types.Trajectory]]],
) -> None:
    temporary = workdir / "eval.json.new"
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    temporary.replace(workdir / "eval.json")
    texts = [
        f"## {label}, {name}\n\n" + "\n\n".join(pack_text(t) for t in trajectories[:3])
        for label, entries in runs.items()
        for name, trajectories in entries.items()
    ]
    (workdir / "eval_packs.txt").write_text("\n\n".join(texts) + "\n")
    lines = {}
    for label, source in (("base model", report.get("base")), ("trained", report)):
        for name, entry in (source or {"tasksets": {}})["tasksets"].items():
            # The controls of the base model would hide one another.
            if entry["positions"] and (label == "trained" or entry["condition"] == "none"):
                lines[f"{label}: {name}"] = entry["positions"]
    first: Mapping[str, Sequence[float]] = next(iter(report["ladder"].values()), {})
    plots.plot_reward_by_position(lines, first, workdir / "reward_by_position.png")
    if (workdir / metrics.METRICS_FILE).exists():
        plots.plot_training(workdir / metrics.METRICS_FILE, workdir / "training.png")
