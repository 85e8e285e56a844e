"""What `config.rollout` asks of episodes, looked up once and handed on as one record.

Names become functions here, so that the code of an episode never sees the config.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from ml_collections import ConfigDict

from codjax.envs import answers
from codjax.rollout import prompts

UNREADABLE_ANSWER = "(the answer of this step could not be read)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutSettings:
    """What `config.rollout` says about episodes, looked up and ready for use.

    Attributes:
        style: wording of the prompts.
        temperature, top_p, top_k: how tokens are drawn; evaluation replaces them.
        max_response_tokens: hard cap of one model call.
        max_prompt_tokens: a longer prompt ends the episode.
        response_length_request: tokens asked for in the prompt, or None.
        compress: rewrites an earlier answer before it is shown again; None keeps history as it
            was sampled, and then a prompt extends the tokens of the one before.
        include_final_observation: show the hint writer what the last action did.
        wipes_hint: after an update that cannot be parsed; else the previous hint is kept.
        blanks_hints: every episode gets the empty hint.
        keeps_env_memory: under the Ralph modes, one environment serves all tries of a run.
        length_coef, length_zero_tokens, length_full_tokens: see `rewards.task_reward`.
        update_coef, update_min_tokens, update_zero_tokens, update_full_tokens: see
            `rewards.update_reward`.
    """

    style: prompts.PromptStyle
    temperature: float
    top_p: float
    top_k: int
    max_response_tokens: int
    max_prompt_tokens: int
    response_length_request: int | None
    compress: Callable[[str], str] | None
    include_final_observation: bool
    wipes_hint: bool
    blanks_hints: bool
    keeps_env_memory: bool
    length_coef: float
    length_zero_tokens: int
    length_full_tokens: int
    update_coef: float
    update_min_tokens: int | None
    update_zero_tokens: int | None
    update_full_tokens: int | None


def settings_from(rollout: ConfigDict, *, keep_env_memory: bool) -> RolloutSettings:
    """The settings of training: `config.rollout` and `config.packs.keep_env_memory`.

    Evaluation takes the same and replaces `temperature`, `top_p` and `top_k`.
    """
    return RolloutSettings(
        style=prompts.PROMPT_STYLES[rollout.prompt_style],
        temperature=rollout.temperature,
        top_p=1.0,
        top_k=0,
        max_response_tokens=rollout.max_response_tokens,
        max_prompt_tokens=rollout.max_prompt_tokens,
        response_length_request=rollout.response_length_request,
        compress=COMPRESSIONS[rollout.context_compression],
        include_final_observation=rollout.include_final_observation,
        wipes_hint=ON_PARSE_FAILURE[rollout.on_parse_failure],
        blanks_hints=rollout.blank_hints,
        keeps_env_memory=keep_env_memory,
        length_coef=rollout.length_penalty.coef,
        length_zero_tokens=rollout.length_penalty.zero_tokens,
        length_full_tokens=rollout.length_penalty.full_tokens,
        update_coef=rollout.update_penalty.coef,
        update_min_tokens=rollout.update_penalty.min_tokens,
        update_zero_tokens=rollout.update_penalty.zero_tokens,
        update_full_tokens=rollout.update_penalty.full_tokens,
    )


def keep_answer(text: str) -> str:
    """The answer block alone, or a note that there is none that can be read.

    >>> keep_answer("Hm, left? <answer>left</answer>")
    '<answer>left</answer>'
    """
    body = answers.extract(text)
    if body is None:
        return UNREADABLE_ANSWER
    return answers.ANSWER_OPEN + body + answers.ANSWER_CLOSE


def remove_think(text: str) -> str:
    """The text without its closed think spans, in linear time whatever it holds.

    >>> remove_think("<think>hm</think>left<think>")
    'left<think>'
    """
    kept: list[str] = []
    opening, closing = "<think>", "</think>"
    position = 0
    while True:
        start = text.find(opening, position)
        end = text.find(closing, start + len(opening)) if start >= 0 else -1
        if end < 0:
            return "".join((*kept, text[position:]))
        kept.append(text[position:start])
        position = end + len(closing)


COMPRESSIONS: dict[str, Callable[[str], str] | None] = {
    "keep_all": None,
    "keep_answer": keep_answer,
    "remove_think": remove_think,
}
ON_PARSE_FAILURE = {"wipe": True, "keep_previous": False}  # does it wipe the hint?
