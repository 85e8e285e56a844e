"""Trajectory → JSON text → the same trajectory, to the last bit."""

import dataclasses
import json

import numpy as np

from codjax import serialization, types

TASK = types.Task(
    taskset="lake",
    taskset_id=1,
    index=7,
    record={
        "start": [0, 2],
        "goal": [1, 2],
        "p": 0.6312,
        "text": 'a "hint"\n\u2028√',
        "none": None,
    },
)
PACK = types.Pack(
    tasks=(TASK, dataclasses.replace(TASK, index=8)),
    seed=15069623396018555611,  # 64 bits, more than a float holds
    mode=types.PackMode.RALPH_SAMPLE,
    env_task_indices=(0, 0),
)
AWKWARD = np.array([0.0, -0.0, -1e-45, -3.4028235e38, -1 / 3, -2.3841858e-07], np.float32)


def turn(logprobs=AWKWARD, **changes):
    values = {
        "prompt_tokens": np.array([1, 151643, 2**31 - 1], np.int32),
        "response_tokens": np.arange(len(logprobs), dtype=np.int32),
        "sampler_logprobs": np.asarray(logprobs, np.float32),
        "policy_version": 3,
        "version_spans": (types.VersionSpan(3, 0, 2), types.VersionSpan(4, 2, len(logprobs))),
        "stop_reason": types.StopReason.STOP_TOKEN,
    }
    return types.Turn(**(values | changes))


def episode(**changes):
    values = {
        "kind": types.EpisodeKind.SOLVE_TASK,
        "position": 0,
        "turns": (turn(), turn(stop_reason=types.StopReason.LENGTH)),
        "raw_reward": 1.0,
        "reward": 0.9 - 0.3,  # 0.6000000000000001
        "is_success": True,
        "has_format_error": False,
        "stop_reason": types.StopReason.ENVIRONMENT,
        "feedback": "Done.",
        "hint_in": "?",
        "hint_out": "?",
        "observations": (":UR", "U-R"),
        "actions": ("c", "\ufffd"),
    }
    return types.Episode(**(values | changes))


def trajectory(**changes):
    update = episode(
        kind=types.EpisodeKind.UPDATE_CONTEXT,
        turns=(turn(np.random.default_rng(0).normal(-2, 3, 1000)),),
        observations=("#",),
        actions=("<cU>",),
        stop_reason=types.StopReason.STOP_TOKEN,
        hint_out="cU",
    )
    nothing = episode(position=1, turns=(), observations=(), actions=())
    values = {"pack": PACK, "run": 5, "episodes": (episode(), update, nothing), "failure": None}
    return types.Trajectory(**(values | changes))


def through_text(value):
    return serialization.trajectory_from_json(json.loads(json.dumps(serialization.to_json(value))))


def assert_equal(one, other):
    """Equal in type, shape and every bit; dataclasses with arrays have no `==` of their own."""
    assert type(one) is type(other)
    if dataclasses.is_dataclass(one):
        for field in dataclasses.fields(one):
            assert_equal(getattr(one, field.name), getattr(other, field.name))
    elif isinstance(one, np.ndarray):
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
    elif isinstance(one, tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    else:
        assert one == other


def test_a_trajectory_comes_back_equal():
    assert_equal(through_text(trajectory()), trajectory())


def test_a_failed_trajectory_comes_back_equal():
    cut = episode(stop_reason=types.StopReason.SAMPLER_FAILED, turns=(), actions=())
    for failure in types.FAILURES:
        failed = trajectory(episodes=(cut,), failure=failure)
        assert through_text(failed).failure is failure
        assert_equal(through_text(failed), failed)


def test_empty_arrays_keep_their_types():
    empty = trajectory(episodes=(episode(turns=(turn([]),)),))
    assert_equal(through_text(empty), empty)


def test_the_json_is_made_of_plain_values():
    values = serialization.to_json([[trajectory()], []])
    assert values[1] == []
    assert values[0][0]["pack"]["mode"] == "ralph_sample"
    assert values[0][0]["episodes"][0]["turns"][1]["stop_reason"] == "length"
    assert values[0][0]["pack"]["tasks"][0]["record"] == TASK.record
    assert serialization.to_json(None) is None
    assert serialization.to_json({"a": np.float32(0.5), "b": np.int64(3)}) == {"a": 0.5, "b": 3}
