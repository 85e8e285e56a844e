"""What goes over the wire to an SGLang server, and what of its answers can be believed.

    body = generate_body(prompt, params, rid=rid, max_new_tokens=64)
    answer = parse_generation(decoded(post("/generate", encoded(body))), rid=rid, …)

Pure functions; the shapes are those of sglang 0.5.23. A server can answer 200 with fewer log-probs
than tokens, nulls where weights are not finite, tokens of other weights than asked for, or another
request's answer: each of these is a `BadAnswerError`, and nothing of that answer is used.
"""

from __future__ import annotations

import dataclasses
import enum
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import orjson

from codjax import types
from codjax.rollout.sampler import SamplerError, SamplingParams

# A log-prob may be above 0 by what a normaliser in bfloat16 is off.
_ROUNDING = 1e-2
# An id that no vocabulary has: the server refuses it with a sentence that tells its own limit.
_NO_TOKEN = 2**31 - 1
# By so much is the longest prompt, which its memory limits, below the longest prompt + response
# (`max_req_len` in its tp_worker.py and scheduler.py); what exceeds that is cut without a word.
_RESERVED = 5


class BadAnswerError(SamplerError):
    """The server answered, but not what can be an answer; nothing of it may be used."""


class WrongWeightsError(BadAnswerError):
    """The server answers from other weights than it was given by this run."""


class Finish(enum.Enum):
    """Why the server ended a response."""

    STOP = enum.auto()
    LENGTH = enum.auto()
    ABORT = enum.auto()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer of `/generate`: a response, or the first part of one that was aborted.

    Attributes:
        tokens: int32 `[m]`; of an abort, m may be 0.
        logprobs: float32 `[m]`.
        spans: cover the tokens.
        finish: why it ended.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    spans: tuple[types.VersionSpan, ...]
    finish: Finish


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerInfo:
    """What a server says about itself.

    Attributes:
        sglang_version: such as "0.5.23".
        model_path: folder of the weights that it loaded last.
        architecture: as in a Hugging Face config, such as "Qwen3ForCausalLM".
        context_tokens: longest prompt with its response.
        prompt_tokens: longest prompt; its memory may take less than the model.
        weight_version: as a push or its command line named the weights.
        dp_size, tp_size: data- and tensor-parallel ranks behind the address.
        has_tokenizer: whether it could make texts of tokens.
    """

    sglang_version: str
    model_path: str
    architecture: str
    context_tokens: int
    prompt_tokens: int
    weight_version: str
    dp_size: int
    tp_size: int
    has_tokenizer: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """Requests that a server has running, and waiting (paused and retracted ones too)."""

    num_running: int
    num_waiting: int


def encoded(body: Any) -> bytes:
    """JSON of what `…_body` made, in which arrays of integers may stand for lists.

    >>> encoded({"input_ids": np.array([7, 8])})
    b'{"input_ids":[7,8]}'
    """
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)


def decoded(content: bytes) -> Any:
    """What the JSON says.

    Raises:
        ValueError: it is none, or has numbers that JSON does not know, such as NaN.
    """
    return orjson.loads(content)


def version_name(run_id: str, policy_version: int) -> str:
    """The `weight_version` on the wire: tells apart what another run left on a server.

    >>> version_name("a1", 7)
    'a1-7'
    """
    return f"{run_id}-{policy_version}"


def policy_version(name: str, run_id: str) -> int:
    """The policy version behind a `weight_version`.

    Raises:
        WrongWeightsError: the weights are not of this run.

    >>> policy_version("a1-7", "a1")
    7
    """
    prefix, _, number = name.rpartition("-")
    if prefix != run_id or not number.isdecimal():
        raise WrongWeightsError(
            f"its weights are {name!r}, not of this run, which names them {run_id!r} and a number"
        )
    return int(number)


def generate_body(
    prompt: np.ndarray, params: SamplingParams, *, rid: str, max_new_tokens: int
) -> dict[str, Any]:
    """The body that asks `/generate` for a response of at most `max_new_tokens`.

    Args:
        prompt: int32 `[n]`, ids of the model's vocabulary (another id kills the server).
        params: how tokens are drawn; the server ends at its own end-of-text tokens as well.
        rid: id of the request, used once.
        max_new_tokens: at least 1; with the prompt, within the context.
    """
    return _body(
        prompt,
        rid,
        logprob_start=-1,
        sampling={
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k or -1,
            "max_new_tokens": max_new_tokens,
            "stop_token_ids": list(params.stop_tokens),
            "skip_special_tokens": False,
            "no_stop_trim": True,
        },
    )


def score_body(tokens: np.ndarray, *, rid: str) -> dict[str, Any]:
    """The body that asks `/generate` for the log-probs of given tokens, and no new ones."""
    return _body(tokens, rid, logprob_start=0, sampling={"temperature": 1.0, "max_new_tokens": 0})


def vocabulary_body(rid: str) -> dict[str, Any]:
    """A request that the server refuses with the size of its vocabulary; see `vocab_size`."""
    return _body(
        np.zeros(1, np.int32),
        rid,
        logprob_start=-1,
        sampling={"max_new_tokens": 1, "logit_bias": {str(_NO_TOKEN): 0.0}},
    )


def vocab_size(refusal: str) -> int | None:
    """The size of the vocabulary in the answer to `vocabulary_body`, or None.

    >>> vocab_size("logit_bias must has keys in [0, 511], got 2147483647.")
    512
    """
    found = re.search(r"in \[0, (\d+)\], got", refusal)
    return int(found.group(1)) + 1 if found else None


def parse_generation(
    answer: Any,
    *,
    rid: str,
    max_new_tokens: int,
    vocab_size: int,
    run_id: str,
    oldest_version: int,
) -> Answer:
    """The answer, once everything in it agrees.

    Args:
        answer: JSON of a 200 of `/generate`.
        rid: of the request.
        max_new_tokens: that were asked for.
        vocab_size: V.
        run_id: of this run, in the names of its weights.
        oldest_version: of the weights that the server was given before the request was sent.

    Raises:
        BadAnswerError: with what is wrong, in words that follow "the server: ".
    """
    meta = _meta(answer, rid)
    finish = _finish(meta)
    ids = _whole_numbers(_field(answer, "output_ids", list), "output_ids")
    if finish is Finish.ABORT and not len(ids):  # aborted before its first token
        return Answer(tokens=ids, logprobs=np.zeros(0, np.float32), spans=(), finish=finish)
    logprobs, scored_ids = _logprobs(_field(meta, "output_token_logprobs", list))
    completion = _field(meta, "completion_tokens", int)
    if not completion == len(ids) == len(logprobs):
        raise BadAnswerError(
            f"it counts {completion} tokens, and sent {len(ids)} with {len(logprobs)} log-probs"
        )
    if not 0 < len(ids) <= max_new_tokens:
        raise BadAnswerError(f"it sent {len(ids)} tokens when asked for 1 to {max_new_tokens}")
    if not np.array_equal(ids, scored_ids):
        raise BadAnswerError("its log-probs are of other tokens than those it sent")
    if finish is Finish.STOP and meta["finish_reason"]["matched"] != ids[-1]:
        raise BadAnswerError(f"it stopped at {meta['finish_reason']['matched']}, and sent more")
    if ids.min() < 0 or ids.max() >= vocab_size:
        wrong = ids[(ids < 0) | (ids >= vocab_size)][0]
        raise BadAnswerError(f"it sent token {wrong}, outside the vocabulary of {vocab_size}")
    spans = _spans(_field(meta, "weight_versions", list), len(ids), run_id)
    oldest = min(span.version for span in spans)
    if oldest < oldest_version:
        raise WrongWeightsError(
            f"it sampled from {version_name(run_id, oldest)}, older than "
            f"{version_name(run_id, oldest_version)}, which it was given before"
        )
    return Answer(tokens=ids.astype(np.int32), logprobs=logprobs, spans=spans, finish=finish)


def parse_score(answer: Any, tokens: np.ndarray, *, rid: str) -> np.ndarray:
    """Log-probability of each next token: float32 `[n-1]`.

    Raises:
        BadAnswerError: as `parse_generation`, or the request was aborted.
    """
    meta = _meta(answer, rid)
    if _finish(meta) is Finish.ABORT:
        raise BadAnswerError("it aborted the scoring of a text")
    entries = _field(meta, "input_token_logprobs", list)
    logprobs, ids = _logprobs(entries[1:])  # nothing predicts the first token
    # It reports the last id of its vocabulary as 0 here, with the log-prob of the right token.
    is_last = (ids == 0) & (tokens[1:] == tokens.max()) if len(ids) == len(tokens) - 1 else False
    if not np.array_equal(np.where(is_last, tokens.max(), ids), tokens[1:]):
        raise BadAnswerError(
            f"it scored {len(ids) + 1} tokens that are not the {len(tokens)} it was sent"
        )
    return logprobs


def parse_info(server: Any, model: Any, models: Any) -> ServerInfo:
    """What `/server_info`, `/model_info` and `/v1/models` say together.

    Raises:
        BadAnswerError: one of them lacks what every server tells.
    """
    card = (_field(models, "data", list) or [None])[0]
    context = _field(card, "max_model_len", int)
    num_prompt = _field(server, "max_req_input_len", int) - 1
    architectures = _field(model, "architectures", list)
    return ServerInfo(
        sglang_version=_field(server, "version", str),
        model_path=_field(model, "model_path", str),
        architecture=str(architectures[0]) if architectures else "",
        context_tokens=min(context, num_prompt + _RESERVED),
        prompt_tokens=num_prompt,
        weight_version=_field(model, "weight_version", str),
        dp_size=_field(server, "dp_size", int),
        tp_size=_field(server, "tp_size", int),
        has_tokenizer=server.get("skip_tokenizer_init") is False,
    )


def parse_tokens(answer: Any) -> list[int]:
    """The ids in the answer of `/v1/tokenize`.

    >>> parse_tokens({"tokens": [5, 6], "count": 2})
    [5, 6]
    """
    return _whole_numbers(_field(answer, "tokens", list), "tokens").tolist()


def parse_load(answer: Any) -> Load:
    """The sum over the data-parallel ranks of `/v1/loads`."""
    running = waiting = 0
    for rank in _field(answer, "loads", list):
        running += _field(rank, "num_running_reqs", int)
        queues = rank.get("queues") or {}
        waiting += max(
            _field(rank, "num_waiting_reqs", int),
            sum(queues.get(name, 0) for name in ("waiting", "paused", "retracted")),
        )
    return Load(num_running=running, num_waiting=waiting)


def error_text(body: str) -> str:
    """The sentence in an error answer, whichever of its shapes it has, cut to a line.

    >>> import json
    >>> error_text(json.dumps({"error": {"message": "too long"}}))
    'too long'
    """
    found = re.search(r'"(?:message|error|detail)"\s*:\s*"((?:[^"\\]|\\.)*)"', body)
    text = found.group(1).replace('\\"', '"') if found else body
    return " ".join(text.split())[:300]


def _body(
    tokens: np.ndarray, rid: str, *, logprob_start: int, sampling: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "rid": rid,
        "input_ids": np.ascontiguousarray(tokens),
        "sampling_params": sampling,
        "return_logprob": True,
        "logprob_start_len": logprob_start,
        "stream": False,
    }


def _field(values: Any, name: str, kind: type) -> Any:
    found = values.get(name) if isinstance(values, dict) else None
    if type(found) is not kind:
        raise BadAnswerError(f"{name} should be {kind.__name__}, and is {_short(found)}")
    return found


def _meta(answer: Any, rid: str) -> dict[str, Any]:
    meta = _field(answer, "meta_info", dict)
    if meta.get("id") != rid:
        raise BadAnswerError(f"it answered {_short(meta.get('id'))} when asked {rid!r}")
    return meta


def _finish(meta: dict[str, Any]) -> Finish:
    reason = _field(meta, "finish_reason", dict)
    match reason.get("type"):
        case "length":
            return Finish.LENGTH
        case "abort":
            return Finish.ABORT
        case "stop" if type(reason.get("matched")) is int:
            return Finish.STOP
    # A stop at a text that nobody asked for is how it reports weights that are not finite.
    raise BadAnswerError(f"it finished for a reason that nobody asked for: {_short(reason)}")


def _logprobs(entries: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """(log-probs, ids) of `[logprob, id, text]` entries."""
    # Every token of a run passes here: `map` and `set` go through a list at the speed of C.
    if not set(map(type, entries)) <= {list} or min(map(len, entries), default=2) < 2:
        raise BadAnswerError("its log-probs are not lists of a log-prob and a token")
    values = list(map(operator.itemgetter(0), entries))
    if not set(map(type, values)) <= {float, int}:
        raise BadAnswerError("a log-prob is null: its weights may not be finite")
    logprobs = np.array(values, np.float32)
    if not np.isfinite(logprobs).all():
        raise BadAnswerError("a log-prob is not finite: its weights may not be finite either")
    if len(logprobs) and logprobs.max() > _ROUNDING:
        raise BadAnswerError(f"a log-prob is {logprobs.max():g}, above 0")
    ids = list(map(operator.itemgetter(1), entries))
    return logprobs, _whole_numbers(ids, "the ids of its log-probs")


def _whole_numbers(values: list[Any], name: str) -> np.ndarray:
    try:
        if set(map(type, values)) <= {int}:
            return np.array(values, np.int64)
    except OverflowError:  # more than 63 bits
        pass
    raise BadAnswerError(f"{name} are not whole numbers")


def _spans(spans: list[Any], length: int, run_id: str) -> tuple[types.VersionSpan, ...]:
    """The spans, once they cover `[0, length)` in order."""
    made = tuple(
        types.VersionSpan(
            policy_version(_field(span, "version", str), run_id),
            _field(span, "start", int),
            _field(span, "end", int),
        )
        for span in spans
    )
    ends = [0, *(span.end for span in made)]
    covers = all(span.start == end < span.end for span, end in zip(made, ends, strict=False))
    if not covers or ends[-1] != length:
        raise BadAnswerError(f"its weight versions do not cover its {length} tokens: {made}")
    return made


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
