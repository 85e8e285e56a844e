"""A scripted server of weights, and the plainest connection to it.

It has SGLang's routes and habits, as far as a push meets them, and the simplest model that knows
its weights: the log-prob of token t is -(t + the sum of all values).
"""

import asyncio
import base64
import collections
import contextlib
import io
import pathlib
import pickle
import struct

import aiohttp
import ml_dtypes
import numpy as np
import safetensors.numpy
from aiohttp import web

from codjax.rollout import sampler as samplers

DTYPES = {
    "FloatStorage": np.dtype(np.float32),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "HalfStorage": np.dtype(np.float16),
}


def logprobs_of(tensors, tokens):
    total = sum(float(array.astype(np.float64).sum()) for array in tensors.values())
    return np.asarray([-(token + total) for token in tokens[1:]], np.float32)


class ScriptedServer:
    """What it was asked (`calls`), what it has (`tensors`), and what is wrong with it.

    Attributes:
        broken: path → status to answer with, "hangs", or "lies": it says yes and does nothing.
    """

    def __init__(self, *, has_sessions=True):
        self.calls, self.tensors, self.broken = [], {}, {}
        self.version, self.is_paused, self.is_updating = "default", False, False
        self.has_sessions = has_sessions

    async def answer(self, request):
        body = await request.json() if request.can_read_body else {}
        path = request.path.removeprefix("/")
        if path in ("begin_weight_update", "end_weight_update") and not self.has_sessions:
            raise web.HTTPNotFound
        self.calls.append(" ".join([path, *map(str, self.remarkable(body))]))
        wrong = self.broken.get(path)
        if wrong == "hangs":
            await asyncio.sleep(3600)
        if isinstance(wrong, int):
            return web.json_response({"error": {"message": "no"}}, status=wrong)
        if wrong == "lies":
            return web.json_response({})
        return web.json_response(getattr(self, path)(body))

    def remarkable(self, body):
        for key, value in body.items():
            if key == "model_path":
                yield pathlib.Path(value).name
            elif key == "serialized_named_tensors":
                yield f"{len(value)} ranks"
            elif key != "input_ids" and value not in (None, False):
                yield value

    def pause_generation(self, body):
        self.is_paused = True

    def continue_generation(self, body):
        self.is_paused = False

    def flush_cache(self, body):
        pass

    def update_weights_from_disk(self, body):
        folder = pathlib.Path(body["model_path"])
        assert (folder / "config.json").is_file()
        for file in folder.glob("*.safetensors"):
            self.tensors |= safetensors.numpy.load_file(file)
        self.version = body["weight_version"]

    def begin_weight_update(self, body):
        self.is_updating = True

    def end_weight_update(self, body):
        self.is_updating = False

    def update_weights_from_tensor(self, body):
        assert self.is_updating or not self.has_sessions
        for payload in body["serialized_named_tensors"]:
            self.tensors |= dict(read_payload(payload))
        self.version = body["weight_version"] or self.version

    def model_info(self, body):
        return {"weight_version": self.version}

    def generate(self, body):
        assert not self.is_paused, "a paused server holds what it is asked"
        return logprobs_of(self.tensors, body["input_ids"]).tolist()


class Connection:
    """What `push.Server` asks for, over HTTP."""

    def __init__(self, name, url, session, *, tp_size=1, dp_size=1):
        self.name, self.tp_size, self.dp_size = name, tp_size, dp_size
        self._url, self._session = url, session

    async def pause(self, mode):
        await self._post("pause_generation", mode=mode)

    async def continue_(self):
        await self._post("continue_generation")

    async def flush(self):
        await self._post("flush_cache")

    async def update_from_disk(self, path, version):
        await self._post("update_weights_from_disk", model_path=path, weight_version=version)

    async def begin_update(self):
        try:
            await self._post("begin_weight_update")
        except samplers.SamplerError as error:
            if "404" not in str(error):
                raise
            return False
        return True

    async def update_from_bytes(self, payload, version, flush):
        await self._post(
            "update_weights_from_tensor",
            serialized_named_tensors=payload,
            weight_version=version,
            flush_cache=flush,
        )

    async def end_update(self):
        await self._post("end_weight_update")

    async def model_info(self):
        return await self._post("model_info")

    async def score(self, ids):
        return np.asarray(await self._post("generate", input_ids=ids.tolist()), np.float32)

    async def _post(self, path, **body):
        try:
            async with self._session.post(f"{self._url}/{path}", json=body) as response:
                if response.status != 200:
                    raise samplers.SamplerError(f"{self.name}: {path} answered {response.status}.")
                return await response.json()
        except aiohttp.ClientError as error:
            raise samplers.SamplerError(f"{self.name}: {path} failed: {error}.") from error


@contextlib.asynccontextmanager
async def connected(*servers, **sizes):
    """Run scripted servers; a connection to each, named a, b, c…"""
    async with contextlib.AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession())
        connections = []
        for name, server in zip("abc", servers, strict=False):
            app = web.Application(client_max_size=2**30)
            app.router.add_route("*", "/{path}", server.answer)
            runner = web.AppRunner(app, shutdown_timeout=0.1)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            [address] = [socket.getsockname() for socket in site._server.sockets]
            url = f"http://127.0.0.1:{address[1]}"
            connections.append(Connection(name, url, session, **sizes))
        yield connections


# Reading payloads as SGLang's unpickler does: these functions and no others.


class _Reader(pickle.Unpickler):
    def find_class(self, module, name):
        return {
            ("torch._utils", "_rebuild_tensor_v2"): _rebuilt,
            ("torch.storage", "_load_from_bytes"): _storage,
            ("collections", "OrderedDict"): collections.OrderedDict,
        }[module, name]


class _StorageReader(pickle.Unpickler):
    def find_class(self, module, name):
        assert module == "torch"
        return DTYPES[name]

    def persistent_load(self, pid):
        return pid


def _storage(data):
    file = io.BytesIO(data)
    _, _, _, pid, keys = (_StorageReader(file).load() for _ in range(5))
    kind, dtype, key, device, size, view = pid
    assert (kind, device, view, keys) == ("storage", "cpu", None, [key])
    assert struct.unpack("<q", file.read(8)) == (size,)
    values = np.frombuffer(file.read(), dtype)
    assert values.size == size
    return values


def _rebuilt(storage, offset, shape, strides, *_):
    array = storage.reshape(shape)
    assert array.strides == tuple(stride * array.itemsize for stride in strides)
    return array


def read_payload(payload):
    return _Reader(io.BytesIO(base64.b64decode(payload))).load()
