"""Bodies and answers of `/generate`, written out; every lie that an answer can tell."""

import copy
import json

import numpy as np
import pytest

from codjax import types
from codjax.rollout.sampler import SamplingParams
from codjax.rollout.sglang import wire
from tests.rollout.sglang.faults import Fault, spoiled

PARAMS = SamplingParams(temperature=0.7, top_p=0.9, top_k=0, max_tokens=3, stop_tokens=(2, 9))
SPAN = types.VersionSpan
ANSWER = {
    "output_ids": [89, 237, 9],
    "meta_info": {
        "id": "r",
        "finish_reason": {"type": "stop", "matched": 9},
        "prompt_tokens": 2,
        "completion_tokens": 3,
        "weight_version": "run-5",
        "weight_versions": [
            {"version": "run-4", "start": 0, "end": 2},
            {"version": "run-5", "start": 2, "end": 3},
        ],
        "input_token_logprobs": [],
        "output_token_logprobs": [[-1.5, 89, None], [-0.25, 237, None], [0.0, 9, None]],
    },
}
ABORTED = {
    "output_ids": [],
    "meta_info": {
        "id": "r",
        "finish_reason": {"type": "abort", "message": "Abort in waiting queue"},
        "completion_tokens": 0,
        "weight_version": "run-5",
    },
}


def parse(answer, **changes):
    values = {
        "rid": "r",
        "max_new_tokens": 3,
        "vocab_size": 512,
        "run_id": "run",
        "oldest_version": 4,
    }
    return wire.parse_generation(answer, **(values | changes))


def test_a_body_that_asks_for_a_response():
    prompt = np.array([10, 0, 11, 0], np.int32)[::2]  # every other one: not one piece of memory
    body = wire.generate_body(prompt, PARAMS, rid="r", max_new_tokens=3)
    assert json.loads(wire.encoded(body)) == {
        "rid": "r",
        "input_ids": [10, 11],
        "sampling_params": {
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": -1,
            "max_new_tokens": 3,
            "stop_token_ids": [2, 9],
            "skip_special_tokens": False,
            "no_stop_trim": True,
        },
        "return_logprob": True,
        "logprob_start_len": -1,
        "stream": False,
    }


def test_a_body_that_asks_for_scores():
    body = wire.score_body(np.array([10, 11], np.int32), rid="r")
    assert body["sampling_params"] == {"temperature": 1.0, "max_new_tokens": 0}
    assert (body["logprob_start_len"], body["return_logprob"]) == (0, True)


def test_an_answer():
    answer = parse(ANSWER)
    assert answer.tokens.tolist() == [89, 237, 9]
    assert answer.logprobs.tolist() == [-1.5, -0.25, 0.0]
    assert (answer.tokens.dtype, answer.logprobs.dtype) == (np.int32, np.float32)
    assert answer.spans == (SPAN(4, 0, 2), SPAN(5, 2, 3))
    assert answer.finish is wire.Finish.STOP


def test_an_abort_before_the_first_token_is_an_answer_of_nothing():
    answer = parse(ABORTED)
    assert (len(answer.tokens), answer.spans, answer.finish) == (0, (), wire.Finish.ABORT)


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        (Fault.NO_OBJECT, "meta_info should be dict, and is None"),
        (Fault.FEWER_LOGPROBS, "it counts 3 tokens, and sent 3 with 2 log-probs"),
        (Fault.WRONG_COUNT, "it counts 4 tokens, and sent 3 with 3 log-probs"),
        (Fault.REPEATED_TOKENS, "it counts 3 tokens, and sent 5 with 5 log-probs"),
        (Fault.TOO_MANY_TOKENS, "it sent 4 tokens when asked for 1 to 3"),
        (Fault.OTHER_IDS, "its log-probs are of other tokens than those it sent"),
        (Fault.NULL_LOGPROB, "a log-prob is null: its weights may not be finite"),
        (Fault.NAN_LOGPROB, "a log-prob is not finite"),
        (Fault.POSITIVE_LOGPROB, "a log-prob is 0.5, above 0"),
        (Fault.NAN_STOP, "it finished for a reason that nobody asked for: .*NaN happened"),
        (Fault.OUT_OF_VOCABULARY, "it sent token 512, outside the vocabulary of 512"),
        (Fault.OTHER_RID, "it answered 'another' when asked 'r'"),
        (Fault.NO_SPANS, "weight_versions should be list, and is None"),
        (Fault.SPANS_WITH_A_GAP, "its weight versions do not cover its 3 tokens"),
        (Fault.FOREIGN_VERSION, "its weights are 'default', not of this run, .* 'run' and a numb"),
    ],
)
def test_an_answer_that_is_not_believed(fault, complaint):
    answer = spoiled(copy.deepcopy(ANSWER), fault, vocab_size=512)
    with pytest.raises(wire.BadAnswerError, match=complaint):
        parse(answer)


def test_tokens_of_older_weights_than_the_server_was_given_are_not_believed():
    with pytest.raises(wire.WrongWeightsError, match="from run-4, older than run-5, which it was"):
        parse(ANSWER, oldest_version=5)


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        (("output_ids",), [89, 237, "9"], "output_ids are not whole numbers"),
        (("output_ids",), [89, 237, True], "output_ids are not whole numbers"),
        (("output_ids",), [89, 237, 10**30], "output_ids are not whole numbers"),
        (("meta_info", "completion_tokens"), None, "completion_tokens should be int"),
        (("meta_info", "finish_reason"), {"type": "stop", "matched": 237}, "stopped at 237"),
        (("meta_info", "finish_reason"), {"type": "tired"}, "for a reason that nobody asked for"),
        (("meta_info", "output_token_logprobs"), [-1.0, -1.0], "not lists of a log-prob and a"),
        (("meta_info", "output_token_logprobs"), [[-1.0, 89], [-1.0]], "not lists of a log-prob"),
        (("meta_info", "output_token_logprobs"), [[True, 89]], "a log-prob is null"),
        (("meta_info", "output_token_logprobs"), [[-1.0, 89.0]], "the ids of its log-probs are"),
        (("meta_info", "weight_versions"), [], "do not cover its 3 tokens"),
        (("meta_info", "weight_versions"), [{"version": "run-4"}], "start should be int"),
    ],
)
def test_an_answer_of_other_shape(path, value, complaint):
    answer = copy.deepcopy(ANSWER)
    target = answer
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    with pytest.raises(wire.BadAnswerError, match=complaint):
        parse(answer)


def test_scores():
    tokens = np.array([7, 8, 9], np.int32)
    meta = {
        "id": "r",
        "finish_reason": {"type": "length", "length": 0},
        "input_token_logprobs": [[None, 7, None], [-1.0, 8, None], [-2.0, 9, None]],
    }
    assert wire.parse_score({"meta_info": meta}, tokens, rid="r").tolist() == [-1.0, -2.0]
    with pytest.raises(wire.BadAnswerError, match="scored 3 tokens that are not the 3 it was sent"):
        wire.parse_score({"meta_info": meta}, tokens[::-1], rid="r")
    with pytest.raises(wire.BadAnswerError, match="scored 3 tokens that are not the 4 it was sent"):
        wire.parse_score({"meta_info": meta}, np.array([7, 8, 9, 1], np.int32), rid="r")
    meta["finish_reason"] = {"type": "abort", "message": "Aborted"}
    with pytest.raises(wire.BadAnswerError, match="aborted the scoring"):
        wire.parse_score({"meta_info": meta}, tokens, rid="r")


def test_loads_are_summed_over_ranks():
    first = {"num_running_reqs": 3, "num_waiting_reqs": 1, "queues": {"waiting": 1, "paused": 2}}
    second = {"num_running_reqs": 2, "num_waiting_reqs": 4}
    load = wire.parse_load({"loads": [first, second]})
    assert (load.num_running, load.num_waiting) == (5, 7)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ('{"error": {"message": "The input\\nis long."}}', "The input\\nis long."),
        ('{"error": "unknown field `bogus`"}', "unknown field `bogus`"),
        ('{"success": false, "message": "no \\"such\\" folder"}', 'no "such" folder'),
        ('{"detail": "Not Found"}', "Not Found"),
        ("Flush cache failed.\n", "Flush cache failed."),
        ("<html>" + "x" * 1000, "<html>" + "x" * 294),
        ("", ""),
    ],
)
def test_the_sentence_in_an_error(body, text):
    assert wire.error_text(body) == text


def test_a_version_of_another_run_names_both():
    assert wire.policy_version(wire.version_name("a-b", 12), "a-b") == 12
    for name in ("default", "a-12", "a-b-", "a-b-x", "a-b-1-2", ""):
        with pytest.raises(wire.WrongWeightsError, match=f"'{name}', not of this run, .*'a-b'"):
            wire.policy_version(name, "a-b")
