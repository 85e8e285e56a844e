"""The whole run, top to bottom: `codjax train`.

    tasks ─packs→ Pack ─rollout→ Trajectory ─credit→ scores ─batching→ TokenBatch ─update→ weights
      ↑                                                                                      │
      └──────────────── next step ←── sampler.load_weights(version + 1) ←────────────────────┘

Read `main`, then `_Rollouts` and `_train_on`. A run is a function of its config: every random
number is derived from the seed by name and step, so that a run that was killed and started again
writes what it would have written.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import json
import logging
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

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
    packs,
    progress,
    scoring,
    seeds,
    serialization,
    types,
    validation,
    warmup,
    workdirs,
)
from codjax import chat as chats
from codjax.rollout import engine, runner
from codjax.rollout import episode as episodes

Groups = list[list[types.Trajectory]]

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
    run = distributed.on_all(lambda: _Run.of(config))
    if distributed.is_main():
        workdirs.write_config(folder, config)
    store = checkpoints.Checkpoints(folder, keep=config.checkpoint.keep)
    try:
        state, loop = _begin(run, store, folder)
        _loop(run, store, folder, state, loop)
    finally:
        store.close()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run:
    """The parts of a run; none of them changes while it goes on, but for the sampler's weights."""

    config: ConfigDict
    chat: chats.Chat
    tasksets: Mapping[str, build.TaskSet]
    model: models.Decoder  # without weights
    mesh: jax.sharding.Mesh
    learner: learner.Learner
    sampler: engine.Engine
    rules: scoring.Rules
    settings: episodes.RolloutSettings

    @classmethod
    def of(cls, config: ConfigDict) -> _Run:
        """The parts that the config describes."""
        chat = chats.load_chat(config.tokenizer.source)
        model = build.make_model(config, chat)
        mesh = build.make_mesh(config, model)
        made = build.policy_learner(config, model, mesh)
        memory.check_sampler(config, model, made, mesh)
        return cls(
            config=config,
            chat=chat,
            tasksets=build.load_tasksets(config, config.rollout.tasksets),
            model=model,
            mesh=mesh,
            learner=made,
            sampler=build.make_engine(config, model, distributed.sampling_mesh(mesh)),
            rules=scoring.make_rules(config.credit),
            settings=episodes.settings_from(
                config.rollout, keep_env_memory=config.packs.keep_env_memory
            ),
        )


class _Rollouts:
    """The rollouts of a run, one step after the other; owns a thread when they run ahead.

    Every process samples its share of the packs, and then all hold the trajectories of all: credit,
    RED and rows are of the whole step, whatever the number of processes.

    With `rollout.steps_ahead` 0, `take` samples with the weights loaded last. With 1, the rollout
    of the next step is begun before the learner updates on this one and samples meanwhile, with
    weights one version older than those it will be trained with.
    """

    def __init__(self, run: _Run, *, waiting: Groups | None):
        self._run, self._waiting = run, waiting
        self._ahead: concurrent.futures.Future[Groups] | None = None
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="rollout")

    def take(self, step: int) -> Groups:
        """The trajectories of the step, sampled now unless they were begun before."""
        waiting = self.waiting()
        self._waiting = None
        return _of_all(sample_step(self._run, step)) if waiting is None else waiting

    def begin(self, step: int) -> None:
        """Start sampling the trajectories of the step in the background."""
        self._ahead = self._thread.submit(sample_step, self._run, step)

    def waiting(self) -> Groups | None:
        """Trajectories sampled ahead, once they are complete; they belong in a checkpoint."""
        if self._ahead is not None:
            self._waiting, self._ahead = _of_all(self._ahead.result()), None
        return self._waiting

    def close(self) -> None:
        """End the thread: alone, after what is being sampled.

        Only a run that fails is still sampling here. One of several processes must not wait then:
        the others wait for it, and `distributed.leave` ends the thread too.
        """
        is_alone = distributed.num_processes() == 1
        if is_alone and self._ahead is not None and not self._ahead.done():
            _logger.info("Waiting for the rollout that is being sampled.")
        self._thread.shutdown(wait=is_alone, cancel_futures=True)


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
    loop = {"step": 0, "waiting": None}
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
    waiting = loop["waiting"] and [
        [serialization.trajectory_from_json(t) for t in group] for group in loop["waiting"]
    ]
    rollouts = _Rollouts(run, waiting=waiting)
    trajectories = metrics.TrajectoryWriter(
        folder,
        seed=config.seed,
        packs_per_step=config.metrics.packs_per_step,
        decode=run.chat.show,
    )
    is_main = distributed.is_main()
    run.sampler.load_weights(
        distributed.local_weights(state.params), policy_version=int(state.step)
    )
    try:
        with (
            metrics.MetricsWriter(
                folder, start + 1, config.metrics.tensorboard, writes=is_main
            ) as writer,
            progress.Progress("train", total=config.num_steps, start=start) as bar,
            distributed.StopRequest() as stop,
        ):
            for step in range(start, config.num_steps):
                clock = _Clock()
                version = int(state.step)  # lags behind `step` by the steps without training
                groups = rollouts.take(step)
                clock.lap("rollout_s")
                if config.rollout.steps_ahead:  # at the last step too: the run may be extended
                    weights = distributed.local_weights(state.params)
                    run.sampler.load_weights(weights, policy_version=version)
                    rollouts.begin(step + 1)
                state, scored, numbers = _train_on(run, state, groups, reference, clock)
                if is_main and not numbers["batching/trained_tokens"]:
                    _logger.warning(
                        "Step %d has nothing to train on: no run was kept, or none was sampled.",
                        step + 1,
                    )
                if not config.rollout.steps_ahead:
                    weights = distributed.local_weights(state.params)
                    run.sampler.load_weights(weights, policy_version=int(state.step))
                numbers |= metrics.rollout_metrics(groups, policy_version=version)
                numbers["rollout/dropped_tasks"] = draw_packs(config, run.tasksets, step)[1]
                numbers |= clock.metrics(numbers)
                writer.write(step + 1, numbers)
                if is_main and (step + 1) % config.metrics.packs_every_steps == 0:
                    trajectories.write(step + 1, groups, scored)
                bar.update(step + 1, progress.reward_text(numbers), step_s=numbers["time/step_s"])
                is_last, is_stopping = step + 1 == config.num_steps, stop.is_asked()
                if (step + 1) % config.checkpoint.every_steps == 0 or is_last or is_stopping:
                    ahead = serialization.to_json(rollouts.waiting())
                    store.save(step + 1, state, {"step": step + 1, "waiting": ahead})
                if is_stopping and not is_last:
                    raise checks.StoppedError(
                        f"stopped after step {step + 1}, as asked, with a checkpoint; the same "
                        "command goes on from there"
                    )
    finally:
        rollouts.close()


def draw_packs(
    config: ConfigDict, tasksets: Mapping[str, build.TaskSet], step: int
) -> tuple[list[types.Pack], int]:
    """The packs of a rollout step, and how many of its tasks are in none of them."""
    drawn = packs.step_tasks(
        {name: taskset.records for name, taskset in tasksets.items()},
        step=step,
        tasks_per_step=config.rollout.tasks_per_step,
        seed=config.seed,
    )
    # The id in the config, not in `rollout.tasksets`: no pack of a test set gets a training seed.
    tasks = [
        dataclasses.replace(task, taskset_id=tasksets[task.taskset].taskset_id)
        for task in drawn.tasks
    ]
    rules = {
        "size": config.packs.size,
        "mode": config.packs.mode,
        "pad_to_full": config.packs.pad_to_full,
    }
    made = packs.make_packs(tasks, **rules, epoch=drawn.epochs)
    return made, packs.num_dropped(tasks, **rules)


def sample_step(run: _Run, step: int) -> Groups:
    """This process's trajectories of a step, group by group.

    With all processes', a function of the step and the weights.
    """
    config = run.config
    step_packs, _ = draw_packs(config, run.tasksets, step)
    return asyncio.run(
        runner.run_packs(
            distributed.share(step_packs),
            group_size=config.rollout.group_size,
            tasksets={name: taskset.rules() for name, taskset in run.tasksets.items()},
            sampler=run.sampler,
            chat=run.chat,
            settings=run.settings,
            seed=seeds.derive_seed(config.seed, "rollout", step),
        )
    )


def training_sequences(
    scored: Sequence[Sequence[scoring.ScoredTrajectory]],
) -> list[types.Sequence]:
    """One sequence per model call: its prompt, and its response with the episode's score."""
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
    ]


def dry_run(config: ConfigDict) -> str:
    """The resolved config, and how much work follows from it; touches no device."""
    validation.validate(config)
    tasksets = build.load_tasksets(config, config.rollout.tasksets)
    step_packs, num_dropped = draw_packs(config, tasksets, 0)
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
    groups: Groups,
    reference: learner.Params | None,
    clock: _Clock,
) -> tuple[learner.TrainState, list[list[scoring.ScoredTrajectory]], dict[str, float]]:
    """Credit, batch, update. A step without anything to train on leaves the state as it is."""
    config = run.config
    scored, numbers = scoring.score_trajectories(groups, run.rules)
    sequences = training_sequences(scored)
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


def _of_all(groups: Groups) -> Groups:
    """The groups of all processes, in the order of the step's packs."""
    return distributed.merge(distributed.gather(groups))


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
