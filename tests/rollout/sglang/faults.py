"""What can be wrong with the answer of a server, and how to make it so."""

import enum


class Fault(enum.Enum):
    """What can be wrong with one answer."""

    STATUS_500 = enum.auto()
    STATUS_503 = enum.auto()
    STATUS_429 = enum.auto()
    STATUS_400 = enum.auto()
    DUPLICATE_RID = enum.auto()
    CLOSED = enum.auto()
    LATE = enum.auto()  # answers after `late_s`
    TRUNCATED_JSON = enum.auto()
    NO_OBJECT = enum.auto()
    FEWER_LOGPROBS = enum.auto()
    WRONG_COUNT = enum.auto()
    REPEATED_TOKENS = enum.auto()  # as sglang-jax does
    TOO_MANY_TOKENS = enum.auto()
    OTHER_IDS = enum.auto()  # log-probs of other tokens
    NULL_LOGPROB = enum.auto()
    NAN_LOGPROB = enum.auto()
    POSITIVE_LOGPROB = enum.auto()
    NAN_STOP = enum.auto()
    OUT_OF_VOCABULARY = enum.auto()
    OTHER_RID = enum.auto()  # the answer to another request
    NO_SPANS = enum.auto()
    SPANS_WITH_A_GAP = enum.auto()
    STALE_VERSION = enum.auto()
    FOREIGN_VERSION = enum.auto()
    ABORT_PARTIAL = enum.auto()  # after half of the tokens, and at most 4
    ABORT_EMPTY = enum.auto()  # while it waits for its turn
    ABORT_BEFORE_SPANS = enum.auto()  # tokens, and no word about who sampled them


STATUSES = {Fault.STATUS_500: 500, Fault.STATUS_503: 503, Fault.STATUS_429: 429}


def spoiled(answer, fault, *, vocab_size):
    """The answer with its fault, if that is one of contents."""
    if fault is Fault.NO_OBJECT:
        return [answer]
    _spoil_tokens(answer, fault, vocab_size)
    _spoil_meta(answer["meta_info"], fault)
    return answer


def _spoil_tokens(answer, fault, vocab_size):
    meta = answer["meta_info"]
    entries, ids = meta["output_token_logprobs"], answer["output_ids"]
    match fault:
        case Fault.FEWER_LOGPROBS:
            entries.pop()
        case Fault.WRONG_COUNT:
            meta["completion_tokens"] += 1
        case Fault.REPEATED_TOKENS:
            ids.extend(ids[-2:])
            entries.extend(entries[-2:])
        case Fault.TOO_MANY_TOKENS:
            ids.append(1)
            entries.append([-1.0, 1, None])
            meta["completion_tokens"] += 1
        case Fault.OTHER_IDS:
            entries[0][1] += 1
        case Fault.NULL_LOGPROB:
            entries[-1][0] = None
        case Fault.NAN_LOGPROB:
            entries[-1][0] = float("nan")
        case Fault.POSITIVE_LOGPROB:
            entries[-1][0] = 0.5
        case Fault.OUT_OF_VOCABULARY:
            ids[0] = entries[0][1] = vocab_size


def _spoil_meta(meta, fault):
    match fault:
        case Fault.NAN_STOP:
            meta["finish_reason"] = {"type": "stop", "matched": "NaN happened"}
        case Fault.OTHER_RID:
            meta["id"] = "another"
        case Fault.NO_SPANS | Fault.ABORT_BEFORE_SPANS:
            del meta["weight_versions"]
        case Fault.SPANS_WITH_A_GAP:
            meta["weight_versions"][0]["start"] = 1
        case Fault.STALE_VERSION:
            run, _, number = meta["weight_version"].rpartition("-")
            meta["weight_versions"][0]["version"] = f"{run}-{int(number) - 1}"
        case Fault.FOREIGN_VERSION:
            meta["weight_versions"][0]["version"] = "default"
