"""A whole run of a tiny model: what it writes, and that stopping and going on changes nothing."""

import dataclasses
import json
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest

from codjax import (
    build,
    checkpoints,
    cli,
    config_files,
    metrics,
    train,
    types,
    validation,
    warmup,
)
from codjax import chat as chats
from codjax.rollout import runner

TESTS = pathlib.Path(__file__).parent
TINY = TESTS / "tiny.py"
DOCUMENTED = TESTS.parent / "docs" / "metrics.md"
NUM_STEPS = 5
BEGIN = {"step": 0, "next_step": 0, "unfinished": [], "items": []}  # of a loop


def tiny(**changes):
    config = config_files.load(str(TINY))
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(config, workdir) of a run from the first step to the last."""
    return whole_run(tmp_path_factory, **{"metrics.tensorboard": True})


@pytest.fixture(scope="module")
def finished_one_ahead(tmp_path_factory):
    """The same with rollouts one step ahead."""
    return whole_run(tmp_path_factory, **{"rollout.max_staleness": 1})


@pytest.fixture(params=["finished", "finished_one_ahead"])
def uninterrupted(request):
    """Either of them."""
    return request.getfixturevalue(request.param)


def whole_run(tmp_path_factory, **changes):
    config, workdir = tiny(**changes), tmp_path_factory.mktemp("whole")
    train.main(config, str(workdir))
    return config, workdir


def lines_without_times(workdir):
    """The lines of metrics.jsonl as they stand in the file, but for `time/…`."""
    text = (workdir / metrics.METRICS_FILE).read_text()
    assert text.endswith("\n")
    return [re.sub(r'"time/[a-z_]+": [-+.e0-9]+(, )?', "", line) for line in text.splitlines()]


def rows(workdir):
    return metrics.read_metrics(workdir / metrics.METRICS_FILE)


def documented_patterns():
    """A pattern for every key of the tables of docs/metrics.md."""
    patterns = []
    for cell in re.findall(r"^\| (`.*?) \|", DOCUMENTED.read_text(), flags=re.MULTILINE):
        for name in re.findall(r"`([^`]+)`", cell):
            pattern = re.escape(name).replace("…", ".+").replace("TASKSET", "[^/]+")
            patterns.append(re.sub(r"_K\b", r"_\\d+", pattern))
    return patterns


def undocumented(keys):
    patterns = documented_patterns()
    return {key for key in keys if not any(re.fullmatch(p, key) for p in patterns)} - {"step"}


# What a run writes.


def test_every_step_writes_a_line_of_documented_numbers(uninterrupted):
    _, workdir = uninterrupted
    found = rows(workdir)
    assert [row["step"] for row in found] == list(range(1, NUM_STEPS + 1))
    assert undocumented({key for row in found for key in row}) == set()


def test_the_doc_promises_nothing_that_a_run_does_not_write(finished):
    _, workdir = finished
    keys = {key for row in rows(workdir) for key in row}
    conditional = ("TASKSET", "kl_policy_to_ref", "reweight_temperature", "sampler")
    missing = [p for p in documented_patterns() if not any(re.fullmatch(p, key) for key in keys)]
    optional = [re.escape(name) for name in conditional] + [r"/\[\^/\]\+/"]
    assert [p for p in missing if not any(re.search(name, p) for name in optional)] == []


def test_the_first_samples_are_from_the_policy_being_trained(uninterrupted):
    config, workdir = uninterrupted
    found = rows(workdir)
    assert found[0]["loss/log_ratio_abs_max"] < 1e-4
    assert found[0]["loss/ratio_mean"] == pytest.approx(1, abs=1e-5)
    ages = [row["staleness/max"] for row in found]
    assert ages == [0.0] + [float(config.rollout.max_staleness)] * (NUM_STEPS - 1)
    if not config.rollout.max_staleness:
        assert max(row["loss/log_ratio_abs_max"] for row in found) < 1e-4


def test_the_numbers_of_a_step_fit_together(finished):
    config, workdir = finished
    for row in rows(workdir):
        assert row["rollout/num_runs"] == 2 * 2
        assert row["rollout/dropped_runs"] == row["credit/dropped_runs"] == 0
        assert row["batching/trained_tokens"] == row["rollout/response_tokens"]
        assert row["batching/unscored_sequences"] == 0
        solves = sum(row[f"turns/position_{k}"] for k in range(3)) * 4
        assert row["batching/num_sequences"] == solves + 2 * 4
        assert 0 < row["batching/dedup_ratio"] < 1
        assert row["optimizer/learning_rate"] == pytest.approx(config.optimizer.learning_rate)
        assert row["reward/gap"] == row["reward/position_2"] - row["reward/position_0"]
    # The test would show little if nothing could be read or learned.
    assert np.mean([row["hint/parse_frac"] for row in rows(workdir)]) > 0.3
    assert min(row["optimizer/grad_norm"] for row in rows(workdir)) > 0


def test_the_other_files_of_a_workdir(finished):
    config, workdir = finished
    assert json.loads((workdir / "config.json").read_text()) == json.loads(
        config.to_json_best_effort()
    )
    written = sorted(path.name for path in (workdir / "trajectories").iterdir())
    assert written == ["step_000002.jsonl", "step_000004.jsonl"]
    first = json.loads((workdir / "trajectories" / written[0]).read_text().splitlines()[0])
    assert (first["step"], first["picked"], len(first["episodes"])) == (2, "random", 3 + 2)
    assert list((workdir / "tensorboard").iterdir())
    steps = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert steps == list(range(NUM_STEPS + 1))


# The warm-up.


def test_step_0_is_the_model_after_the_warm_up(finished):
    config, workdir = finished
    chat = chats.load_chat(config.tokenizer.source)
    model = build.make_model(config, chat)
    mesh = build.make_mesh(config, model)
    tasksets = list(build.load_tasksets(config, config.rollout.tasksets).values())
    params = build.first_params(config, model, mesh)
    steps = warmup.run(config, chat=chat, model=model, params=params, mesh=mesh, tasksets=tasksets)
    *_, (state, last) = steps
    saved = restored_params(workdir, 0, build.abstract_params(model, mesh))
    for one, other in zip(jax.tree.leaves(saved), jax.tree.leaves(state.params), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
    line = json.loads((workdir / "warmup.jsonl").read_text().splitlines()[-1])
    assert line == {"step": config.warmup.num_steps} | last


def restored_params(workdir, step, like):
    store = checkpoints.Checkpoints(workdir, keep=3, read_only=True)
    try:
        return store.restore_params(step, like)
    finally:
        store.close()


# Stopping and going on.


def killed_after(workdir, copy, step):
    """A copy of a workdir as a kill after a checkpoint leaves it: later lines, one of them torn."""
    shutil.copytree(workdir, copy)
    for folder in (copy / "checkpoints").iterdir():
        if int(folder.name) > step:
            shutil.rmtree(folder)
    path = copy / metrics.METRICS_FILE
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize("step", [0, 3])
def test_going_on_from_a_checkpoint_writes_the_same_lines(uninterrupted, tmp_path, step):
    config, workdir = uninterrupted
    killed_after(workdir, tmp_path / "copy", step)
    train.main(config, str(tmp_path / "copy"))
    assert lines_without_times(tmp_path / "copy") == lines_without_times(workdir)
    for written in (workdir / "trajectories").iterdir():
        again = tmp_path / "copy" / "trajectories" / written.name
        assert again.read_text() == written.read_text()


def test_a_run_that_is_extended_was_never_shorter(uninterrupted, tmp_path):
    config, workdir = uninterrupted
    for num_steps in (2, 2, NUM_STEPS):  # the second start finds nothing left to do
        changes = {"rollout.max_staleness": config.rollout.max_staleness, "num_steps": num_steps}
        train.main(tiny(**changes), str(tmp_path))
        assert lines_without_times(tmp_path) == lines_without_times(workdir)[:num_steps]


def test_equal_runs_are_equal_and_another_seed_is_another_run(finished, tmp_path):
    _, workdir = finished
    for name, changes in {"same": {}, "other": {"seed": 1}}.items():
        train.main(tiny(num_steps=2, **changes), str(tmp_path / name))
    assert lines_without_times(tmp_path / "same") == lines_without_times(workdir)[:2]
    assert lines_without_times(tmp_path / "other") != lines_without_times(workdir)[:2]


def test_the_distance_to_a_reference_model(tmp_path):
    config = tiny(**{"loss.kl_coef": 0.1, "num_steps": 3})
    train.main(config, str(tmp_path / "whole"))
    found = rows(tmp_path / "whole")
    assert undocumented({key for row in found for key in row}) == set()
    distances = [row["loss/kl_policy_to_ref"] for row in found]
    assert distances[0] == pytest.approx(0, abs=1e-9)  # step 0 is the reference
    assert min(distances[1:]) > 1e-6

    killed_after(tmp_path / "whole", tmp_path / "copy", 1)
    train.main(config, str(tmp_path / "copy"))
    assert lines_without_times(tmp_path / "copy") == lines_without_times(tmp_path / "whole")


# Whose workdir it is.


def test_a_workdir_of_another_config_is_refused_with_the_keys(finished, tmp_path, capsys):
    _, workdir = finished
    before = (workdir / "config.json").read_bytes()
    other = tiny(**{"optimizer.learning_rate": 2e-3, "credit.baseline": "leave_one_out"})
    with pytest.raises(validation.ConfigError) as error:
        train.main(other, str(workdir))
    assert (
        'other values: credit.baseline (there "group_mean", here "leave_one_out"), '
        "optimizer.learning_rate (there 0.001, here 0.002); go on with those"
    ) in str(error.value)
    assert (workdir / "config.json").read_bytes() == before

    args = ["train", f"--config={TINY}", f"--workdir={workdir}", "--config.model.num_layers=2"]
    assert cli.main(args) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "holds a run with other values: model.num_layers (there 1, here 2); go on" in message


def begun_with(folder, resolved):
    """A workdir that holds a checkpoint of a run with this config."""
    (folder / "checkpoints" / "0").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(resolved))


def test_a_key_that_is_gone_or_new_with_another_value_counts_as_another_config(tmp_path):
    resolved = json.loads(tiny().to_json_best_effort())
    del resolved["loss"]["kl_coef"]
    resolved["loss"]["gone"] = 3
    begun_with(tmp_path, resolved)
    expected = r"loss\.gone \(there 3, here absent\), loss\.kl_coef \(there 0\.0, here 0\.5\); "
    with pytest.raises(validation.ConfigError, match=expected):
        train.main(tiny(**{"loss.kl_coef": 0.5}), str(tmp_path))


def test_a_new_key_at_its_default_is_what_an_older_run_did(finished, tmp_path):
    _, workdir = finished
    killed_after(workdir, tmp_path / "copy", 4)
    path = tmp_path / "copy" / "config.json"
    resolved = json.loads(path.read_text())
    del resolved["optimizer"]["second_moment"]
    path.write_text(json.dumps(resolved))
    train.main(tiny(), str(tmp_path / "copy"))
    assert lines_without_times(tmp_path / "copy") == lines_without_times(workdir)


def test_what_moves_no_number_may_change(finished, tmp_path):
    _, workdir = finished
    killed_after(workdir, tmp_path / "copy", 4)
    changes = {"checkpoint.every_steps": 7, "metrics.tensorboard": False, "evaluation.seed": 5}
    train.main(tiny(**changes), str(tmp_path / "copy"))
    assert lines_without_times(tmp_path / "copy") == lines_without_times(workdir)
    assert json.loads((tmp_path / "copy" / "config.json").read_text())["evaluation"]["seed"] == 5
    # The last step does, when the learning rate falls towards it.
    decaying = {"optimizer.schedule": "cosine"}
    begun_with(tmp_path, json.loads(tiny(**decaying).to_json_best_effort()))
    with pytest.raises(validation.ConfigError, match=r"num_steps \(there 5, here 9\); "):
        train.main(tiny(num_steps=9, **decaying), str(tmp_path))


def test_a_start_that_failed_before_its_first_checkpoint_binds_nobody(tmp_path):
    begun_with(tmp_path, {"model": "of another time"})
    (tmp_path / "checkpoints" / "0").rmdir()
    (tmp_path / metrics.METRICS_FILE).write_text('{"step": 1, "reward/mean": 0.5}\n')
    train.main(tiny(num_steps=1, **{"warmup.num_steps": 0}), str(tmp_path))
    (row,) = rows(tmp_path)
    assert row["loss/log_ratio_abs_max"] < 1e-4
    assert json.loads((tmp_path / "config.json").read_text())["model"]["num_layers"] == 1


def test_going_on_with_the_devices_split_otherwise(finished, tmp_path):
    """Sums run in another order then, so that the numbers agree but for rounding."""
    _, workdir = finished
    killed_after(workdir, tmp_path / "copy", 4)
    train.main(tiny(**{"mesh.fsdp": 2}), str(tmp_path / "copy"))
    expected, found = rows(workdir), rows(tmp_path / "copy")
    assert found[:4] == expected[:4]
    assert found[4]["loss/log_ratio_abs_max"] < 1e-4
    for key in ("reward/mean", "optimizer/grad_norm"):
        assert found[4][key] == pytest.approx(expected[4][key], abs=0.1)


# A step without anything to train on.


def first_state(run):
    return run.learner.init_state(build.first_params(run.config, run.model, run.mesh))


@dataclasses.dataclass
class BrokenTaskset:
    """A task set whose environments fail as soon as a task begins."""

    records: object
    taskset_id: int = 0
    num_failures: int = 0

    def rules(self):
        return runner.TasksetRules(env_factory=lambda: self, show_reward=True)

    def reset(self, record, **_):
        self.num_failures += 1
        raise OSError("the board is lost")


def test_a_step_in_which_every_run_fails_trains_nothing_and_says_so(tmp_path, caplog):
    config = tiny(num_steps=2, **{"warmup.num_steps": 0})
    run = train._Run.of(config, tmp_path)
    broken = BrokenTaskset(records=run.tasksets["lake"].records)
    run = dataclasses.replace(run, tasksets={"lake": broken})
    store = checkpoints.Checkpoints(tmp_path, keep=3)
    caplog.set_level("WARNING")
    try:
        state = first_state(run)
        before = jax.device_get(state)
        train._loop(run, store, tmp_path, state, BEGIN)
        after, loop = store.restore(2, run.learner.abstract_state())
    finally:
        store.close()

    assert broken.num_failures == 2 * 4
    assert "Step 1 has nothing to train on: " in caplog.text
    assert "Step 2 has nothing to train on: " in caplog.text
    for row in rows(tmp_path):
        assert row["rollout/dropped_runs"] == row["credit/dropped_runs"] == 4
        assert row["batching/trained_tokens"] == row["time/tokens_per_s"] == 0
        assert undocumented(row) == set()
        assert not [key for key in row if key.startswith(("reward/", "loss/", "optimizer/"))]
    assert loop == {"step": 2, "next_step": 2, "unfinished": [], "items": []}
    for one, other in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_one_failed_run_leaves_the_others_to_train_on(tmp_path):
    """The third task that is begun fails; what is left of its group is still a group."""
    config = tiny(num_steps=1, **{"warmup.num_steps": 0})
    run = train._Run.of(config, tmp_path)
    taskset = run.tasksets["lake"]
    made = []

    class FailsOnce:
        def __init__(self):
            self.env, self.number = taskset.rules().env_factory(), len(made)
            made.append(self)

        def __getattr__(self, name):
            return getattr(self.env, name)

        def reset(self, *args, **kwargs):
            if self.number == 2:
                raise OSError("the board is lost")
            return self.env.reset(*args, **kwargs)

    class Flaky:
        records, taskset_id = taskset.records, taskset.taskset_id

        def rules(self):
            return runner.TasksetRules(env_factory=FailsOnce, show_reward=True)

    run = dataclasses.replace(run, tasksets={"lake": Flaky()})
    store = checkpoints.Checkpoints(tmp_path, keep=3)
    try:
        train._loop(run, store, tmp_path, first_state(run), BEGIN)
    finally:
        store.close()
    (row,) = rows(tmp_path)
    assert (row["rollout/num_runs"], row["rollout/dropped_runs"]) == (4, 1)
    assert row["batching/trained_tokens"] == row["rollout/response_tokens"] > 0


# Pure parts.


def test_training_sequences_score_what_was_sampled():
    turn = types.Turn(
        prompt_tokens=np.array([1, 2, 3], np.int32),
        response_tokens=np.array([4, 5], np.int32),
        sampler_logprobs=np.array([-0.5, -1.5], np.float32),
        policy_version=0,
        version_spans=(types.VersionSpan(0, 0, 2),),
        stop_reason=types.StopReason.STOP_TOKEN,
    )
    episode = types.Episode(
        kind=types.EpisodeKind.SOLVE_TASK,
        position=0,
        turns=(turn, turn),
        raw_reward=1.0,
        reward=1.0,
        is_success=True,
        has_format_error=False,
        stop_reason=types.StopReason.ENVIRONMENT,
        feedback="",
        hint_in="",
        hint_out="",
        observations=("", ""),
        actions=("", ""),
    )
    trajectory = types.Trajectory(pack=None, run=0, episodes=(episode,), failure=None)
    scored = train.scoring.ScoredTrajectory(trajectory=trajectory, scores=(0.25,), returns=(1.0,))

    found = train.training_sequences([[], [scored]])

    assert len(found) == 2
    for sequence in found:
        assert sequence.tokens.tolist() == [1, 2, 3, 4, 5]
        assert sequence.is_scored.tolist() == [False, False, False, True, True]
        assert sequence.advantages[3:].tolist() == [0.25, 0.25]
        assert sequence.sampler_logprobs.tolist() == [0, 0, 0, -0.5, -1.5]


def test_dry_run_counts_the_work():
    text = train.dry_run(tiny(num_steps=1200))
    resolved, _, counts = text.partition("\n\n")
    assert json.loads(resolved)["rollout"]["group_size"] == 2
    assert counts.splitlines() == [
        "rollout steps       1,200, each with one optimizer step",
        "warm-up             200 optimizer steps of imitation",
        "packs per step      2 of 3 tasks (6 tasks drawn)",
        "runs per step       4 (2 of every pack)",
        "episodes per step   12 solve, 8 update",
        "samples per step    20 to 32 model calls, one per turn",
        "tokens per sample   at most 44, of which 12 sampled",
        "tokens per step     at most 1,408, of which 384 sampled",
        "runs of the whole   4,800",
    ]


@pytest.mark.parametrize(
    ("changes", "packs"),
    [
        ({"rollout.tasks_per_step": 7}, "3 of 3 tasks (7 tasks drawn)"),  # the third is padded
        (
            {"rollout.tasks_per_step": 7, "packs.pad_to_full": False},
            "2 of 3 tasks (7 tasks drawn, 1 of them in no pack)",
        ),
        ({"packs.mode": "ralph_sample"}, "2 of 3 tasks (6 tasks drawn)"),
        ({"packs.mode": "ralph_full"}, "6 of 3 tasks (6 tasks drawn)"),
    ],
)
def test_dry_run_counts_packs_as_they_are_made(changes, packs):
    assert f"packs per step      {packs}\n" in train.dry_run(tiny(**changes))


def test_nothing_is_done_for_a_config_that_cannot_work(tmp_path):
    with pytest.raises(validation.ConfigError, match=r"rollout\.group_size"):
        train.main(tiny(**{"rollout.group_size": 1}), str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()
