"""Every prompt text around an environment's own, in two styles, and the parser of hints.

"full" speaks English to language models; "compact" is a notation of one symbol a token for models
too small to read English. The texts stand in `templates/`; what each must tell the model, and in
which order, is spec/environments_core.md §1.3-1.5 and spec/algorithm.md §4. They are the same for
every environment and never say what is to be found out.

    style = PROMPT_STYLES[config.rollout.prompt_style]
    system = style.solve_system(env.system_prompt, style.null_hint, length_request)
    messages = style.update_messages(transcript, hint=…, reward=…, feedback=…, length_request=…)
    body = parse_hint(answer, style)
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any, Protocol

import jinja2

from codjax import chat
from codjax.envs import answers

NO_ACTION = "(no action)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transcript:
    """A solve episode as the hint writer sees it.

    Attributes:
        system_prompt: the environment's own, without the hint and length sections.
        observations: what was shown, in order; one more than `actions` if the last one could not
            be answered.
        actions: what was answered, after context compression.
        final_observation: what the last action did, or None to leave it out, as published.
    """

    system_prompt: str
    observations: tuple[str, ...]
    actions: tuple[str, ...]
    final_observation: str | None


class SolveSystem(Protocol):
    """How a style makes the system prompt of a solve episode."""

    def __call__(self, system_prompt: str, hint: str, length_request: int | None) -> str:
        """The environment's text, then the hint, then the wish for short responses, if any."""


class UpdateMessages(Protocol):
    """How a style asks for a new hint."""

    def __call__(
        self,
        transcript: Transcript,
        *,
        hint: str,
        reward: float | None,
        feedback: str,
        length_request: int | None,
    ) -> list[chat.Message]:
        """The conversation to be answered with a hint; a reward of None is not mentioned."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptStyle:
    """The wording of everything that surrounds an environment.

    Attributes:
        solve_system: makes the system prompt of a solve episode.
        update_messages: makes the conversation of an update episode.
        start_delimiter: stands before the body of a new hint, exactly once.
        end_delimiter: stands after it, exactly once.
        null_hint: the hint of position 0, before anything is known.
        no_hint: the hint after an update that could not be parsed, when hints are wiped.
        hint_prefix: put before a parsed body to make the hint that is carried on.
    """

    solve_system: SolveSystem
    update_messages: UpdateMessages
    start_delimiter: str
    end_delimiter: str
    null_hint: str
    no_hint: str
    hint_prefix: str


def parse_hint(text: str, style: PromptStyle) -> str | None:
    """The stripped body of the one hint in a response, or None.

    Strict: each delimiter occurs exactly once in the whole text, the start one first, and the
    body is not blank. Its length is limited by `rollout.max_response_tokens` alone.
    """
    body = answers.extract(text, style.start_delimiter, closing=style.end_delimiter)
    return (body or "").strip() or None


def trajectory_text(transcript: Transcript) -> str:
    r"""The transcript as blocks of text with a blank line between them.

    >>> transcript = Transcript(
    ...     system_prompt="Find it.",
    ...     observations=("1/2",),
    ...     actions=("left",),
    ...     final_observation=None,
    ... )
    >>> trajectory_text(transcript)
    'System:\nFind it.\n\nStep 1:\nObservation: 1/2\nAction: left'
    """
    blocks = [f"System:\n{transcript.system_prompt}"]
    for index, observation in enumerate(transcript.observations):
        action = transcript.actions[index] if index < len(transcript.actions) else NO_ACTION
        blocks.append(f"Step {index + 1}:\nObservation: {observation}\nAction: {action}")
    if transcript.final_observation is not None:
        blocks.append(f"Final observation: {transcript.final_observation}")
    return "\n\n".join(blocks)


def _full_solve_system(system_prompt: str, hint: str, length_request: int | None) -> str:
    return _render(
        "full/solve_system.jinja",
        system_prompt=system_prompt,
        hint=hint,
        length_request=length_request,
    )


def _full_update_messages(
    transcript: Transcript,
    *,
    hint: str,
    reward: float | None,
    feedback: str,
    length_request: int | None,
) -> list[chat.Message]:
    system = _render(
        "full/update_system.jinja",
        start_delimiter=FULL.start_delimiter,
        end_delimiter=FULL.end_delimiter,
        length_request=length_request,
    )
    user = _render(
        "full/update_user.jinja",
        hint=hint,
        trajectory=trajectory_text(transcript),
        reward=reward,
        feedback=feedback,
    )
    return [chat.Message("system", system), chat.Message("user", user)]


def _compact_solve_system(system_prompt: str, hint: str, length_request: int | None) -> str:
    del system_prompt, length_request  # no symbols for them
    return _render("compact/solve_system.jinja", hint=hint)


def _compact_update_messages(
    transcript: Transcript,
    *,
    hint: str,
    reward: float | None,
    feedback: str,
    length_request: int | None,
) -> list[chat.Message]:
    """The solve conversation, then what the last action did, the reward's sign and `#`.

    Its tokens begin with those of the solve episode, which a server has in its cache and which
    batching stores once.
    """
    del feedback  # no symbols for it
    messages = [chat.Message("system", _compact_solve_system("", hint, length_request))]
    for observation, action in zip(transcript.observations, transcript.actions, strict=False):
        messages += [chat.Message("user", observation), chat.Message("assistant", action)]
    unanswered = transcript.observations[len(transcript.actions) :]
    last_observation = "".join((*unanswered, transcript.final_observation or ""))
    request = _render("compact/update_user.jinja", last_observation=last_observation, reward=reward)
    return [*messages, chat.Message("user", request)]


FULL = PromptStyle(
    solve_system=_full_solve_system,
    update_messages=_full_update_messages,
    start_delimiter="=== BEGIN NEW HINTS ===",
    end_delimiter="=== END NEW HINTS ===",
    null_hint="Hints: none so far",
    no_hint="Hints: none available, the last revision could not be read",
    hint_prefix="Hints:\n",
)
COMPACT = PromptStyle(
    solve_system=_compact_solve_system,
    update_messages=_compact_update_messages,
    start_delimiter="<",
    end_delimiter=">",
    null_hint="?",
    no_hint="?",
    hint_prefix="",
)
PROMPT_STYLES = {"full": FULL, "compact": COMPACT}


def _render(name: str, **values: Any) -> str:
    return _template(name).render(**values)


@functools.cache
def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent / "templates"),
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # prompts are plain text
        trim_blocks=True,
    )
    return environment.get_template(name)
