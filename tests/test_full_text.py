"""Full-text FrozenLake-Obscure packs: what prefix forests save, and a pack from end to end."""

import asyncio
import dataclasses
import random

import numpy as np
import pytest

from codjax import batching, build, config, packs, scoring, sharding, train, types
from codjax import chat as chats
from codjax.rollout import episode as episodes
from codjax.rollout import runner, scripted

SIZE, GROUP = 4, 8


def full_text_config(**changes):
    made = config.default_config()
    made.tokenizer.source = "builtin:bytes"
    made.tasksets.lake = config.taskset(env="frozen_lake_obscure", split="train", num_records=8)
    made.rollout.tasksets = ("lake",)
    made.update_from_flattened_dict(changes)
    return made


def roll_out(made, sampler, *, num_packs, group_size):
    """Trajectories of the first packs of the task set."""
    chat = chats.load_chat(made.tokenizer.source)
    taskset = build.load_tasksets(made, ["lake"])["lake"]
    step_packs = packs.make_packs(
        taskset.tasks(num_packs * made.packs.size),
        size=made.packs.size,
        mode=made.packs.mode,
        pad_to_full=False,
    )
    return asyncio.run(
        runner.run_packs(
            step_packs,
            group_size=group_size,
            tasksets={"lake": taskset.rules()},
            sampler=sampler,
            chat=chat,
            settings=episodes.settings_from(made.rollout, keep_env_memory=False),
            seed=0,
        )
    )


def sequences_of(made, groups):
    scored, _ = scoring.score_trajectories(groups, scoring.make_rules(made.credit))
    return train.training_sequences(scored)


# What forests save.

WORDS = ("the", "player", "moved", "up", "down", "left", "right", "into", "a", "hole", "so", "try")


def wordy_player(prompt: str, rng: random.Random) -> str:
    """Some reasoning of its own, then a valid answer: a language model that was told to be brief.

    The more it writes, the less its runs have in common.
    """
    if "## Record of the latest task" in prompt:
        reasoning = sentence(rng, 40)
        hints = "\n".join(f"- {sentence(rng, 8)}" for _ in range(rng.randint(2, 5)))
        return f"{reasoning}\n=== BEGIN NEW HINTS ===\n{hints}\n=== END NEW HINTS ==="
    return f"{sentence(rng, 30)}\n<answer>Direction {rng.randint(1, 4)}</answer>"


def sentence(rng, num_words):
    return " ".join(rng.choice(WORDS) for _ in range(num_words))


@pytest.fixture(scope="module")
def wordy_groups():
    made = full_text_config()
    chat = chats.load_chat(made.tokenizer.source)
    sampler = scripted.ScriptedSampler(scripted.speaks(wordy_player, chat))
    return made, roll_out(made, sampler, num_packs=2, group_size=GROUP)


def test_the_scripted_packs_are_whole_and_varied(wordy_groups):
    _, groups = wordy_groups
    runs = [run for group in groups for run in group]
    assert [len(group) for group in groups] == [GROUP, GROUP]
    assert all(run.failure is None for run in runs)
    assert all(len(run.episodes) == 2 * SIZE - 1 for run in runs)
    assert not any(episode.has_format_error for run in runs for episode in run.episodes)
    solves = [e for run in runs for e in run.episodes_of(types.EpisodeKind.SOLVE_TASK)]
    assert len({len(episode.turns) for episode in solves}) > 2
    hints = {e.hint_out for run in runs for e in run.episodes_of(types.EpisodeKind.UPDATE_CONTEXT)}
    assert len(hints) == len(runs) * (SIZE - 1)


@pytest.mark.parametrize("row_length", [16384, 65536])
def test_forests_train_at_most_045_of_the_tokens_of_samples(wordy_groups, row_length):
    """Against what the reference trains: a sample per turn, each with its whole prompt."""
    made, groups = wordy_groups
    for group in groups:
        sequences = sequences_of(made, [group])
        plain = sum(len(sequence.tokens) for sequence in sequences)
        _, report = batching.batch_sequences(sequences, row_length=row_length)
        assert report.plain_tokens == plain
        assert report.num_unscored == 0
        assert report.scored_tokens == sum(int(s.is_scored.sum()) for s in sequences)
        assert report.metrics()["batching/dedup_ratio"] == report.stored_tokens / plain
        assert report.stored_tokens / plain <= 0.45


def test_without_sharing_every_sample_is_stored_whole(wordy_groups):
    made, groups = wordy_groups
    sequences = sequences_of(made, groups[:1])
    _, report = batching.batch_sequences(sequences, row_length=65536, share_prefixes=False)
    assert report.stored_tokens == report.plain_tokens


def test_turns_of_an_episode_extend_one_another(wordy_groups):
    """What makes sharing possible: a prompt begins with the prompt and the answer before it."""
    _, groups = wordy_groups
    for run in groups[0]:
        for episode in run.episodes:
            for before, after in zip(episode.turns, episode.turns[1:], strict=False):
                head = np.concatenate([before.prompt_tokens, before.response_tokens])
                np.testing.assert_array_equal(after.prompt_tokens[: len(head)], head)


# From end to end with a model.


def test_a_pack_from_end_to_end():
    """A tiny model that has never seen text: every answer is a format error, and nothing breaks."""
    made = full_text_config(
        **{
            "model.num_layers": 1,
            "model.hidden_size": 16,
            "model.intermediate_size": 32,
            "model.num_heads": 2,
            "model.num_kv_heads": 1,
            "model.head_dim": 8,
            "model.dtype": "float32",
            "packs.size": 2,
            "rollout.max_response_tokens": 8,
            "rollout.max_prompt_tokens": 7000,
            "engine.num_slots": 4,
            "engine.max_tokens": 7008,
            "engine.prefill_chunks": (64, 512),
            "engine.prefill_rows": 2,
            "batching.row_length": 7168,
            "batching.scored_per_row": 128,
        }
    )
    chat = chats.load_chat(made.tokenizer.source)
    model = build.make_model(made, chat)
    mesh = sharding.one_device()
    params = build.first_params(made, model, mesh)
    sampler = build.make_engine(made, model, mesh)
    sampler.load_weights(params, policy_version=0)

    (group,) = groups = roll_out(made, sampler, num_packs=1, group_size=2)

    for run in group:
        assert run.failure is None
        assert [episode.has_format_error for episode in run.episodes] == [True] * 3
        assert [len(episode.turns) for episode in run.episodes] == [1] * 3
        first, update, last = run.episodes
        assert first.hint_in == "Hints: none so far"
        assert (
            last.hint_in
            == update.hint_out
            == ("Hints: none available, the last revision could not be read")
        )
        assert (first.reward, update.reward, last.reward) == (0, -0.1, 0)
        assert all(1 <= len(episode.turns[0].response_tokens) <= 8 for episode in run.episodes)
    # Of three prompts a run, the first is the other run's as well, and system prompts are shared.
    assert sampler.stats["fed_tokens"] < 0.8 * sampler.stats["prompt_tokens"]

    sequences = [
        dataclasses.replace(s, advantages=np.where(s.is_scored, 1.0, 0.0).astype(np.float32))
        for s in sequences_of(made, groups)
    ]
    batch, report = batching.batch_sequences(sequences, row_length=7168, scored_per_row=128)
    trainer = build.make_learner(
        made,
        model,
        mesh,
        optimizer=made.optimizer,
        objective=build.make_objective(made),
        num_steps=1,
    )
    state, metrics = trainer.update(trainer.init_state(params), batch)
    assert int(state.step) == 1
    assert report.scored_tokens == sum(int(s.is_scored.sum()) for s in sequences)
    assert metrics["loss/log_ratio_abs_max"] < 1e-4
    assert metrics["loss/clip_frac"] == 0
    assert metrics["loss/policy"] > 0
    assert 0 < metrics["optimizer/grad_norm"] < 100
    assert all(np.isfinite(value) for value in metrics.values())
