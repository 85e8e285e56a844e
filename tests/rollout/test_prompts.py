"""The texts around an environment, and the parser of hints."""

import pathlib
import random
import re

import jinja2
import numpy as np
import pytest

from codjax import chat
from codjax.rollout import prompts
from codjax.rollout.prompts import COMPACT, FULL, PROMPT_STYLES

TRANSCRIPT = prompts.Transcript(
    system_prompt="Find the exit.",
    observations=("1/3", "2/3"),
    actions=("left", "up"),
    final_observation=None,
)
TRAJECTORY = (
    "System:\nFind the exit.\n\n"
    "Step 1:\nObservation: 1/3\nAction: left\n\n"
    "Step 2:\nObservation: 2/3\nAction: up"
)


def update_messages(style, transcript=TRANSCRIPT, reward=0.95, length_request=None):
    return style.update_messages(
        transcript, hint="H", reward=reward, feedback="You left.", length_request=length_request
    )


def in_order(text: str, *parts: str) -> bool:
    return re.search(".*".join(map(re.escape, parts)), text, re.DOTALL) is not None


def test_solve_system_is_bare_text_hint_section_length_section():
    short = FULL.solve_system("Find the exit.", "Hints: none so far", None)
    assert short.startswith("Find the exit.\n\n## Hints\n\n")
    assert short.endswith("\n\nHints: none so far")
    full = FULL.solve_system("Find the exit.", "Hints: none so far", 1000)
    assert full.startswith(short)
    assert full[len(short) :] == (
        "\n\n## Response length\n\nKeep every response, your thinking included, within 1000 tokens."
    )


def test_full_update_messages_are_in_the_order_of_the_specification():
    system, user = update_messages(FULL)
    assert (system.role, user.role) == ("system", "user")
    assert in_order(
        system.content, "helpful assistant", "revise", "Principles", "Format", "Further demands"
    )
    assert in_order(system.content, FULL.start_delimiter, "\n", FULL.end_delimiter)
    assert user.content == (
        f"## Hints so far\n\nH\n\n## Record of the latest task\n\n{TRAJECTORY}\n\n"
        "## Outcome\n\nReward: 0.950\nFeedback: You left.\n\n"
        "Think it over and return the new hints as asked."
    )


def test_a_hidden_reward_is_not_mentioned():
    assert "eward" not in update_messages(FULL, reward=None)[1].content
    assert update_messages(COMPACT, reward=None)[-1].content == "#"


def test_the_length_request_reaches_the_hint_writer():
    assert "1500" not in update_messages(FULL)[0].content
    assert "within 1500 tokens" in update_messages(FULL, length_request=1500)[0].content


def test_trajectory_text_literal():
    assert prompts.trajectory_text(TRANSCRIPT) == TRAJECTORY


def test_trajectory_text_of_an_unanswered_step_and_a_final_observation():
    transcript = prompts.Transcript(
        system_prompt="S", observations=("a", "b"), actions=("x",), final_observation="c"
    )
    assert prompts.trajectory_text(transcript) == (
        "System:\nS\n\nStep 1:\nObservation: a\nAction: x\n\n"
        "Step 2:\nObservation: b\nAction: (no action)\n\nFinal observation: c"
    )


def test_texts_are_not_rendered_twice():
    assert "{{ 7 * 7 }}" in FULL.solve_system("{{ 7 * 7 }}", "{% if x %}", None)
    transcript = prompts.Transcript(
        system_prompt="", observations=("{{ hint }}",), actions=(), final_observation=None
    )
    assert "{{ hint }}" in update_messages(FULL, transcript)[1].content


def test_a_template_with_a_missing_value_raises():
    with pytest.raises(jinja2.UndefinedError):
        prompts._render("full/solve_system.jinja", system_prompt="x")


def test_compact_prompts_literal():
    tokens = chat.load_chat("builtin:symbols")
    transcript = prompts.Transcript(
        system_prompt="", observations=(":-L", "--L"), actions=("c", "d"), final_observation="L--"
    )
    messages = update_messages(COMPACT, transcript)
    assert tokens.show(tokens.encode(messages)) == "^H:-Lc;--Ld;L--+#".replace("H", "<unk>")
    assert update_messages(COMPACT, transcript, reward=0.0)[-1].content == "L---#"
    assert COMPACT.solve_system("ignored", "?RU?", 1000) == "?RU?"


def test_compact_unanswered_observation_stands_before_the_request():
    transcript = prompts.Transcript(
        system_prompt="", observations=(":-L", "--L"), actions=("c",), final_observation=None
    )
    assert [m.content for m in update_messages(COMPACT, transcript, reward=0.0)] == [
        *("H", ":-L", "c", "--L-#")
    ]


def test_compact_hints_fit_the_symbols():
    tokens = chat.load_chat("builtin:symbols")
    for text in (COMPACT.null_hint, COMPACT.no_hint, "<URDL>", "+#", "-#"):
        assert tokens.decode(tokens.respond(text)) == text


def hint_of(body: str) -> str:
    return f"I think.\n{FULL.start_delimiter}\n{body}\n{FULL.end_delimiter}\n"


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        (hint_of("- a"), "- a"),
        (hint_of("  - a\n- b\n\n"), "- a\n- b"),
        (hint_of("- a") + "more", "- a"),
        (hint_of(""), None),
        (hint_of(" \n\t"), None),
        ("- a", None),
        (hint_of("- a") * 2, None),
        (hint_of(FULL.start_delimiter), None),
        (hint_of("- a") + FULL.end_delimiter, None),
        (f"{FULL.end_delimiter} - a {FULL.start_delimiter}", None),
        (FULL.start_delimiter + "- a", None),
        ("- a" + FULL.end_delimiter, None),
        (hint_of("- a").lower(), None),
        ("", None),
    ],
)
def test_parse_hint_is_strict(text, hint):
    assert prompts.parse_hint(text, FULL) == hint


@pytest.mark.parametrize(
    ("text", "hint"),
    [("<URDL>", "URDL"), ("a<b>c", "b"), ("<>", None), ("<<a>", None), (">a<", None), ("<a", None)],
)
def test_parse_compact_hint(text, hint):
    assert prompts.parse_hint(text, COMPACT) == hint


@pytest.mark.parametrize("style", PROMPT_STYLES.values(), ids=PROMPT_STYLES)
def test_no_output_breaks_the_parser(style):
    rng = random.Random(0)
    pieces = [style.start_delimiter, style.end_delimiter, "=== ", "<", "\n", " ", "\x00", "é", "a"]
    pieces += ["{{ x }}", "<|im_end|>", "\ud800", "🤖", style.start_delimiter[:-1]]
    num_parsed = 0
    for _ in range(10_000):
        body = prompts.parse_hint("".join(rng.choices(pieces, k=rng.randint(0, 12))), style)
        if body is not None:
            num_parsed += 1
            assert body == body.strip() != ""
            assert style.start_delimiter not in body
            assert style.end_delimiter not in body
    assert num_parsed > 100


def test_random_bytes_through_decode_and_parse():
    tokens = chat.load_chat("builtin:bytes")
    rng = np.random.default_rng(0)
    for _ in range(10_000):
        text = tokens.decode(rng.integers(0, 259, size=30))
        assert prompts.parse_hint(text, FULL) is None


def test_prompts_never_say_what_is_hidden():
    folder = pathlib.Path(prompts.__file__).parent / "templates"
    texts = [path.read_text() for path in folder.rglob("*.jinja")]
    assert len(texts) == 5
    for word in ("hidden", "secret", "mapping", "clue", "direction", "recipe"):
        assert not any(word in text.lower() for text in texts), word
