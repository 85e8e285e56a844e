"""Pushes to scripted servers over HTTP: order, verification, deadlines, failures of single ones."""

import asyncio
import os
import re

import aiohttp
import numpy as np
import pytest

from codjax.rollout.sglang import push, weights
from tests.rollout.sglang import push_server, pushing

DISK = [
    "pause_generation retract",
    "update_weights_from_disk weights-run-1 run-1",
    "flush_cache",
    "model_info",
    "continue_generation",
    "generate",
]
BYTES = [
    "pause_generation retract",
    "begin_weight_update",
    "update_weights_from_tensor 1 ranks",
    "update_weights_from_tensor 1 ranks run-1 True",
    "end_weight_update",
    "flush_cache",
    "model_info",
    "continue_generation",
    "generate",
]


def settings(**changes):
    limits = {"call_timeout_s": 5.0, "load_timeout_s": 5.0, "tolerance": 1e-4}
    return push.PushSettings(**(limits | changes))


def make_pusher(**changes):
    """A pusher and the list that it tells failures to."""
    failures = []
    return push.Pusher(
        settings(**changes), on_failure=lambda *told: failures.append(told)
    ), failures


def pushed(pusher, staged, *servers, **sizes):
    async def run():
        async with push_server.connected(*servers, **sizes) as connections:
            return await pusher.push(staged, connections)

    return asyncio.run(run())


def by_disk(tmp_path, version=1):
    return weights.stage_folder(pushing.make(version), folder=tmp_path)


def by_bytes(version=1):
    return weights.stage_payloads(pushing.make(version), bucket_bytes=50)


@pytest.mark.parametrize("route", ["disk", "bytes"])
def test_a_push_in_order(route, tmp_path):
    server = push_server.ScriptedServer()
    pusher, failures = make_pusher()
    staged = by_disk(tmp_path) if route == "disk" else by_bytes()
    [outcome] = pushed(pusher, staged, server)
    assert server.calls == (DISK if route == "disk" else BYTES)
    assert failures == []
    assert (outcome.ok, outcome.error, outcome.version) == (True, None, "run-1")
    assert outcome.gap < 1e-5
    assert outcome.num_bytes == 80
    assert outcome.folder == (tmp_path / "weights-run-1" if route == "disk" else None)
    for name, array in pushing.tensors_of(1).items():
        np.testing.assert_array_equal(server.tensors[name], array)


def test_an_older_server_is_pushed_to_without_a_session():
    server = push_server.ScriptedServer(has_sessions=False)
    pusher, _ = make_pusher()
    [outcome] = pushed(pusher, by_bytes(), server)
    assert outcome.ok
    assert server.calls == [call for call in BYTES if "weight_update" not in call]


def test_every_rank_gets_a_payload():
    server = push_server.ScriptedServer()
    pusher, _ = make_pusher()
    pushed(pusher, by_bytes(), server, tp_size=2)
    assert server.calls[2] == "update_weights_from_tensor 2 ranks"


def test_bytes_are_refused_with_several_copies():
    """SGLang asserts, that is, dies."""
    server = push_server.ScriptedServer()
    pusher, failures = make_pusher()
    [outcome] = pushed(pusher, by_bytes(), server, dp_size=2)
    assert outcome.error.startswith("a has dp_size 2, and SGLang takes weights as bytes with")
    assert server.calls == ["pause_generation retract", "continue_generation"]
    assert failures == [("a", outcome.error)]


def test_a_failure_of_one_stops_no_other_and_is_mended_by_sync(tmp_path):
    good, bad = push_server.ScriptedServer(), push_server.ScriptedServer()
    bad.broken["update_weights_from_disk"] = 400
    pusher, failures = make_pusher()

    async def run():
        async with push_server.connected(good, bad) as connections:
            outcomes = await pusher.push(by_disk(tmp_path), connections)
            bad.broken.clear()
            return outcomes, await pusher.sync(connections[1])

    (ok, failed), synced = asyncio.run(run())
    assert (ok.ok, failed.ok, synced.ok) == (True, False, True)
    assert failed.error == "b: update_weights_from_disk answered 400."
    assert (failed.gap, failed.folder) == (None, None)
    assert failures == [("b", failed.error)]
    assert bad.calls[:3] == [DISK[0], DISK[1], "continue_generation"]
    assert bad.calls[3:] == DISK
    assert bad.version == good.version == "run-1"


@pytest.mark.parametrize("path", ["pause_generation", "update_weights_from_disk", "flush_cache"])
def test_a_failure_is_told_before_the_server_goes_on(path, tmp_path):
    server = push_server.ScriptedServer()
    server.broken[path] = 500
    calls_then = []
    pusher = push.Pusher(settings(), on_failure=lambda *_: calls_then.extend(server.calls))
    pushed(pusher, by_disk(tmp_path), server)
    assert calls_then[-1].startswith(path)
    assert server.calls == [*calls_then, "continue_generation"]
    assert not server.is_paused or path == "pause_generation"


def test_a_session_is_ended_when_a_payload_fails():
    server = push_server.ScriptedServer()
    server.broken["update_weights_from_tensor"] = 400
    pusher, _ = make_pusher()
    [outcome] = pushed(pusher, by_bytes(), server)
    assert outcome.error == "a: update_weights_from_tensor answered 400."
    assert server.calls[1:] == [*BYTES[1:3], "end_weight_update", "continue_generation"]


def test_the_error_of_a_dead_server_is_that_of_the_payload():
    """And not that its session could not be ended either."""
    server = push_server.ScriptedServer()
    server.broken |= {"update_weights_from_tensor": 500, "end_weight_update": 500}
    pusher, _ = make_pusher()
    [outcome] = pushed(pusher, by_bytes(), server)
    assert outcome.error == "a: update_weights_from_tensor answered 500."
    assert server.calls[-2:] == ["end_weight_update", "continue_generation"]


def test_weights_that_were_not_loaded_are_known_by_the_version(tmp_path):
    server = push_server.ScriptedServer()
    server.version, server.broken["update_weights_from_disk"] = "other-7", "lies"
    pusher, _ = make_pusher()
    [outcome] = pushed(pusher, by_disk(tmp_path), server)
    assert outcome.error == (
        "a has weights 'other-7' after it was given 'run-1'; does another run use it?"
    )


def test_wrong_weights_are_known_by_the_probe(tmp_path):
    staged = by_disk(tmp_path)
    server = push_server.ScriptedServer()
    server.tensors["left"] = np.ones(2, np.float32)  # as a tensor that nobody sent
    pusher, failures = make_pusher()
    [outcome] = pushed(pusher, staged, server)
    assert not outcome.ok
    assert outcome.gap == pytest.approx(2.0)
    assert outcome.error == (
        "a does not have the weights run-1: a log-prob of the probe is 2 from the learner's, and "
        "0.0001 are allowed."
    )
    assert failures == [("a", outcome.error)]
    assert pusher.last_good == {}


def test_nan_of_the_probe_is_no_agreement(tmp_path):
    server = push_server.ScriptedServer()
    server.tensors["left"] = np.asarray([np.nan], np.float32)
    pusher, _ = make_pusher(tolerance=1e9)
    [outcome] = pushed(pusher, by_disk(tmp_path), server)
    assert not outcome.ok
    assert np.isnan(outcome.gap)


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("pause_generation", "pausing"),
        ("update_weights_from_disk", "loading .*/weights-run-1"),
        ("flush_cache", "flushing its cache"),
        ("model_info", "telling its version"),
        ("continue_generation", "continuing"),
        ("generate", "scoring the probe"),
    ],
)
def test_no_call_is_awaited_for_ever(path, what, tmp_path):
    server = push_server.ScriptedServer()
    server.broken[path] = "hangs"
    pusher, _ = make_pusher(call_timeout_s=0.3, load_timeout_s=0.3)
    [outcome] = pushed(pusher, by_disk(tmp_path), server)
    pattern = rf"a: {what} was awaited since \d\d:\d\d:\d\d, longer than the 0.3 s that are allowed"
    assert 0.3 <= outcome.seconds < 5.0
    assert re.match(pattern, outcome.error)
    assert "continue_generation" in server.calls


def test_a_server_that_is_gone_is_an_outcome(tmp_path):
    pusher, failures = make_pusher()

    async def run():
        async with aiohttp.ClientSession() as session:
            nobody = push_server.Connection("a", "http://127.0.0.1:1", session)
            return await pusher.push(by_disk(tmp_path), [nobody])

    [outcome] = asyncio.run(run())
    assert outcome.error.startswith("a: pause_generation failed: ")
    assert len(failures) == 1


def test_a_cancelled_push_lets_the_server_go_on(tmp_path):
    server = push_server.ScriptedServer()
    server.broken["flush_cache"] = "hangs"
    pusher, _ = make_pusher()

    async def run():
        async with push_server.connected(server) as connections:
            task = asyncio.create_task(pusher.push(by_disk(tmp_path), connections))
            while "flush_cache" not in server.calls:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            while server.is_paused:
                await asyncio.sleep(0.01)

    asyncio.run(run())
    assert server.calls[-1] == "continue_generation"


def test_old_versions_go_after_the_next_success(tmp_path):
    """But never the one that a server was last verified with, which it is started again from."""
    first, second = push_server.ScriptedServer(), push_server.ScriptedServer()
    pusher, _ = make_pusher()
    (tmp_path / "weights-run-0").mkdir()  # left by this run before it was killed
    (tmp_path / "weights-other-0").mkdir()  # of another run

    def there():
        return sorted(name for name in os.listdir(tmp_path) if "other" not in name)

    async def run():
        async with push_server.connected(first, second) as connections:
            await pusher.push(by_disk(tmp_path, 1), connections)
            assert there() == ["weights-run-1"]

            first.broken["generate"] = second.broken["flush_cache"] = 500
            await pusher.push(by_disk(tmp_path, 2), connections)
            assert there() == ["weights-run-1", "weights-run-2"]  # nobody has 2 for sure

            first.broken.clear()
            await pusher.push(by_disk(tmp_path, 3), connections)
            assert there() == ["weights-run-1", "weights-run-3"]  # the second still has 1
            assert {path.name for path in pusher.last_good.values()} == set(there())

            pusher.forget("b")
            await pusher.sync(connections[0])
            assert there() == ["weights-run-3"]

    asyncio.run(run())
    assert (tmp_path / "weights-other-0").is_dir()


def test_the_folder_that_a_server_was_started_from_stays_until_it_has_another(tmp_path):
    first, second = push_server.ScriptedServer(), push_server.ScriptedServer()
    second.broken["generate"] = 500
    start = by_disk(tmp_path, 0).folder  # of the run before it was resumed
    pusher = push.Pusher(settings(), start_folders={"a": start, "b": start})
    pushed(pusher, by_disk(tmp_path, 1), first, second)
    assert pusher.last_good == {"a": tmp_path / "weights-run-1", "b": start}
    second.broken.clear()
    pushed(pusher, by_disk(tmp_path, 2), first, second)
    assert os.listdir(tmp_path) == ["weights-run-2"]


def test_what_a_server_is_loading_is_not_removed(tmp_path):
    slow, quick = push_server.ScriptedServer(), push_server.ScriptedServer()
    slow.broken["update_weights_from_disk"] = "hangs"
    pusher, _ = make_pusher(load_timeout_s=1.0)

    async def run():
        async with push_server.connected(slow, quick) as connections:
            older = asyncio.create_task(pusher.push(by_disk(tmp_path, 1), connections[:1]))
            while len(slow.calls) < 2:
                await asyncio.sleep(0.01)
            await pusher.push(by_disk(tmp_path, 2), connections[1:])
            assert sorted(os.listdir(tmp_path)) == ["weights-run-1", "weights-run-2"]
            await older
            await pusher.sync(connections[1])
            assert os.listdir(tmp_path) == ["weights-run-2"]

    asyncio.run(run())


def test_a_sync_before_the_first_push_does_nothing():
    pusher, _ = make_pusher()
    assert asyncio.run(pusher.sync(None)) is None


def test_pushes_to_a_server_take_turns(tmp_path):
    server = push_server.ScriptedServer()
    pusher, _ = make_pusher()

    async def run():
        async with push_server.connected(server) as connections:
            staged = by_disk(tmp_path)
            await asyncio.gather(pusher.push(staged, connections), pusher.sync(connections[0]))

    asyncio.run(run())
    assert server.calls == DISK + DISK
