"""No model output of any kind makes an environment raise, hang or take super-linear time."""

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codjax import envs

NAMES = sorted(envs.ENVIRONMENTS)
MEGABYTE = 1_000_000
HUGE = {
    "digits": "<answer>Direction " + "9" * MEGABYTE + "</answer>",
    "zeros": "<answer>Direction " + "0" * MEGABYTE + "1</answer>",
    "bare digits": "Direction " + "9" * 100_000,
    "arabic digits": "<answer>Direction " + "\u0663" * MEGABYTE + "</answer>",
    "blanks": "<answer>Direction" + " " * MEGABYTE + "</answer>",
    "only blanks": "\n" * MEGABYTE,
    "open tags": "<answer>" * (MEGABYTE // 8),
    "nested tags": "<answer>" * 50_000 + "Direction 1" + "</answer>" * 50_000,
    "half tags": "<answe" * (MEGABYTE // 6),
    "angle brackets": "<" * MEGABYTE + "answer>" + "Direction 1</answer>",
    "codes": "abcd" * (MEGABYTE // 4),
    "nul": "\x00" * MEGABYTE,
    "emoji": "\U0001f600" * MEGABYTE,
    "directions": "<answer>" + "Direction " * (MEGABYTE // 10) + "</answer>",
    "jinja": "<answer>{{ 7 * 7 }}{% for x in range(10**9) %}</answer>",
}
ODD = [
    "",
    "\x00",
    "\ud800",
    "\ufeff<answer>Direction 1</answer>",
    "<answer>Direction 1\x00</answer>",
    "<answer>Direction\u00a01</answer>",
    "<answer>Direction ²</answer>",
    "<answer>Direction ½</answer>",
    "<answer>Direction \U0001d7e3</answer>",
    "<answer>Direction 1e3</answer>",
    "<answer>Direction -0</answer>",
    "</answer><answer>",
    "a\u0300",
    "\u202ea",
    "{{ 1/0 }}",
]
PIECES = ["<answer>", "</answer>", "Direction", "direction", " ", "\t", "1", "4", "9", "a", "d"]
PIECES += ["\x00", "\ud83d", "é", "\u0661", "<", ">", "-", "\n", "<think>", "</think>", "%", "{{"]


@pytest.fixture(params=NAMES)
def played(request):
    """Plays one output in a fresh episode, after an optional good first turn."""
    env = envs.make(request.param)
    record = envs.sample_records(request.param, 1)[0]

    def play(text):
        env.reset(record, pack_seed=3, slot=0, pack_size=4)
        step = env.step(text)
        result = env.result()
        assert isinstance(step.observation, str)
        assert len(step.observation) < 1000
        assert len(result.feedback) < 1000
        assert result.num_turns == 1
        assert not (result.format_error and result.raw_reward)
        assert not result.format_error or step.done

    return play


@pytest.mark.parametrize("kind", sorted(HUGE))
def test_huge_outputs_are_quick(played, kind):
    begin = time.perf_counter()
    played(HUGE[kind])
    assert time.perf_counter() - begin < 1.0


@pytest.mark.parametrize("text", ODD)
def test_odd_outputs(played, text):
    played(text)


def test_ten_thousand_random_outputs(played):
    rng = random.Random(0)
    for _ in range(5_000):
        played("".join(rng.choices(PIECES, k=rng.randrange(12))))
        played("".join(chr(rng.randrange(0x110000)) for _ in range(rng.randrange(20))))


@given(text=st.text(st.characters()) | st.text().map("<answer>Direction {}</answer>".format))
@settings(max_examples=200, deadline=None)
def test_outputs_that_hypothesis_finds(text):
    for name in NAMES:
        env = envs.make(name)
        record = {"start": [1, 1], "goal": [1, 2], "size": 4, "seed": 1, "p": 0.7}
        env.reset(record, pack_seed=3, slot=0, pack_size=4)
        env.step(text)
        assert env.result().num_turns == 1
