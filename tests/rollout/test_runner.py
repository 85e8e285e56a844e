"""Whole runs: order, hints, failures, Ralph, concurrency, and the real environments."""

import asyncio
import dataclasses
import re

import numpy as np
import pytest

from codjax import chat as chats
from codjax import config as configs
from codjax import envs, types
from codjax.envs import frozen_lake_compact, protocol
from codjax.rollout import prompts, runner, scripted, settings
from codjax.rollout import sampler as samplers
from codjax.types import EpisodeKind, PackMode, StopReason

CHAT = chats.load_chat("builtin:bytes")
BEGIN, END = prompts.FULL.start_delimiter, prompts.FULL.end_delimiter


class OneShot:
    """One turn, solved by any answer; `diary` lists what all its instances were asked."""

    system_prompt = "Answer."
    max_turns = 1

    def __init__(self, diary, failing_rows=()):
        self.diary, self.failing_rows = diary, failing_rows
        self.num_tasks = 0  # what this instance remembers
        diary.append("made")

    def reset(self, record, *, pack_seed, slot, pack_size, env_task_idx):
        self.num_tasks += 1
        self.row = record["row"]
        self.diary.append(f"reset row {self.row} slot {slot} of {pack_size} idx {env_task_idx}")
        return f"task {self.row}, number {self.num_tasks} for me"

    def step(self, text):
        self.diary.append(f"solved {self.row}")
        if self.row in self.failing_rows:
            raise RuntimeError("fell over")
        return protocol.StepResult(observation="done", done=True)

    def result(self):
        self.diary.append("feedback")
        return protocol.EpisodeResult(
            raw_reward=1.0, is_success=True, feedback="fine", format_error=False, num_turns=1
        )


def make_pack(rows=(0, 1, 2), mode=PackMode.COD, indices=None, seed=5):
    return types.Pack(
        tasks=tuple(
            types.Task(taskset="toy", taskset_id=0, index=row, record={"row": row}) for row in rows
        ),
        seed=seed,
        mode=mode,
        env_task_indices=indices or tuple(range(len(rows))),
    )


def make_settings(**changes):
    base = settings.settings_from(configs.default_config().rollout, keep_env_memory=False)
    return dataclasses.replace(base, **changes)


def numbered_hints(prompt, rng):
    """Solves by "go"; as hint, counts the updates by what it was given."""
    if "## Record of the latest task" not in prompt:
        return "go"
    given = re.search(r"## Hints so far\n\n(.*?)\n\n## Record", prompt, re.DOTALL).group(1)
    number = int(given.split("#")[-1]) if "#" in given else 0
    return f"{BEGIN}\n#{number + 1}\n{END}"


def run_pack(
    script=numbered_hints,
    *,
    pack=None,
    diary=None,
    failing_rows=(),
    hint_override=None,
    **changes,
):
    diary = [] if diary is None else diary

    def answer(prompt, rng):
        text = script(prompt, rng)
        if BEGIN in text:
            diary.append("update")
        return text

    return asyncio.run(
        runner.run_pack(
            pack or make_pack(),
            0,
            env_factory=lambda: OneShot(diary, failing_rows),
            show_reward=True,
            sampler=scripted_by(answer),
            chat=CHAT,
            settings=make_settings(**changes),
            seed=0,
            hint_override=hint_override,
        )
    )


def scripted_by(script, chat=CHAT):
    return scripted.ScriptedSampler(scripted.speaks(script, chat))


def test_order_of_solve_feedback_update():
    diary = []
    trajectory = run_pack(diary=diary)
    assert diary == [
        *("made", "reset row 0 slot 0 of 3 idx 0", "solved 0", "feedback", "update"),
        *("made", "reset row 1 slot 1 of 3 idx 1", "solved 1", "feedback", "update"),
        *("made", "reset row 2 slot 2 of 3 idx 2", "solved 2", "feedback"),
    ]
    kinds = [(episode.kind, episode.position) for episode in trajectory.episodes]
    solve, update = EpisodeKind.SOLVE_TASK, EpisodeKind.UPDATE_CONTEXT
    assert kinds == [(solve, 0), (update, 0), (solve, 1), (update, 1), (solve, 2)]
    assert (trajectory.run, trajectory.failure) == (0, None)


def test_only_the_hint_passes_on():
    trajectory = run_pack()
    hints = [prompts.FULL.null_hint, "Hints:\n#1", "Hints:\n#2"]
    assert [e.hint_in for e in trajectory.episodes_of(EpisodeKind.SOLVE_TASK)] == hints
    assert [e.hint_in for e in trajectory.episodes_of(EpisodeKind.UPDATE_CONTEXT)] == hints[:2]
    for episode in trajectory.episodes_of(EpisodeKind.SOLVE_TASK):
        shown = CHAT.show(episode.turns[0].prompt_tokens)
        assert shown.count("<|im_start|>user") == 1
        assert f"\n\n{episode.hint_in}<|im_end|>" in shown


def forgets_second(prompt, rng):
    text = numbered_hints(prompt, rng)
    return "I forgot the format." if "#2" in text else text


@pytest.mark.parametrize(("wipes", "hint"), [(True, prompts.FULL.no_hint), (False, "Hints:\n#1")])
def test_a_parse_failure_wipes_or_keeps_the_hint(wipes, hint):
    trajectory = run_pack(forgets_second, wipes_hint=wipes)
    solves = trajectory.episodes_of(EpisodeKind.SOLVE_TASK)
    assert [episode.hint_in for episode in solves][1:] == ["Hints:\n#1", hint]
    assert trajectory.episodes[3].reward == -0.1


def test_blanked_hints():
    trajectory = run_pack(blanks_hints=True)
    assert {episode.hint_in for episode in trajectory.episodes} == {prompts.FULL.null_hint}
    assert trajectory.episodes[1].hint_out == "Hints:\n#1"


def test_hint_override_sees_position_and_hint():
    asked = []

    def override(position, hint):
        asked.append((position, hint))
        return f"other {position}"

    trajectory = run_pack(hint_override=override)
    assert asked == [(0, prompts.FULL.null_hint), (1, "Hints:\n#1"), (2, "Hints:\n#1")]
    assert [e.hint_in for e in trajectory.episodes] == [
        *("other 0", "other 0", "other 1", "other 1", "other 2")
    ]


def test_a_failure_cuts_the_run_short(caplog):
    trajectory = run_pack(failing_rows=(1,))
    assert trajectory.failure is StopReason.ENVIRONMENT_FAILED
    assert [episode.stop_reason for episode in trajectory.episodes][2:] == [trajectory.failure]
    assert "Run 0 of pack 5 ended early after 3 episodes: environment_failed" in caplog.text


def test_a_sampler_failure_in_an_update_cuts_the_run_short():
    def breaks(prompt, rng):
        if "## Record" in prompt:
            raise samplers.SamplerError("server gone")
        return "go"

    trajectory = run_pack(breaks)
    assert trajectory.failure is StopReason.SAMPLER_FAILED
    assert len(trajectory.episodes) == 2


def test_an_environment_that_cannot_be_made():
    trajectory = asyncio.run(
        runner.run_pack(
            make_pack(),
            0,
            env_factory=lambda: 1 / 0,
            show_reward=True,
            sampler=scripted_by(numbered_hints),
            chat=CHAT,
            settings=make_settings(),
            seed=0,
        )
    )
    assert (trajectory.episodes, trajectory.failure) == ((), StopReason.ENVIRONMENT_FAILED)


@pytest.mark.parametrize("keeps", [False, True])
def test_ralph(keeps):
    diary = []
    ralph = make_pack(rows=(4, 4, 4), mode=PackMode.RALPH_FULL, indices=(2, 2, 2))
    trajectory = run_pack(pack=ralph, diary=diary, keeps_env_memory=keeps)
    resets = [line for line in diary if line.startswith("reset")]
    assert resets == [f"reset row 4 slot {slot} of 3 idx 2" for slot in range(3)]
    assert diary.count("made") == (1 if keeps else 3)
    last = trajectory.episodes[-1].observations[0]
    assert last == f"task 4, number {3 if keeps else 1} for me"


def test_an_environment_never_outlives_a_task_of_a_cod_pack():
    diary = []
    run_pack(diary=diary, keeps_env_memory=True)
    assert diary.count("made") == 3


def toy_rules(failing_rows=()):
    return {
        "toy": runner.TasksetRules(env_factory=lambda: OneShot([], failing_rows), show_reward=True)
    }


def run_packs(packs, sampler, *, group_size=3, seed=0, failing_rows=(), hint_overrides=None):
    return asyncio.run(
        runner.run_packs(
            packs,
            group_size=group_size,
            tasksets=toy_rules(failing_rows),
            sampler=sampler,
            chat=CHAT,
            settings=make_settings(),
            seed=seed,
            hint_overrides=hint_overrides,
        )
    )


def test_all_runs_overlap_and_come_back_in_order():
    packs = [make_pack(seed=1), make_pack(seed=2)]
    sampler = scripted_by(numbered_hints)
    groups = run_packs(packs, sampler)
    assert [[(t.pack.seed, t.run) for t in group] for group in groups] == [
        [(1, 0), (1, 1), (1, 2)],
        [(2, 0), (2, 1), (2, 2)],
    ]
    assert sampler.peak_in_flight == 6
    assert sampler.num_requests == 6 * 5


def test_runs_draw_their_own_random_numbers_which_depend_on_nothing_else():
    def dice(prompt, rng):
        return str(rng.random())

    def texts(groups):
        return [[[e.actions for e in t.episodes] for t in group] for group in groups]

    both = texts(run_packs([make_pack(seed=1), make_pack(seed=2)], scripted_by(dice)))
    alone = texts(run_packs([make_pack(seed=2)], scripted_by(dice), group_size=1))
    other = texts(run_packs([make_pack(seed=2)], scripted_by(dice), group_size=1, seed=1))
    assert alone[0][0] == both[1][0]
    assert other != alone
    answers = [actions for group in both for run in group for actions in run]
    assert len(set(answers)) == len(answers) == 2 * 3 * 5


def test_failed_runs_leave_the_others_alone():
    packs = [make_pack(rows=(0, 1)), make_pack(rows=(2, 9))]
    groups = run_packs(packs, scripted_by(numbered_hints), failing_rows=(9,))
    failures = [[trajectory.failure for trajectory in group] for group in groups]
    assert failures == [[None] * 3, [StopReason.ENVIRONMENT_FAILED] * 3]


def test_hint_overrides_go_by_pack():
    groups = run_packs(
        [make_pack(seed=1), make_pack(seed=2)],
        scripted_by(numbered_hints),
        group_size=1,
        hint_overrides=[lambda position, hint: hint, lambda position, hint: "swapped"],
    )
    assert [group[0].episodes[-1].hint_in for group in groups] == ["Hints:\n#2", "swapped"]


def test_a_bug_is_raised():
    with pytest.raises(ExceptionGroup) as info:
        run_packs([make_pack()], scripted_by(lambda prompt, rng: str(1 / 0)))
    assert info.group_contains(ZeroDivisionError)


def lake_packs(name, num_packs, size):
    records = envs.load_records(name, split="test", num_records=num_packs * size)
    return [
        types.Pack(
            tasks=tuple(
                types.Task(taskset="lake", taskset_id=0, index=row, record=records[row])
                for row in range(first, first + size)
            ),
            seed=first,
            mode=PackMode.COD,
            env_task_indices=tuple(range(size)),
        )
        for first in range(0, num_packs * size, size)
    ]


def play_lake(name, script, chat, *, num_packs, size, **changes):
    return asyncio.run(
        runner.run_packs(
            lake_packs(name, num_packs, size),
            group_size=2,
            tasksets={
                "lake": runner.TasksetRules(env_factory=lambda: envs.make(name), show_reward=True)
            },
            sampler=scripted_by(script, chat),
            chat=chat,
            settings=make_settings(**changes),
            seed=0,
        )
    )


def test_frozen_lake_obscure_whole():
    def walker(prompt, rng):
        if "## Record of the latest task" in prompt:
            return f"{BEGIN}\n- Direction 1 did something\n{END}"
        return f"<answer>Direction {rng.randint(1, 4)}</answer>"

    for group in play_lake("frozen_lake_obscure", walker, CHAT, num_packs=4, size=3):
        for trajectory in group:
            assert trajectory.failure is None
            assert len(trajectory.episodes) == 5
            for episode in trajectory.episodes_of(EpisodeKind.SOLVE_TASK):
                assert not episode.has_format_error
                assert episode.stop_reason is StopReason.ENVIRONMENT
                assert episode.reward in (0.0, pytest.approx(0.95, abs=0.05))


def test_frozen_lake_compact_whole():
    """A player that knows the hidden codes, from the hint, solves every task after its first."""
    chat = chats.load_chat("builtin:symbols")

    def player(prompt, rng):
        if prompt.endswith("#"):
            return f"<{''.join(frozen_lake_compact.draw_codes(seed_of[0]).values())}>"
        hint, bearing = prompt[1:5], prompt[-2:]
        known = [code for code, move in zip("abcd", hint, strict=True) if move in bearing]
        useful = [code for code in known if hint["abcd".index(code)] != "-"]
        return rng.choice(useful or "abcd")

    for pack in lake_packs("frozen_lake_compact", 8, 4):
        seed_of = [pack.seed]
        trajectory = asyncio.run(
            runner.run_pack(
                pack,
                0,
                env_factory=lambda: envs.make("frozen_lake_compact"),
                show_reward=True,
                sampler=scripted_by(player, chat),
                chat=chat,
                settings=make_settings(style=prompts.COMPACT, include_final_observation=True),
                seed=0,
            )
        )
        solves = trajectory.episodes_of(EpisodeKind.SOLVE_TASK)
        assert [episode.is_success for episode in solves[1:]] == [True] * 3
        update = trajectory.episodes[1].turns[0].prompt_tokens
        last = trajectory.episodes[0].turns[-1].prompt_tokens
        assert update[: len(last)].tolist() == last.tolist()


@pytest.mark.parametrize("name", ["frozen_lake_obscure", "frozen_lake_compact"])
def test_no_model_output_breaks_a_run(name):
    symbols = chats.load_chat("builtin:symbols")
    chat, style = (symbols, prompts.COMPACT) if "compact" in name else (CHAT, prompts.FULL)

    def babble(prompt, rng):
        pieces = ["<answer>", "</answer>", "Direction 1", BEGIN, END, "a", "<", ">", "\x00", "🤖"]
        return "".join(
            rng.choices([*pieces, "<|im_end|>", ";", "^", "\ud800"], k=rng.randint(0, 6))
        )

    groups = play_lake(name, babble, chat, num_packs=10, size=4, style=style)
    assert all(trajectory.failure is None for group in groups for trajectory in group)


def test_settings_are_those_of_the_config():
    config = configs.default_config().rollout
    made = settings.settings_from(config, keep_env_memory=True)
    assert made.style is prompts.FULL
    assert (made.temperature, made.top_p, made.top_k) == (1.0, 1.0, 0)
    assert (made.compress, made.wipes_hint, made.keeps_env_memory) == (None, True, True)
    config.context_compression, config.on_parse_failure = "keep_answer", "keep_previous"
    made = settings.settings_from(config, keep_env_memory=False)
    assert (made.compress, made.wipes_hint) == (settings.keep_answer, False)


def test_scripted_sampler_cuts_at_stop_tokens_and_limits():
    params = samplers.SamplingParams(
        temperature=1.0, top_p=1.0, top_k=0, max_tokens=3, stop_tokens=(9,)
    )

    def sample(*tokens):
        logprobs = -np.arange(len(tokens), dtype=np.float32)
        sampler = scripted.ScriptedSampler(lambda prompt, rng: (np.array(tokens), logprobs))
        made = asyncio.run(sampler.generate(np.array([1]), params, seed=0))
        return made.tokens.tolist(), made.logprobs.tolist(), made.stop_reason

    assert sample(5, 9, 7) == ([5, 9], [0.0, -1.0], StopReason.STOP_TOKEN)
    assert sample(5, 6, 7, 9) == ([5, 6, 7], [0.0, -1.0, -2.0], StopReason.LENGTH)
    assert asyncio.run(scripted_by(numbered_hints).score(np.arange(4))).tolist() == [0.0] * 3
