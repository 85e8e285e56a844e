"""What goes over the wire to an OpenAI-compatible endpoint, and what of its answers is believed.

    route = ROUTES["completions"]
    body = route.body(prompt, params, model=model, chat=chat, seed=0, max_tokens=64)
    answer = route.parse(post(route.path, body), prompt=prompt, params=params, …)

Pure functions. "completions" sends token ids, and takes token ids back where the endpoint gives
them (vLLM and SGLang do, when asked to). "chat" sends messages and takes a text, which becomes
tokens of our own tokenizer; whatever template and tokenizer stand behind it are its own affair.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from codjax import chat as chats
from codjax.rollout.sampler import SamplerError, SamplingParams
from codjax.rollout.sglang.wire import BadAnswerError

# Endpoints whose further options are known, by what /v1/models calls their owner.
_EXTENDED = ("vllm", "sglang")


class OtherTokenizerError(SamplerError):
    """The endpoint's tokens are not those of `tokenizer.source`; asking again would not help."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A model of an endpoint.

    Attributes:
        name: as requests name it.
        context_tokens: longest prompt with its response; None where the endpoint does not tell.
        is_extended: whether it takes the further options of vLLM and SGLang.
    """

    name: str
    context_tokens: int | None
    is_extended: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """One response.

    Attributes:
        tokens: int32 `[m]`, m >= 1.
        is_stop: whether the model ended it; else it was cut.
        has_ids: whether the tokens are the endpoint's own, and not those of our tokenizer.
    """

    tokens: np.ndarray
    is_stop: bool
    has_ids: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Route:
    """One of the two ways to ask.

    Attributes:
        path: below the address of the endpoint.
        body: prompt, params, model=, chat=, seed=, max_tokens= -> what is sent.
        parse: answer, prompt=, params=, chat=, max_tokens= -> the response.
    """

    path: str
    body: Callable[..., dict[str, Any]]
    parse: Callable[..., Answer]


def completions_body(
    prompt: np.ndarray,
    params: SamplingParams,
    *,
    model: Model,
    chat: chats.Chat,
    seed: int,
    max_tokens: int,
) -> dict[str, Any]:
    """The body that asks `/completions` to go on with the int32 `[n]` prompt."""
    body = _sampling(params, model, seed, max_tokens) | {"prompt": prompt.tolist()}
    if model.is_extended:
        return body | {"stop_token_ids": list(params.stop_tokens), "return_token_ids": True}
    return body | {"stop": _stop_texts(params, chat)}


def chat_body(
    prompt: np.ndarray,
    params: SamplingParams,
    *,
    model: Model,
    chat: chats.Chat,
    seed: int,
    max_tokens: int,
) -> dict[str, Any]:
    """The body that asks `/chat/completions` for the next turn of the prompt's conversation.

    Raises:
        ValueError: the prompt is none of the chat's, or its template hides where messages end.
    """
    messages = [message._asdict() for message in chat.messages(prompt)]
    body = _sampling(params, model, seed, max_tokens) | {"messages": messages}
    if model.is_extended:  # as our own prompts: without a thinking part
        body["chat_template_kwargs"] = {"enable_thinking": False}
    return body


def parse_completion(
    answer: Any,
    *,
    prompt: np.ndarray,
    params: SamplingParams,
    chat: chats.Chat,
    max_tokens: int,
) -> Answer:
    """The response in what `/completions` answered, once everything in it agrees.

    Raises:
        BadAnswerError: with what is wrong, in words that follow "the endpoint: ".
        OtherTokenizerError: its tokens are not ours.
    """
    choice = _choice(answer)
    text, is_stop = _field(choice, "text", str), _is_stop(choice)
    if choice.get("token_ids") is None:
        for stop in _stop_texts(params, chat):
            text, found, _ = text.partition(stop)
            is_stop = is_stop or bool(found)
        return _spoken(text, is_stop, chat)
    ids = _ids(choice, "token_ids")
    if choice.get("prompt_token_ids") is not None and _ids(choice, "prompt_token_ids") != [
        *prompt.tolist()
    ]:
        raise BadAnswerError("it read other tokens than it was sent")
    if not 0 < len(ids) <= max_tokens:
        raise BadAnswerError(f"it sent {len(ids)} tokens when asked for 1 to {max_tokens}")
    ends = [index + 1 for index, token in enumerate(ids) if token in params.stop_tokens]
    tokens = np.array(ids[: ends[0]] if ends else ids, np.int32)
    _check_tokenizer(tokens, text, params, chat)
    return Answer(tokens=tokens, is_stop=is_stop or bool(ends), has_ids=True)


def parse_chat(
    answer: Any,
    *,
    prompt: np.ndarray,
    params: SamplingParams,
    chat: chats.Chat,
    max_tokens: int,
) -> Answer:
    """The response in what `/chat/completions` answered: its text, in tokens of our tokenizer.

    Thinking that the endpoint keeps apart is no part of it. An answer that was cut before its
    text began is an empty one; a refusal is a text.

    Raises:
        BadAnswerError: as `parse_completion`.
    """
    del prompt, params, max_tokens
    choice = _choice(answer)
    message, is_stop = _field(choice, "message", dict), _is_stop(choice)
    content = message.get("content")
    if content is None and type(message.get("refusal")) is str:
        content = message["refusal"]
    if content is None and not is_stop:
        content = ""
    if type(content) is not str:
        raise BadAnswerError(f"content should be str, and is {_short(content)}")
    return _spoken(content, is_stop, chat)


ROUTES: Mapping[str, Route] = {
    "completions": Route(path="/completions", body=completions_body, parse=parse_completion),
    "chat": Route(path="/chat/completions", body=chat_body, parse=parse_chat),
}


def parse_models(answer: Any) -> list[Model]:
    """What `/models` lists; some endpoints send the list itself.

    Raises:
        BadAnswerError: it is no list of models.
    """
    cards = answer if isinstance(answer, list) else _field(answer, "data", list)
    return [
        Model(
            name=_field(card, "id", str),
            context_tokens=length if type(length := card.get("max_model_len")) is int else None,
            is_extended=card.get("owned_by") in _EXTENDED,
        )
        for card in cards
    ]


def _sampling(params: SamplingParams, model: Model, seed: int, max_tokens: int) -> dict[str, Any]:
    body = {
        "model": model.name,
        "max_tokens": max_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "seed": seed % 2**31,
        "stream": False,
    }
    if model.is_extended:
        # What is not said is taken from the model's generation_config.json, which may differ.
        body |= {"top_k": params.top_k or -1, "min_p": 0.0, "repetition_penalty": 1.0}
    return body


def _stop_texts(params: SamplingParams, chat: chats.Chat) -> list[str]:
    return [chat.show(np.array([token])) for token in params.stop_tokens]


def _spoken(text: str, is_stop: bool, chat: chats.Chat) -> Answer:
    """A text as tokens; the end of turn is left off where it was cut, unless nothing would stay."""
    tokens = chat.respond(text)
    if not is_stop and len(tokens) > 1:
        tokens = tokens[:-1]
    return Answer(tokens=tokens, is_stop=is_stop, has_ids=False)


def _check_tokenizer(
    tokens: np.ndarray, text: str, params: SamplingParams, chat: chats.Chat
) -> None:
    """The endpoint and we must read the same in its tokens, or it read nonsense in ours."""
    said = tokens[:-1] if int(tokens[-1]) in params.stop_tokens else tokens
    ours = chat.decode(said)
    # An endpoint without a tokenizer sends no text; of half a character each shows what it likes;
    # blanks around tokens are cleaned up or not. An id beyond the tokenizer, of a vocabulary that
    # was filled up to a round number, is no text for either.
    if text and "\ufffd" not in ours + text and "".join(ours.split()) != "".join(text.split()):
        raise OtherTokenizerError(
            f"the endpoint reads {_short(text)} in tokens in which tokenizer.source reads "
            f"{_short(ours)}; set it to the folder of the endpoint's model."
        )


def _choice(answer: Any) -> dict[str, Any]:
    choices = _field(answer, "choices", list)
    if not choices:
        raise BadAnswerError("it sent no choices")
    if not isinstance(choices[0], dict):
        raise BadAnswerError(f"its choice should be dict, and is {_short(choices[0])}")
    return choices[0]


def _is_stop(choice: dict[str, Any]) -> bool:
    reason = choice.get("finish_reason")
    if reason not in ("stop", "length"):
        raise BadAnswerError(f"it finished for a reason that nobody asked for: {_short(reason)}")
    return bool(reason == "stop")


def _ids(choice: dict[str, Any], name: str) -> list[int]:
    ids = _field(choice, name, list)
    if not all(type(value) is int and 0 <= value < 2**31 for value in ids):
        raise BadAnswerError(f"{name} are not ids of tokens")
    return list(ids)


def _field(values: Any, name: str, kind: type) -> Any:
    found = values.get(name) if isinstance(values, dict) else None
    if type(found) is not kind:
        raise BadAnswerError(f"{name} should be {kind.__name__}, and is {_short(found)}")
    return found


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
