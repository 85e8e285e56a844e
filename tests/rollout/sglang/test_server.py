"""The routes of one server, one by one: what is sent, and what becomes of what comes back."""

import asyncio

import pytest

from codjax.rollout.sglang import wire
from codjax.rollout.sglang.server import (
    BusyError,
    NoAnswerError,
    RefusedError,
    ServerClient,
    ServerSettings,
)
from tests.rollout.sglang.fake_server import FakeServer
from tests.rollout.sglang.faults import Fault
from tests.rollout.sglang.serving import PROMPT, params, run

ASKED = {"max_new_tokens": 4, "vocab_size": 512, "run_id": "run", "oldest_version": 0}


def with_client(scenario, *, change=None, **values):
    """Runs `scenario(client, server)`."""

    async def inner():
        async with FakeServer() as server:
            server.change(**(change or {}))
            made = ServerSettings(urls=(server.url,), **values)
            async with ServerClient(server.url, made) as client:
                await scenario(client, server)

    run(inner())


def test_what_a_server_says_about_itself():
    async def scenario(client, server):
        server.tp_size, server.dp_size = 2, 4
        with pytest.raises(RuntimeError, match="not asked for its info yet"):
            assert client.tp_size
        assert await client.info() == wire.ServerInfo(
            sglang_version="0.5.23",
            model_path="/weights/first",
            architecture="Qwen3ForCausalLM",
            context_tokens=2046,
            prompt_tokens=2041,
            weight_version="run-0",
            dp_size=4,
            tp_size=2,
            has_tokenizer=False,
        )
        assert (client.name, client.tp_size, client.dp_size) == (server.url, 2, 4)
        assert await client.vocab_size() == 512
        server.tells_vocab_size = False
        assert await client.vocab_size() is None
        assert (await client.model_info())["weight_version"] == "run-0"
        load = await client.load()
        assert (load.num_running, load.num_waiting) == (0, 0)

    with_client(scenario)


def test_weights_from_disk_under_a_pause():
    async def scenario(client, server):
        await client.pause("retract")
        assert not await client.is_ready()
        await client.update_from_disk("/weights/run-1", "run-1")
        await client.flush()
        await client.continue_()
        assert await client.is_ready()
        assert server.pushes == [
            {
                "model_path": "/weights/run-1",
                "weight_version": "run-1",
                "flush_cache": True,
                "abort_all_requests": False,
            }
        ]
        info = await client.info()
        assert (info.model_path, info.weight_version) == ("/weights/run-1", "run-1")

    with_client(scenario)


def test_weights_as_bytes():
    async def scenario(client, server):
        server.tp_size = 2
        with pytest.raises(RefusedError, match="must run between begin_weight_update"):
            await client.update_from_bytes(["a", "a"], None, False)
        assert await client.begin_update()
        await client.update_from_bytes(["a", "a"], None, False)
        await client.update_from_bytes(["b", "b"], "run-1", True)
        await client.end_update()
        assert not server.in_session
        assert server.weight_version == "run-1"
        assert server.pushes == [
            {
                "serialized_named_tensors": ["a", "a"],
                "flush_cache": False,
            },
            {
                "serialized_named_tensors": ["b", "b"],
                "flush_cache": True,
                "weight_version": "run-1",
            },
        ]

    with_client(scenario)


def test_a_large_payload_goes_in_pieces_while_others_are_answered():
    """Sent as one, it would hold up the event loop, of which aiohttp warns: here, an error."""

    async def scenario(client, server):
        payload = "a" * 2**23
        await client.begin_update()
        pushing = asyncio.create_task(client.update_from_bytes([payload], "run-1", True))
        answer = await client.generate(PROMPT, params(), **ASKED)
        await pushing
        assert len(answer.tokens) == 4
        assert server.pushes[0]["serialized_named_tensors"] == [payload]

    with_client(scenario)


def test_an_older_server_needs_no_session():
    async def scenario(client, server):
        assert not await client.begin_update()
        await client.update_from_bytes(["a"], "run-1", True)
        assert server.weight_version == "run-1"

    with_client(scenario, change={"has_begin_route": False})


def test_an_update_that_did_not_succeed_is_refused():
    async def scenario(client, server):
        server.hold_after = 1
        asked = asyncio.create_task(client.generate(PROMPT, params(), **ASKED))
        await server.until(lambda: server.running)
        await client.pause("in_place")
        with pytest.raises(RefusedError, match="400: Weights were updated, but the cache was not"):
            await client.update_from_disk("/weights/run-1", "run-1")
        with pytest.raises(RefusedError, match="/flush_cache answered 400: Flush cache failed"):
            await client.flush()
        await client.continue_()
        await client.abort_all()
        assert (await asked).finish is wire.Finish.ABORT

    with_client(scenario)


@pytest.mark.parametrize(
    ("fault", "error", "text"),
    [
        (Fault.STATUS_500, NoAnswerError, "/generate answered 500: told to"),
        (Fault.STATUS_503, NoAnswerError, "/generate answered 503: told to"),
        (Fault.STATUS_429, BusyError, "/generate answered 429: told to"),
        (Fault.DUPLICATE_RID, BusyError, "400: Duplicate request ID detected"),
        (Fault.STATUS_400, RefusedError, "/generate answered 400: told to refuse"),
        (Fault.CLOSED, NoAnswerError, "/generate: ServerDisconnectedError"),
        (Fault.LATE, NoAnswerError, r"/generate: no answer within 0\.1 s"),
        (Fault.TRUNCATED_JSON, NoAnswerError, "bytes that are no whole JSON"),
        (Fault.NAN_LOGPROB, NoAnswerError, "bytes that are no whole JSON"),  # it has no nan
        (Fault.NULL_LOGPROB, wire.BadAnswerError, "cannot be believed: a log-prob is null"),
        (Fault.FOREIGN_VERSION, wire.WrongWeightsError, "cannot be believed: its weights are 'de"),
    ],
)
def test_how_a_request_fails(fault, error, text):
    async def scenario(client, server):
        server.faults = [fault]
        with pytest.raises(error, match=text) as caught:
            await client.generate(PROMPT, params(), **ASKED)
        assert server.url in str(caught.value)
        assert "\n" not in str(caught.value)

    with_client(scenario, request_timeout_s=0.1)


def test_nobody_listens():
    async def scenario(client, server):
        await server.stop()
        assert not await client.is_ready()
        with pytest.raises(NoAnswerError, match=f"{server.url}/v1/loads: ClientConnectorError"):
            await client.load()

    with_client(scenario)


def test_keys():
    async def scenario(client, server):
        await client.info()
        await client.load()
        assert await client.vocab_size() == 512
        await client.generate(PROMPT, params(max_tokens=4), **ASKED)
        await client.pause("retract")
        await client.update_from_disk("/weights/run-1", "run-1")
        await client.continue_()
        await client.abort_all()
        assert "secret" not in repr(client._settings)

    keys = {"api_key": "secret", "admin_api_key": "secret too"}
    with_client(scenario, change=keys, **keys)
    with_client(scenario, change={"api_key": "secret"}, api_key="secret")
    with_client(scenario, change={"admin_api_key": "secret"}, admin_api_key="secret")


def test_a_wrong_key():
    async def scenario(client, _):
        with pytest.raises(RefusedError, match=r"401: Unauthorized .*server\.api_key") as caught:
            await client.generate(PROMPT, params(max_tokens=4), **ASKED)
        assert "wrong" not in str(caught.value)

    with_client(scenario, change={"api_key": "secret"}, api_key="wrong")
