"""Reward by position on held-out packs: `codjax eval`.

    load parameters → run every entry of `config.evaluation.matrix` → means and intervals per
    position → eval.json, a table, a plot, a few packs to read

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
    checkpoints,
    checks,
    distributed,
    learner,
    metrics,
    models,
    packs,
    plots,
    seeds,
    sharding,
    types,
    validation,
    workdirs,
)
from codjax import chat as chats
from codjax.envs import ladder
from codjax.rollout import engine, runner
from codjax.rollout import episode as episodes_lib

_logger = logging.getLogger(__name__)

# What a checkpoint cannot tell by its shapes, and must be as in training.
_SAME = (
    "tokenizer",
    "model.source",
    "model.num_layers",
    "model.hidden_size",
    "model.intermediate_size",
    "model.num_heads",
    "model.num_kv_heads",
    "model.head_dim",
    "model.rope_theta",
    "model.norm_eps",
    "model.tie_embeddings",
)
_SAME_EXPERTS = ("model.experts_per_token", "model.norm_topk_prob")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluator:
    """What the entries of an evaluation matrix share; one checkpoint after the other goes in."""

    config: ConfigDict
    chat: chats.Chat
    tasksets: Mapping[str, build.TaskSet]
    sampler: engine.Engine

    def run(self, params: learner.Params) -> dict[str, list[types.Trajectory]]:
        """Trajectories of every entry of the matrix under these parameters, one per pack."""
        matrix = self.config.evaluation.matrix
        found: dict[str, list[types.Trajectory]] = {}
        plain: dict[str, list[types.Trajectory]] = {}
        # A swapped hint comes from an undisturbed run of another pack, so those go first.
        for name in sorted(matrix, key=lambda name: matrix[name].condition == "hint_swapped"):
            entry = matrix[name]
            twin = json.dumps([entry.taskset, entry.mode, entry.pack_size, entry.num_packs])
            if entry.condition == "hint_swapped":
                if twin not in plain:
                    plain[twin] = self._run_entry(params, entry, [])
                hints = _swapped_hints(plain[twin])
                found[name] = self._run_entry(params, entry, hints) if hints else []
            elif entry.condition == "hint_blanked":
                found[name] = self._run_entry(params, entry, [], blanks_hints=True)
            else:
                found[name] = plain[twin] = self._run_entry(params, entry, [])
        return {name: found[name] for name in entry_names(self.config)}

    def _run_entry(
        self,
        params: learner.Params,
        entry: ConfigDict,
        overrides: list[runner.HintOverride],
        *,
        blanks_hints: bool = False,
    ) -> list[types.Trajectory]:
        # Anew for every entry, so that none depends on what the others left in the cache.
        self.sampler.load_weights(params, policy_version=0)
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
        # As many at once as the sampler has slots: each run then finds its own prefix again.
        at_once, trajectories = self.config.engine.num_slots, []
        for begin in range(0, len(all_packs), at_once):
            part = slice(begin, begin + at_once)
            groups = asyncio.run(
                runner.run_packs(
                    all_packs[part],
                    group_size=1,
                    tasksets={taskset.name: taskset.rules()},
                    sampler=self.sampler,
                    chat=self.chat,
                    settings=settings,
                    seed=seeds.derive_seed(self.config.evaluation.seed, "evaluation"),
                    hint_overrides=overrides[part] if overrides else None,
                )
            )
            trajectories += [trajectory for (trajectory,) in groups]
        return distributed.merge(distributed.gather(trajectories))


def main(config: ConfigDict, checkpoint: str | int, workdir: str) -> dict[str, Any]:
    """Evaluates a checkpoint and writes eval.json, eval_packs.txt and the plot to the workdir.

    Args:
        config: of the run.
        checkpoint: "latest", "base" (step 0), a step, or a folder: of a run, of an Orbax step, or
            of a Hugging Face model, converted or not.
        workdir: of the run.

    Returns:
        What eval.json holds; see docs/file_formats.md.

    Raises:
        checkpoints.CheckpointError: there is no such checkpoint.
    """
    validation.validate(config)
    folder = pathlib.Path(workdir)
    distributed.check_joined()
    distributed.check_equal(config.to_json_best_effort(sort_keys=True), "the config")
    distributed.check_equal(workdir, "--workdir")
    distributed.check_equal(str(checkpoint), "--checkpoint")
    if distributed.on_main(lambda: _prepare_if_there(folder)):
        distributed.check_shared(folder)
    model, mesh, evaluator = distributed.on_all(lambda: _parts(config))
    candidates = _candidates(config, model, mesh, checkpoint, workdir)
    runs = {}
    for label, params in candidates.items():
        _logger.info("Evaluating %s.", label)
        alone = distributed.num_processes() == 1
        runs[label] = evaluator.run(params if alone else distributed.local_weights(params))
    (label, trajectories), *others = runs.items()
    report: dict[str, Any] = {"checkpoint": label, **_summary(config, evaluator.chat, trajectories)}
    for base, base_trajectories in others:
        report["base"] = {"checkpoint": base, **_summary(config, evaluator.chat, base_trajectories)}
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


def _parts(config: ConfigDict) -> tuple[models.Decoder, jax.sharding.Mesh, Evaluator]:
    """What the config describes, but for the parameters."""
    chat = chats.load_chat(config.tokenizer.source)
    model = build.make_model(config, chat)
    mesh = build.make_mesh(config, model)
    names = dict.fromkeys(entry.taskset for entry in config.evaluation.matrix.values())
    evaluator = Evaluator(
        config=config,
        chat=chat,
        tasksets=build.load_tasksets(config, list(names)),
        sampler=build.make_engine(config, model, distributed.sampling_mesh(mesh)),
    )
    return model, mesh, evaluator


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


def _candidates(
    config: ConfigDict,
    model: models.Decoder,
    mesh: jax.sharding.Mesh,
    checkpoint: str | int,
    workdir: str,
) -> dict[str, learner.Params]:
    """Parameters to evaluate by label: the checkpoint asked for, then the base model.

    Which they are is decided on one process: another may have an older list of the same folder.
    """
    workdir, text, is_run = distributed.on_main(lambda: _where(str(checkpoint), workdir))
    if not is_run:
        folder = pathlib.Path(workdir)
        with checks.reading("--checkpoint"):
            published = models.from_pretrained(
                folder,
                dtype=config.model.dtype,
                param_dtype=config.model.param_dtype,
                place=sharding.place(mesh),
            )
        _check_same_model(folder, published, model)
        return {workdir: build.params_of(published)}
    same = _SAME + (_SAME_EXPERTS if model.config.num_experts else ())
    distributed.on_main(lambda: workdirs.check_same(pathlib.Path(workdir), config, same))
    store = checkpoints.Checkpoints(workdir, keep=config.checkpoint.keep, read_only=True)
    like = build.abstract_params(model, mesh)
    try:
        steps = distributed.on_main(lambda: _steps_of(text, store, workdir, config))
        return {f"step {step}": store.restore_params(step, like) for step in steps}
    finally:
        store.close()


def _where(checkpoint: str, workdir: str) -> tuple[str, str, bool]:
    """The folder that holds a checkpoint, which one of it, and whether it is that of a run."""
    folder = pathlib.Path(checkpoint)
    if (folder / "checkpoints").is_dir():  # of another run
        return checkpoint, "latest", True
    if (folder / "config.json").exists():  # published weights
        return checkpoint, "", False
    if folder.is_dir() and folder.name.isdecimal():  # the folder of an Orbax step
        return str(folder.resolve().parent.parent), folder.name, True
    return workdir, checkpoint, True


def _check_same_model(
    folder: pathlib.Path, published: models.Decoder, model: models.Decoder
) -> None:
    """Weights alone do not tell the sizes of heads or the rotary base: those are the config's."""
    found, wanted = published.config.to_hf(), model.config.to_hf()
    # The longest text that is served changes no weight; a family may lack fields of another.
    names = (found.keys() | wanted.keys()) - {"max_position_embeddings"}
    different = sorted(name for name in names if found.get(name) != wanted.get(name))
    if different:
        raise checkpoints.CheckpointError(
            f"{folder} holds another model than the config's: {', '.join(different)} differ; set "
            "config.model to the sizes in its config.json, or config.model.source to the folder."
        )


def _steps_of(
    text: str, store: checkpoints.Checkpoints, workdir: str, config: ConfigDict
) -> list[int]:
    """The step that was asked for, and step 0 if it is to be compared with that."""
    step = _step_of(text, store, workdir)
    has_base = config.evaluation.compare_base and step != 0 and 0 in store.steps()
    return [step, 0] if has_base else [step]


def _step_of(text: str, store: checkpoints.Checkpoints, workdir: str) -> int:
    latest = store.latest_step()
    if latest is None:
        raise checkpoints.CheckpointError(
            f"{workdir} holds no finished checkpoint; train first: codjax train --workdir={workdir}"
        )
    if text in ("latest", "base"):
        return latest if text == "latest" else 0
    if not text.isdecimal():
        raise checkpoints.CheckpointError(
            "--checkpoint must be latest, base, a step, or the folder of a run, of a step "
            f"(DIR/checkpoints/50) or of a Hugging Face model; got {text!r}."
        )
    return int(text)


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
