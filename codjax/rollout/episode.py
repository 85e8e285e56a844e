"""One episode: a conversation with an environment, or one revision of the hint.

    solved = await solve(pack, position, env=env, hint=hint, …)      # many turns
    update = await update(solved, show_reward=True, …)               # one turn; .hint_out goes on

Nothing that a model, a server or an environment does raises here: each ends the episode with a
`StopReason`. What does raise is a bug of ours.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from codjax import chat as chats
from codjax import seeds, types
from codjax.envs import protocol
from codjax.rollout import prompts, rewards
from codjax.rollout import sampler as samplers
from codjax.rollout.settings import RolloutSettings, settings_from

__all__ = ["RolloutSettings", "Solved", "settings_from", "solve", "update"]

T = TypeVar("T")

TOO_LONG_FEEDBACK = "The conversation grew too long, so the task was stopped without success."

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Solved:
    """A solve episode and what of it is shown to the hint writer.

    `group` is what its requests had in common with those of the pack's other runs.
    """

    episode: types.Episode
    transcript: prompts.Transcript
    group: int


async def solve(
    pack: types.Pack,
    position: int,
    *,
    env: protocol.Environment,
    hint: str,
    sampler: samplers.Sampler,
    chat: chats.Chat,
    settings: RolloutSettings,
    seed: int,
) -> Solved:
    """Plays the task at `position` of the pack to its end.

    Args:
        pack: the pack being run.
        position: which of its tasks.
        env: the environment; it is reset here.
        hint: what the system prompt carries.
        sampler: the policy.
        chat: its tokenizer and template.
        settings: of the rollout.
        seed: of this episode; every turn derives its own.

    Returns:
        The episode with its transcript. If its `stop_reason` is a failure or `PROMPT_TOO_LONG`,
        the reward is 0 and the feedback says what happened.
    """
    talk = _Conversation(sampler=sampler, chat=chat, settings=settings, seed=seed, group=pack.seed)
    try:
        await _play(talk, env, pack, position, hint)
        outcome = _ask(env.result)
        stop_reason = outcome.failure or types.StopReason.ENVIRONMENT
    except _EnvironmentError as error:
        _logger.warning(
            "The environment failed at position %d of pack %d.",
            position,
            pack.seed,
            exc_info=error.__cause__,
        )
        stop_reason, outcome = types.StopReason.ENVIRONMENT_FAILED, _nothing(str(error))
    except samplers.PromptTooLongError:
        stop_reason, outcome = types.StopReason.PROMPT_TOO_LONG, _nothing(TOO_LONG_FEEDBACK)
    except samplers.SamplerError as error:
        stop_reason, outcome = types.StopReason.SAMPLER_FAILED, _nothing(str(error))
    num_turns = len(talk.turns)
    episode = types.Episode(
        kind=types.EpisodeKind.SOLVE_TASK,
        position=position,
        turns=tuple(talk.turns),
        raw_reward=outcome.raw_reward,
        reward=_solve_reward(talk, outcome) if stop_reason not in types.FAILURES else 0.0,
        is_success=outcome.is_success,
        has_format_error=outcome.format_error,
        stop_reason=stop_reason,
        feedback=outcome.feedback,
        hint_in=hint,
        hint_out=hint,
        observations=tuple(talk.observations[:num_turns]),
        actions=tuple(talk.actions),
    )
    compress = settings.compress or _keep_all
    transcript = prompts.Transcript(
        system_prompt=talk.system_prompt,
        observations=tuple(talk.observations),
        actions=tuple(compress(action) for action in talk.actions),
        final_observation=talk.final_observation if settings.include_final_observation else None,
    )
    return Solved(episode=episode, transcript=transcript, group=pack.seed)


async def update(
    solved: Solved,
    *,
    show_reward: bool,
    sampler: samplers.Sampler,
    chat: chats.Chat,
    settings: RolloutSettings,
    seed: int,
) -> types.Episode:
    """Lets the policy revise the hint after a task; `hint_out` is what goes on.

    Args:
        solved: the task, with the hint that it was given.
        show_reward: whether the shaped reward is mentioned.
        sampler: the policy.
        chat: its tokenizer and template.
        settings: of the rollout.
        seed: of this episode.
    """
    task, style = solved.episode, settings.style
    messages = style.update_messages(
        solved.transcript,
        hint=task.hint_in,
        reward=task.reward if show_reward else None,
        feedback=task.feedback,
        length_request=settings.response_length_request,
    )
    talk = _Conversation(
        sampler=sampler, chat=chat, settings=settings, seed=seed, group=solved.group
    )
    body, reward, has_format_error, feedback = None, 0.0, False, ""
    try:
        body = prompts.parse_hint(await talk.answer(chat.encode(messages)), style)
        reward = _update_reward(talk, body is not None)
        has_format_error = body is None
        stop_reason = talk.turns[0].stop_reason
    except samplers.PromptTooLongError:
        stop_reason = types.StopReason.PROMPT_TOO_LONG
    except samplers.SamplerError as error:
        stop_reason, feedback = types.StopReason.SAMPLER_FAILED, str(error)
    unparsed_hint = style.no_hint if settings.wipes_hint else task.hint_in
    return types.Episode(
        kind=types.EpisodeKind.UPDATE_CONTEXT,
        position=task.position,
        turns=tuple(talk.turns),
        raw_reward=float(body is not None),
        reward=reward,
        is_success=body is not None,
        has_format_error=has_format_error,
        stop_reason=stop_reason,
        feedback=feedback,
        hint_in=task.hint_in,
        hint_out=unparsed_hint if body is None else style.hint_prefix + body,
        observations=(messages[-1].content,) * len(talk.turns),
        actions=tuple(talk.actions),
    )


class _EnvironmentError(Exception):
    """Code of an environment raised; the cause is what it raised."""


@dataclasses.dataclass(kw_only=True)
class _Conversation:
    """What has been said so far in one episode, and with whom."""

    sampler: samplers.Sampler
    chat: chats.Chat
    settings: RolloutSettings
    seed: int
    group: int  # of the requests: those of a pack share prefixes
    system_prompt: str = ""  # the environment's own
    max_turns: int = 1
    turns: list[types.Turn] = dataclasses.field(default_factory=list)
    observations: list[str] = dataclasses.field(default_factory=list)
    actions: list[str] = dataclasses.field(default_factory=list)
    final_observation: str | None = None

    async def answer(self, prompt: np.ndarray) -> str:
        """The text of the model's answer to a prompt; the turn is kept.

        Raises:
            PromptTooLongError: the prompt is longer than the settings or the sampler allow.
            SamplerError: no answer could be had.
        """
        settings = self.settings
        if len(prompt) > settings.max_prompt_tokens:
            raise samplers.PromptTooLongError(
                f"the prompt has {len(prompt)} tokens, rollout.max_prompt_tokens is "
                f"{settings.max_prompt_tokens}."
            )
        params = samplers.SamplingParams(
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            max_tokens=settings.max_response_tokens,
            stop_tokens=self.chat.stop_tokens,
        )
        turn_seed = seeds.derive_seed(self.seed, len(self.turns))
        generation = await self.sampler.generate(prompt, params, seed=turn_seed, group=self.group)
        turn = types.Turn(
            prompt_tokens=prompt,
            response_tokens=generation.tokens,
            sampler_logprobs=generation.logprobs,
            policy_version=generation.policy_version,
            version_spans=generation.version_spans,
            stop_reason=generation.stop_reason,
        )
        self.turns.append(turn)
        self.actions.append(self.chat.decode(turn.response_tokens))
        return self.actions[-1]


async def _play(
    talk: _Conversation,
    env: protocol.Environment,
    pack: types.Pack,
    position: int,
    hint: str,
) -> None:
    """Talks with the environment until it is done, or its turns are used up."""
    chat, settings = talk.chat, talk.settings
    observation = _ask(
        env.reset,
        pack.tasks[position].record,
        pack_seed=pack.seed,
        slot=position,
        pack_size=len(pack.tasks),
        env_task_idx=pack.env_task_indices[position],
    )
    talk.system_prompt = _ask(lambda: env.system_prompt)
    talk.max_turns = _ask(lambda: env.max_turns)
    system = settings.style.solve_system(talk.system_prompt, hint, settings.response_length_request)
    messages = [chats.Message("system", system), chats.Message("user", observation)]
    prompt = chat.encode(messages)
    for _ in range(talk.max_turns):
        talk.observations.append(observation)
        action = await talk.answer(prompt)
        step = _ask(env.step, action)
        observation = step.observation
        if step.done:
            break
        if settings.compress is None:
            prompt = chat.extend(prompt, talk.turns[-1].response_tokens, observation)
        else:  # the past is rewritten, so it is tokenized anew
            messages.append(chats.Message("assistant", settings.compress(action)))
            messages.append(chats.Message("user", observation))
            prompt = chat.encode(messages)
    talk.final_observation = observation


def _ask(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Calls code of an environment, in which anything may go wrong."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        raise _EnvironmentError(f"{type(error).__name__}: {error}") from error


def _nothing(feedback: str) -> protocol.EpisodeResult:
    return protocol.EpisodeResult(
        raw_reward=0.0, is_success=False, feedback=feedback, format_error=False, num_turns=0
    )


def _keep_all(text: str) -> str:
    return text


def _solve_reward(talk: _Conversation, outcome: protocol.EpisodeResult) -> float:
    return rewards.task_reward(
        outcome.raw_reward,
        num_turns=len(talk.turns),
        max_turns=talk.max_turns,
        response_lengths=[len(turn.response_tokens) for turn in talk.turns],
        coef=talk.settings.length_coef,
        zero_tokens=talk.settings.length_zero_tokens,
        full_tokens=talk.settings.length_full_tokens,
    )


def _update_reward(talk: _Conversation, parsed: bool) -> float:
    return rewards.update_reward(
        parsed=parsed,
        num_tokens=len(talk.turns[0].response_tokens),
        coef=talk.settings.update_coef,
        min_tokens=talk.settings.update_min_tokens,
        zero_tokens=talk.settings.update_zero_tokens,
        full_tokens=talk.settings.update_full_tokens,
    )
