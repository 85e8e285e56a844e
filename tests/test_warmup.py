"""The sloppy player, the shares of its sloppiness, and what of its play is imitated."""

import itertools
import pathlib
import random
import re

import numpy as np
import pytest

from codjax import build, config_files, warmup
from codjax import chat as chats
from codjax.envs import frozen_lake_compact as lake
from codjax.envs import grid

TINY = pathlib.Path(__file__).parent / "tiny.py"
# hint : bearing (code ; effect bearing)* [reward # [< note > ;]]
DEMO = re.compile(r"\^([^:]*):(..)((?:[abcd];...)*)(?:([+-])#(?:<([^>]*)>;)?)?")


def player(*, follows=True, writes_truth=True):
    return warmup.SloppyPlayer(follows=follows, writes_truth=writes_truth)


def answers(prompt, count=200, **traits):
    return [player(**traits)(prompt, random.Random(seed)) for seed in range(count)]


def tiny(**changes):
    config = config_files.load(str(TINY))
    config.update_from_flattened_dict({f"warmup.{name}": value for name, value in changes.items()})
    return config


@pytest.fixture(scope="module")
def chat():
    return chats.load_chat("builtin:symbols")


def demos_of(config, chat):
    tasksets = list(build.load_tasksets(config, config.rollout.tasksets).values())
    return warmup.make_demos(config, chat, tasksets)


def texts_of(demos, chat):
    """(hint, bearing, presses, reward sign, note) of every demonstration; presses in fours."""
    read = []
    for demo in demos:
        match = DEMO.fullmatch(chat.show(demo[-1].tokens))
        hint, bearing, presses, sign, note = match.groups()
        read.append((hint, bearing, re.findall(r"([abcd]);(.)(..)", presses), sign, note))
    return read


@pytest.fixture(scope="module")
def demos(chat):
    return demos_of(tiny(num_demos=400), chat)


# What it answers.


@pytest.mark.parametrize(
    ("prompt", "pressed"),
    [
        ("^aUbD:UR", "a"),  # up is where the goal is
        ("^aUbD:-D", "b"),
        ("^aUcR:UR", "ac"),  # either helps
        ("^aLbLcD:UR", "abcd"),  # nothing known helps: any code
        ("^?:UR", "abcd"),
        ("^?:URc;U-R", "abcd"),  # c goes up, and up is no longer needed
        ("^?:URc;RU-", "abcd"),
        ("^?:URc;-UR", "abcd"),  # a bump tells nothing
        ("^?:ULd;LUL", "d"),  # seen on this task to go left
        ("^dR:ULd;LUL", "d"),  # what is seen corrects the hint
        ("^dUaU:U-d;LUR", "a"),
    ],
)
def test_it_presses_what_its_hint_and_its_eyes_say(prompt, pressed):
    assert set(answers(prompt)) == set(pressed)


def test_it_presses_anything_when_it_does_not_follow():
    pressed = answers("^aUbD:U-", follows=False)
    assert set(pressed) == set("abcd")
    assert 0.15 < pressed.count("a") / len(pressed) < 0.35


@pytest.mark.parametrize(
    ("prompt", "note"),
    [
        ("^?:URc;U-Rd;R--+#", "<cUdR>"),
        ("^bDaU:URc;R--+#", "<aUbDcR>"),  # in the order of the codes
        ("^cD:URc;UURa;-UR-#", "<cU>"),  # corrected, and a bump tells nothing
        ("^?:URa;-URa;-UR-#", "<?>"),
        ("^aUbD:UR-#", "<aUbD>"),  # no press was read
        ("^aU:URc;R--#", "<aUcR>"),  # without the sign of the reward
    ],
)
def test_it_notes_what_it_was_given_and_saw(prompt, note):
    assert set(answers(prompt, count=20)) == {note}


def test_it_notes_anything_when_it_does_not_write_truth():
    notes = answers("^?:URc;U-Rd;R--+#", writes_truth=False)
    assert len(set(notes)) > 50
    assert all(re.fullmatch(r"<(\?|([abcd][UDLR]){1,4})>", note) for note in notes)
    assert all(note == "<?>" or list(note[1:-1:2]) == sorted(set(note[1:-1:2])) for note in notes)


def test_it_reads_nothing_but_the_compact_style():
    with pytest.raises(ValueError, match="reads compact prompts only; got 'Where am I"):
        player()("Where am I?", random.Random(0))


def test_notes():
    assert warmup.note_of({"d": "L", "a": "U"}) == "aUdL"
    assert warmup.note_of({}) == "?"
    rng = random.Random(0)
    for seed in range(100):
        truth = lake.draw_codes(seed)
        note = warmup.true_note(seed, rng)
        assert all(truth[code] == letter for code, letter in facts_of(note).items())
    # All numbers of facts occur, from none to four, about equally often.
    counts = np.bincount([len(facts_of(warmup.random_note(rng))) for _ in range(2000)], minlength=5)
    np.testing.assert_allclose(counts / 2000, 0.2, atol=0.04)


def facts_of(note):
    return dict(re.findall("([abcd])([UDLR])", note))


# How often it does what.


def useful(hint, bearing):
    return {code for code, letter in facts_of(hint).items() if letter in bearing}


def test_how_often_it_follows(demos, chat):
    """Where a press helps, by its hint: 0.9 follow, and of the rest some press it by chance."""
    acted, by_chance = [], []
    for hint, bearing, presses, _, _ in texts_of(demos, chat):
        if helps := useful(hint, bearing):
            acted.append(presses[0][0] in helps)
            by_chance.append(len(helps) / 4)
    assert len(acted) > 150
    assert np.mean(acted) == pytest.approx(0.9 + 0.1 * np.mean(by_chance), abs=0.06)


def test_how_often_its_notes_are_true(demos, chat):
    """0.3 of the notes say all that was given and seen; a random note hardly ever does."""
    exact = []
    for hint, bearing, presses, _, note in texts_of(demos, chat):
        prompt = f"^{hint}:{bearing}" + "".join(f"{c};{e}{b}" for c, e, b in presses) + "#"
        exact.append(player()(prompt, random.Random(0)) == f"<{note}>")
    assert np.mean(exact) == pytest.approx(0.3, abs=0.08)


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0.0, 0.45), (0.5, 0.5, 0.9), (1, 1, 1)])
def test_how_often_its_hints_are_true(chat, share, low, high):
    """Compared with what the presses did; a random letter is right one time in four."""
    found = demos_of(tiny(num_demos=300, true_hint_in_frac=float(share)), chat)
    agrees = [
        facts_of(hint)[code] == effect
        for hint, _, presses, _, _ in texts_of(found, chat)
        for code, effect, _ in presses
        if code in facts_of(hint) and effect != lake.NONE
    ]
    assert len(agrees) > 100
    assert low <= np.mean(agrees) <= high


def test_the_reward_does_not_tell_who_knew(demos, chat):
    """About 4 in 10 tasks are solved: between no knowledge (0.25) and all of it (1)."""
    signs = [sign for *_, sign, _ in texts_of(demos, chat)]
    assert 0.25 < np.mean([sign == "+" for sign in signs]) < 0.55


# What is imitated.


def test_every_token_is_imitated_once(demos):
    for demo in demos:
        assert len(demo) == 2  # the task and the note
        prefixes = {
            tuple(s.tokens[: end + 1].tolist()) for s in demo for end in range(1, len(s.tokens))
        }
        imitated = [
            tuple(s.tokens[: end + 1].tolist()) for s in demo for end in np.flatnonzero(s.is_scored)
        ]
        assert len(imitated) == len(set(imitated))
        assert set(imitated) == prefixes
        for sequence in demo:
            assert sequence.advantages.tolist() == [1.0] * len(sequence.tokens)


def test_the_tasks_are_played_in_the_real_environment(demos, chat):
    """Some task and map give exactly these observations for these presses."""
    maps = list(itertools.permutations(grid.DIRECTIONS))
    tasks = lake.pairs(lake.Data())
    for _, bearing, presses, sign, _ in texts_of(demos[:40], chat):
        assert any(
            shown(start, goal, dict(zip(lake.CODES, map_, strict=True)), presses) == (bearing, sign)
            for start, goal in tasks
            for map_ in maps
        )


def shown(start, goal, directions, presses):
    """First bearing and reward sign, if the presses do on this task what they are said to do."""
    player = start
    for code, effect, bearing in presses:
        after = grid.move(player, directions[code], size=4)
        moved = lake.LETTERS[directions[code]] if after != player else lake.NONE
        player = after
        if (effect, bearing) != (moved, lake.bearing(player, goal)):
            return None
    if player != goal and len(presses) != 2:  # it would not have stopped
        return None
    return lake.bearing(start, goal), "+" if player == goal else "-"


def test_equal_configs_give_equal_demos(demos, chat):
    again = demos_of(tiny(num_demos=20), chat)
    for one, other in zip(again, demos[:20], strict=True):
        assert [s.tokens.tolist() for s in one] == [s.tokens.tolist() for s in other]
    other = tiny(num_demos=20)
    other.seed = 1
    assert texts_of(demos_of(other, chat), chat) != texts_of(again, chat)


def test_every_epoch_shows_every_demo_once_in_another_order():
    shown_demos = [warmup._chosen(step, 10, 4, seed=0) for step in range(5)]  # two epochs
    assert all(len(step) == 4 for step in shown_demos)
    order = [index for step in shown_demos for index in step]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:]


def test_the_loss_falls(chat):
    config = tiny(num_steps=30, num_demos=64)
    tasksets = list(build.load_tasksets(config, config.rollout.tasksets).values())
    model = build.make_model(config, chat)
    mesh = build.make_mesh(config, model)
    params = build.first_params(config, model, mesh)
    steps = warmup.run(config, chat=chat, model=model, params=params, mesh=mesh, tasksets=tasksets)
    losses = [metrics["loss/total"] for _, metrics in steps]
    assert len(losses) == 30
    assert losses[0] > np.log(chat.vocab_size) - 0.5  # nothing is known at first
    assert np.mean(losses[-5:]) < losses[0] - 0.7
