"""The whole run, top to bottom: `codjax train`.

    tasks ─packs→ Pack ─rollout→ Trajectory ─credit→ scores ─batching→ TokenBatch ─update→ weights
      ↑                                                                                      │
      └────────── a later step ←── serving.load(version + 1) ←── serving.stage ←─────────────┘

Read `main`, then `_loop` and `_train_on`; what is above the learner happens in the thread of
`rollouts.open_pipeline`, as far ahead as `rollout.max_staleness` allows. Every random number is
derived from the seed by name and step. Where the sampler draws from it too (the engine) and the
clock has no say (no in-flight updates, one step ahead at most, weights every step), a run is a
function of its config, and one that was killed and started again writes what it would have written.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import json
import logging
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from ml_collections import ConfigDict

from codjax import (
    batching,
    build,
    checkpoints,
    checks,
    distributed,
    learner,
    losses,
    memory,
    metrics,
    models,
    pipeline,
    progress,
    replay,
    rollouts,
    scoring,
    serving,
    types,
    validation,
    waits,
    warmup,
    workdirs,
)
from codjax import chat as chats
from codjax.rollout import settings as rollout_settings

_logger = logging.getLogger(__name__)


def main(config: ConfigDict, workdir: str) -> None:
    """Trains, or goes on training, the run of this config in this folder.

    Args:
        config: see `codjax.config.default_config`.
        workdir: of the run; when it holds a checkpoint, the run goes on from there.

    Where several processes train together, each of them calls this, with the same arguments.

    Raises:
        validation.ConfigError: the config cannot work, or is not the one the workdir began with.
        checks.StoppedError: the run was asked to stop; a checkpoint is written.
    """
    validation.validate(config)
    folder = pathlib.Path(workdir)
    distributed.check_joined()
    distributed.check_equal(config.to_json_best_effort(sort_keys=True), "the config")
    distributed.check_equal(workdir, "--workdir")
    distributed.on_main(lambda: workdirs.prepare(folder))
    distributed.on_main(lambda: workdirs.check_resumes(folder, config))
    distributed.check_shared(folder)
    if _is_complete(folder, config):
        _logger.info("%s has its %d steps already.", folder, config.num_steps)
        return
    run = distributed.on_all(lambda: _Run.of(config, folder))
    asyncio.run(serving.check(config, run.chat, run.model))
    if distributed.is_main():
        workdirs.write_config(folder, config)
    store = checkpoints.Checkpoints(folder, keep=config.checkpoint.keep)
    try:
        state, loop = _begin(run, store, folder)
        _loop(run, store, folder, state, loop)
    finally:
        store.close()


def _is_complete(folder: pathlib.Path, config: ConfigDict) -> bool:
    """Whether nothing is left to do; servers need not be there for that."""
    if not distributed.on_main((folder / checkpoints.FOLDER).is_dir):
        return False
    # Orbax has all processes open a folder together, even one that is only read.
    store = checkpoints.Checkpoints(folder, keep=config.checkpoint.keep, read_only=True)
    latest = store.latest_step()
    store.close()
    return distributed.on_main(lambda: latest is not None and latest >= config.num_steps > 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run:
    """The parts of a run; none of them changes while it goes on, but for the sampler's weights."""

    config: ConfigDict
    chat: chats.Chat
    tasksets: Mapping[str, build.TaskSet]
    model: models.Decoder  # without weights
    mesh: jax.sharding.Mesh
    learner: learner.Learner
    serving: serving.Serving
    rules: scoring.Rules

    @classmethod
    def of(cls, config: ConfigDict, folder: pathlib.Path) -> _Run:
        """The parts that the config describes."""
        chat = chats.load_chat(config.tokenizer.source)
        model = build.make_model(config, chat)
        mesh = build.make_mesh(config, model)
        made = build.policy_learner(config, model, mesh)
        if config.rollout.sampler == "engine":
            memory.check_sampler(config, model, made, mesh)
        return cls(
            config=config,
            chat=chat,
            tasksets=build.load_tasksets(config, config.rollout.tasksets),
            model=model,
            mesh=mesh,
            learner=made,
            serving=serving.make(config, chat, model, mesh, folder=folder),
            rules=scoring.make_rules(config.credit),
        )

    def source(self, stalls: waits.Waits) -> rollouts.Source:
        """What samples its rollout steps."""
        return rollouts.Source(
            config=self.config,
            chat=self.chat,
            tasksets=self.tasksets,
            settings=rollout_settings.settings_from(
                self.config.rollout, keep_env_memory=self.config.packs.keep_env_memory
            ),
            serving=self.serving,
            stalls=stalls,
        )


def _begin(
    run: _Run, store: checkpoints.Checkpoints, folder: pathlib.Path
) -> tuple[learner.TrainState, dict[str, Any]]:
    """State and position to go on from: the newest checkpoint, else the model after warm-up."""
    # Decided by one: others may have an older list of the same folder.
    latest = distributed.on_main(store.latest_step)
    if latest is not None:
        _logger.info("Resuming %s from step %d.", folder, latest)
        return store.restore(latest, run.learner.abstract_state())
    state = run.learner.init_state(_warm_up(run, folder))
    loop = {"step": 0, **rollouts.position_to_json(pipeline.Position())}
    store.save(0, state, loop)
    return state, loop


def _warm_up(run: _Run, folder: pathlib.Path) -> learner.Params:
    """The parameters that RL begins with: the first ones, after the warm-up if there is one."""
    num_steps = run.config.warmup.num_steps
    params = build.first_params(run.config, run.model, run.mesh)
    if not num_steps:
        return params
    steps = warmup.run(
        run.config,
        chat=run.chat,
        model=run.model,
        params=params,
        mesh=run.mesh,
        tasksets=list(run.tasksets.values()),
    )
    with (
        open(folder / "warmup.jsonl" if distributed.is_main() else os.devnull, "w") as file,
        progress.Progress("warm-up", total=num_steps, every=100) as bar,
    ):
        for step, (state, step_metrics) in enumerate(steps, start=1):
            params = state.params
            if step % 50 == 0 or step == num_steps:
                file.write(json.dumps({"step": step} | step_metrics, sort_keys=True) + "\n")
            bar.update(step, f"loss {step_metrics['loss/total']:.3f}")
    return params


def _loop(
    run: _Run,
    store: checkpoints.Checkpoints,
    folder: pathlib.Path,
    state: learner.TrainState,
    loop: dict[str, Any],
) -> None:
    """Steps from the loop's position to the end."""
    config, start = run.config, loop["step"]
    reference = _reference(run, store)
    trajectories = metrics.TrajectoryWriter(
        folder,
        seed=config.seed,
        packs_per_step=config.metrics.packs_per_step,
        decode=run.chat.show,
    )
    is_main, version, stalls = distributed.is_main(), int(state.step), waits.Waits(folder)
    with (
        metrics.MetricsWriter(
            folder, start + 1, config.metrics.tensorboard, writes=is_main
        ) as writer,
        progress.Progress("train", total=config.num_steps, start=start) as bar,
        distributed.StopRequest() as stop,
        rollouts.open_pipeline(
            run.source(stalls),
            stop=stop,
            position=rollouts.position_from_json(start, loop),
        ) as ahead,
    ):
        saved = start

        def save(step: int) -> None:
            nonlocal saved
            if step > saved:
                position = rollouts.position_to_json(ahead.position())
                store.save(step, state, {"step": step, **position})
                saved = step

        ahead.offer(run.serving.stage(state.params, version=version), version=version)
        for step in range(start, config.num_steps):
            clock = _Clock()
            drawn = ahead.take(version + 1)
            if drawn is None:  # told to stop
                _stop(save, step)
            clock.lap("wait_rollout_s")
            with stalls.guarded(_wait_for_step(config, step + 1)):
                groups = rollouts.of_all(drawn.item.payload)
                rollouts.check_any_answered(drawn.item.step, groups)
                clock.lap("exchange_s")
                stalls.note("learner", f"step {step + 1}: trajectories are there")
                state, scored, numbers = _train_on(
                    run, state, groups, reference, clock, version=version
                )
                if is_main and not numbers["batching/trained_tokens"]:
                    _logger.warning(
                        "Step %d has nothing to train on: no run was kept, or none was sampled.",
                        step + 1,
                    )
                numbers |= metrics.rollout_metrics(groups, policy_version=version)
                version = int(state.step)  # lags behind `step` by the steps without training
                clock.lap("metrics_s")
                stalls.note("learner", f"step {step + 1}: updated")
                if ahead.is_due(version):
                    ahead.offer(run.serving.stage(state.params, version=version), version=version)
                clock.lap("stage_s")
                stalls.note("learner", f"step {step + 1}: weights are made")
                ahead.consumed(drawn)
                numbers |= _rollout_numbers(run, drawn)
                numbers |= clock.metrics(numbers)
                writer.write(step + 1, numbers)
                if is_main and (step + 1) % config.metrics.packs_every_steps == 0:
                    trajectories.write(step + 1, groups, scored)
                bar.update(step + 1, progress.reward_text(numbers), step_s=numbers["time/step_s"])
                if step == start:  # all that lives for ever is there: collections need not visit it
                    gc.freeze()  # each took 0.15 s of every thread
                is_last = step + 1 == config.num_steps
                if (step + 1) % config.checkpoint.every_steps == 0 or is_last:
                    save(step + 1)
                if not is_last and stop.is_asked():
                    _stop(save, step + 1)


def _wait_for_step(config: ConfigDict, step: int) -> waits.Wait:
    """The learner's part of a step: collectives and writes, which nothing can interrupt."""
    return waits.Wait(
        who="learner",
        what=f"the exchange, the update, the weights or the checkpoint of step {step}",
        deadline_s=config.rollout.deadline_s,
        key="rollout.deadline_s",
    )


def _stop(save: Callable[[int], None], step: int) -> NoReturn:
    """Ends a run that was asked to, with a checkpoint."""
    save(step)
    raise checks.StoppedError(
        f"stopped after step {step}, as asked, with a checkpoint; the same command goes on from "
        "there"
    )


def _rollout_numbers(run: _Run, drawn: pipeline.Drawn) -> dict[str, float]:
    """Which rollout step was trained on, what was dropped, and how long the rollouts waited."""
    dropped_tasks = rollouts.draw_packs(run.config, run.tasksets, drawn.item.step)[1]
    numbers = {
        "rollout/step": drawn.item.step,
        "rollout/dropped_tasks": dropped_tasks,
        "staleness/dropped_steps": len(drawn.too_old),
    }
    seconds = {f"time/{name}_s": drawn.seconds.get(name, 0.0) for name in _OF_ROLLOUTS}
    return numbers | seconds | run.serving.metrics()


_OF_ROLLOUTS = ("rollout", "wait_learner", "load")  # of `pipeline.Drawn.seconds`


def training_sequences(
    scored: Sequence[Sequence[scoring.ScoredTrajectory]], *, oldest: int = 0
) -> list[types.Sequence]:
    """One sequence per model call: its prompt, and its response with the episode's score.

    Args:
        scored: trajectories with the scores of their episodes.
        oldest: version of the weights; calls with a token by older ones are left out (§11.1).
    """
    return [
        types.Sequence(
            tokens=np.concatenate([turn.prompt_tokens, turn.response_tokens]),
            is_scored=np.arange(len(turn.prompt_tokens) + len(turn.response_tokens))
            >= len(turn.prompt_tokens),
            advantages=np.full(
                len(turn.prompt_tokens) + len(turn.response_tokens), score, np.float32
            ),
            sampler_logprobs=np.concatenate(
                [np.zeros(len(turn.prompt_tokens), np.float32), turn.sampler_logprobs]
            ),
        )
        for group in scored
        for one in group
        for episode, score in zip(one.trajectory.episodes, one.scores, strict=True)
        for turn in episode.turns
        if turn.policy_version >= oldest
    ]


def num_samples(scored: Sequence[Sequence[scoring.ScoredTrajectory]]) -> int:
    """Model calls of the trajectories."""
    return sum(
        len(episode.turns)
        for group in scored
        for one in group
        for episode in one.trajectory.episodes
    )


def dry_run(config: ConfigDict) -> str:
    """The resolved config, and how much work follows from it; touches no device."""
    validation.validate(config)
    tasksets = build.load_tasksets(config, config.rollout.tasksets)
    step_packs, num_dropped = rollouts.draw_packs(config, tasksets, 0)
    group, cap = config.rollout.group_size, config.rollout.max_response_tokens
    runs = len(step_packs) * group
    solves, updates = runs * config.packs.size, runs * (config.packs.size - 1)
    turns = sum(
        group * config.packs.size * tasksets[pack.tasks[0].taskset].rules().env_factory().max_turns
        for pack in step_packs
    )
    most, longest = turns + updates, config.rollout.max_prompt_tokens + cap
    dropped = f", {num_dropped} of them in no pack" if num_dropped else ""
    rows = [
        ("rollout steps", f"{config.num_steps:,}, each with one optimizer step"),
        ("warm-up", f"{config.warmup.num_steps:,} optimizer steps of imitation"),
        (
            "packs per step",
            f"{len(step_packs):,} of {config.packs.size} tasks"
            f" ({config.rollout.tasks_per_step:,} tasks drawn{dropped})",
        ),
        ("runs per step", f"{runs:,} ({group} of every pack)"),
        ("episodes per step", f"{solves:,} solve, {updates:,} update"),
        ("samples per step", f"{solves + updates:,} to {most:,} model calls, one per turn"),
        ("tokens per sample", f"at most {longest:,}, of which {cap:,} sampled"),
        ("tokens per step", f"at most {most * longest:,}, of which {most * cap:,} sampled"),
        ("runs of the whole", f"{runs * config.num_steps:,}"),
    ]
    resolved = json.dumps(json.loads(config.to_json_best_effort()), indent=2)
    return "\n".join([resolved, "", *(f"{name:<20}{text}" for name, text in rows)])


def _train_on(
    run: _Run,
    state: learner.TrainState,
    groups: rollouts.Groups,
    reference: learner.Params | None,
    clock: _Clock,
    *,
    version: int,
) -> tuple[learner.TrainState, list[list[scoring.ScoredTrajectory]], dict[str, float]]:
    """Credit, batch, update. A step without anything to train on leaves the state as it is."""
    config = run.config
    scored, numbers = scoring.score_trajectories(groups, run.rules)
    oldest = replay.oldest_version(version + 1, max_staleness=config.rollout.max_staleness)
    sequences = training_sequences(scored, oldest=oldest)
    numbers["staleness/dropped_samples"] = num_samples(scored) - len(sequences)
    if not sequences:
        return state, scored, numbers | {"batching/trained_tokens": 0}
    weights, normaliser = losses.aggregation_weights(
        [int(s.is_scored.sum()) for s in sequences],
        config.loss.aggregation,
        config.loss.aggregation_constant,
    )
    batch, report = batching.batch_sequences(
        sequences,
        row_length=config.batching.row_length,
        rows_multiple=config.batching.rows_per_microbatch,
        scored_per_row=config.batching.scored_per_row or config.batching.row_length,
        sample_weights=weights,
        normaliser=normaliser,
        share_prefixes=config.batching.share_prefixes,
    )
    clock.lap("batch_s")
    if reference is not None:
        batch = batch._replace(ref_logprobs=run.learner.score(reference, batch))
    state, update_metrics = run.learner.update(state, batch)
    clock.lap("update_s")
    return state, scored, numbers | report.metrics() | update_metrics


def _reference(run: _Run, store: checkpoints.Checkpoints) -> learner.Params | None:
    """Parameters of the reference model, step 0, if the loss has a KL term."""
    if not run.config.loss.kl_coef:
        return None
    store.wait()
    return store.restore_params(0, build.abstract_params(run.model, run.mesh))


class _Clock:
    """Seconds of the parts of a step."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """What was done since the last lap took so long."""
        now = time.perf_counter()
        self._laps[f"time/{name}"], self._last = now - self._last, now

    def metrics(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """The laps, the whole step, and trained tokens per second."""
        total = time.perf_counter() - self._start
        rate = numbers["batching/trained_tokens"] / total
        return self._laps | {"time/step_s": total, "time/tokens_per_s": rate}
