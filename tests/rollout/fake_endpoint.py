"""A scripted OpenAI-compatible endpoint, which fails when told to.

    with served(FakeEndpoint(speak)) as endpoint:       # in a thread: the code under test may block
        endpoint.faults = [429, "truncated", None]      # one per generation
        …                                               # ask endpoint.url
        endpoint.bodies, endpoint.keys                  # what came

Answers have the shapes of vLLM and SGLang (`kind` "vllm") or of plain ones ("plain").
"""

import asyncio
import contextlib
import json
import random
import threading

import numpy as np
from aiohttp import web


class FakeEndpoint:
    """`speak(text, rng)` is what it answers to a prompt, shown with its special tokens.

    Attributes:
        models: names that it lists, or None: it has no list.
        faults: what to do to the next generations: a status, a fault of `spoiled`, None.
        always: the same for all others.
        headers: of answers with a status.
        text: of those answers.
    """

    def __init__(self, speak, chat, *, kind="vllm", models=("tiny",), api_key=None, context=None):
        self.speak, self.chat, self.kind, self.models = speak, chat, kind, models
        self.api_key, self.context = api_key, context
        self.faults, self.always, self.headers, self.text = [], None, {}, "told to"
        self.late_s = 60.0
        self.bodies, self.keys, self.paths = [], [], []
        self.in_flight = self.peak_in_flight = 0

    async def start(self):
        app = web.Application(client_max_size=2**26)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_post("/v1/chat/completions", self._chat)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.001)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"

    async def stop(self):
        await self._runner.cleanup()

    def _locked(self, request):
        self.keys.append(request.headers.get("Authorization"))
        return self.api_key and self.keys[-1] != f"Bearer {self.api_key}"

    async def _models(self, request):
        if self._locked(request):
            return error(401, f"Incorrect API key provided: {self.keys[-1]}")
        if self.models is None:
            return error(404, "Not Found")
        owner = {"owned_by": self.kind, "max_model_len": self.context}
        return web.json_response({"data": [{"id": name} | owner for name in self.models]})

    async def _completions(self, request):
        body = await request.json()
        ids = body["prompt"]
        return await self._answer(request, body, ids, self.chat.show(ids_array(ids)))

    async def _chat(self, request):
        body = await request.json()
        text = "".join(f"<{m['role']}>{m['content']}" for m in body["messages"])
        return await self._answer(request, body, None, text)

    async def _answer(self, request, body, ids, text):
        self.paths.append(request.path)
        self.bodies.append(body)
        if self._locked(request):
            return error(401, f"Incorrect API key provided: {self.keys[-1]}")
        self.in_flight += 1
        self.peak_in_flight = max(self.peak_in_flight, self.in_flight)
        try:
            await asyncio.sleep(0.002)
            return await self._generation(request, body, ids, text)
        finally:
            self.in_flight -= 1

    async def _generation(self, request, body, ids, text):
        fault = self.faults.pop(0) if self.faults else self.always
        if isinstance(fault, int):
            return error(fault, self.text, self.headers)
        if fault == "late":
            await asyncio.sleep(self.late_s)
        if self.context and ids and len(ids) + body["max_tokens"] > self.context:
            return error(400, f"This model's maximum context length is {self.context} tokens.")
        tokens = self.chat.respond(self.speak(text, random.Random(body["seed"]))).tolist()
        limit = body.get("max_tokens", body.get("max_completion_tokens"))
        reason = "stop" if len(tokens) <= limit else "length"
        tokens = tokens[:limit]
        said = self.chat.decode(ids_array(tokens))
        choice = {"index": 0, "finish_reason": reason}
        if ids is None:
            choice["message"] = {"role": "assistant", "content": said}
        else:
            choice["text"] = said
            if self.kind == "vllm" and body.get("return_token_ids"):
                choice |= {"token_ids": tokens, "prompt_token_ids": ids}
        answer = {"object": "completion", "model": body["model"], "choices": [choice]}
        text = json.dumps(spoiled(answer, fault))
        if fault == "closed":
            request.transport.abort()
        if fault == "truncated":
            text = text[: len(text) // 2]
        return web.Response(text=text, content_type="application/json")


def spoiled(answer, fault):
    """The answer with its fault, if that is one of contents."""
    (choice,) = answer["choices"]
    match fault:
        case "no object":
            return [answer]
        case "no choices":
            answer["choices"] = []
        case "choice is text":
            answer["choices"] = ["hello"]
        case "null":
            choice["text"] = None
            choice["message"] = {"content": None}
        case "number":
            choice["text"] = 7
            choice["message"] = {"content": 7}
        case "no reason":
            choice["finish_reason"] = None
        case "tools":
            choice["finish_reason"] = "tool_calls"
        case "aborted":
            choice["finish_reason"] = "abort"
        case _:
            spoil_ids(choice, fault)
    return answer


def spoil_ids(choice, fault):
    match fault:
        case "no tokens":
            choice["token_ids"] = []
        case "too many tokens":
            choice["token_ids"] *= 1000
        case "float tokens":
            choice["token_ids"] = [1.0]
        case "negative tokens":
            choice["token_ids"] = [-1]
        case "other prompt":
            choice["prompt_token_ids"] = [1, 2]


def error(status, message, headers=None):
    body = {"error": {"message": message, "type": "error", "code": None}}
    return web.json_response(body, status=status, headers=headers)


def ids_array(ids):
    return np.array(ids, np.int32)


@contextlib.contextmanager
def served(endpoint):
    """Runs the endpoint in a loop of its own, in a thread, until the block ends."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(endpoint.start(), loop).result(10)
        try:
            yield endpoint
        finally:
            asyncio.run_coroutine_threadsafe(endpoint.stop(), loop).result(10)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
