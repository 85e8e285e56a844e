"""A scripted server that speaks as sglang 0.5.23 does, and fails when told to.

    async with FakeServer(script) as server:
        server.faults = [Fault.STATUS_503, None, Fault.TRUNCATED_JSON]   # one per generation
        …                                                                # ask server.url
        server.generations, server.pushes, server.calls                  # what came

Answers, waits, refusals and version spans have the shapes in the notes on the real one. It keeps
no secrets: tests read and set its attributes.
"""

import asyncio
import dataclasses
import json

from aiohttp import web

from tests.rollout.sglang.faults import STATUSES, Fault, spoiled

SAMPLING_KEYS = {
    "temperature",
    "top_p",
    "top_k",
    "max_new_tokens",
    "stop_token_ids",
    "skip_special_tokens",
    "no_stop_trim",
    "logit_bias",
}


@dataclasses.dataclass(eq=False)
class Running:
    """One generation on its way."""

    tokens: list = dataclasses.field(default_factory=list)
    logprobs: list = dataclasses.field(default_factory=list)
    changes: list = dataclasses.field(default_factory=list)  # (old version, tokens by then)
    is_aborted: bool = False
    num_retractions: int = 0


class FakeServer:
    """Owns a listening socket between `start` and `stop`; use it as a context manager.

    `script(ids)` yields (token, log-prob) for as long as it is asked, given prompt and whatever of
    a response was sent with it. The default goes on the same way wherever it is cut.
    """

    def __init__(self, script=None, *, vocab_size=512, weight_version="run-0", port=0):
        self.vocab_size, self.weight_version, self.port = vocab_size, weight_version, port
        self.script = script or (lambda ids: counting(ids, vocab_size))
        self.version, self.architecture = "0.5.23", "Qwen3ForCausalLM"
        self.model_path, self.context_length = "/weights/first", 2048
        self.dp_size = self.tp_size = 1
        self.api_key = self.admin_api_key = None
        self.has_begin_route = self.tells_vocab_size = self.is_ready = True
        self.faults, self.always = [], None
        self.late_s = 60.0
        self.hold_after = None  # generations wait after so many tokens of theirs
        self.paused = None  # the mode
        self.refuses_with = None  # a status, for every generation
        self.tokens = None  # that its tokenizer makes of every text; None: it has none
        self.generations, self.pushes, self.calls = [], [], []
        self.in_session = False
        self.running: dict[str, Running] = {}
        self.held: set[str] = set()  # arrived while it was paused
        self.peak_running = 0
        self._changed = asyncio.Event()

    async def __aenter__(self):
        await self.start()
        return self

    async def __aexit__(self, *_):
        await self.stop()

    async def start(self):
        app = web.Application(middlewares=[self._gate], client_max_size=2**30)
        for route, handler in {
            "/server_info": self._server_info,
            "/model_info": self._model_info,
            "/v1/models": self._models,
            "/v1/loads": self._loads,
            "/ready": self._ready,
            "/health": self._ready,
        }.items():
            app.router.add_get(route, handler)
        for route, handler in {
            "/generate": self._generate,
            "/v1/tokenize": self._tokenize,
            "/abort_request": self._abort,
            "/pause_generation": self._pause,
            "/continue_generation": self._continue,
            "/flush_cache": self._flush,
            "/update_weights_from_disk": self._from_disk,
            "/begin_weight_update": self._begin,
            "/update_weights_from_tensor": self._from_tensor,
            "/end_weight_update": self._end,
            "/update_weight_version": self._set_version,
        }.items():
            app.router.add_post(route, handler)
        # A closed connection aborts the request.
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.001)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, backlog=4096)
        await site.start()
        self.port = self._runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{self.port}"

    async def stop(self):
        """As a kill: open connections are closed, and the port refuses new ones."""
        self.running.clear()
        await self._runner.cleanup()

    def change(self, **values):
        """Set attributes that generations wait on, such as `hold_after`."""
        for name, value in values.items():
            setattr(self, name, value)
        self._changed.set()
        self._changed = asyncio.Event()

    async def until(self, condition):
        """Wait until `condition()`, for a test that starts something and then acts."""
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.001)

    @web.middleware
    async def _gate(self, request, handler):
        admin = request.method == "POST" and request.path not in ("/generate", "/v1/tokenize")
        key = (self.admin_api_key if admin else None) or self.api_key
        is_open = request.path in ("/ready", "/health")
        if key and not is_open and request.headers.get("Authorization") != f"Bearer {key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        if request.path != "/generate":
            self.calls.append(request.path)
        return await handler(request)

    async def _server_info(self, _):
        return web.json_response(
            {
                "version": self.version,
                "tp_size": self.tp_size,
                "dp_size": self.dp_size,
                "context_length": None,
                "skip_tokenizer_init": self.tokens is None,
                "max_req_input_len": self.context_length - 6,
            }
        )

    async def _model_info(self, _):
        return web.json_response(
            {
                "model_path": self.model_path,
                "served_model_name": self.model_path,
                "is_generation": True,
                "weight_version": self.weight_version,
                "model_type": "qwen3",
                "architectures": [self.architecture],
            }
        )

    async def _tokenize(self, request):
        assert (await request.json())["add_special_tokens"] is False
        return web.json_response({"tokens": self.tokens, "count": len(self.tokens)})

    async def _models(self, _):
        card = {"id": self.model_path, "max_model_len": self.context_length}
        return web.json_response({"object": "list", "data": [card]})

    async def _loads(self, _):
        load = {
            "dp_rank": 0,
            "num_running_reqs": len(self.running),
            "num_waiting_reqs": 0,
            "queues": {"waiting": 0, "paused": 0, "retracted": 0},
        }
        return web.json_response({"version": self.version, "loads": [load]})

    async def _ready(self, _):
        return web.Response(status=200 if self.is_ready and not self.paused else 503)

    async def _generate(self, request):
        body = await request.json()
        if self.refuses_with:
            return web.json_response({"error": "told to refuse"}, status=self.refuses_with)
        refusal = self._refusal(body)
        if refusal:
            return web.json_response({"error": {"message": refusal}}, status=400)
        self.generations.append(body)
        fault = self.faults.pop(0) if self.faults else self.always
        if fault in STATUSES:
            return web.json_response({"error": {"message": "told to"}}, status=STATUSES[fault])
        if fault in (Fault.STATUS_400, Fault.DUPLICATE_RID):
            duplicate = "Duplicate request ID detected"
            text = "told to refuse" if fault is Fault.STATUS_400 else duplicate
            return web.json_response({"error": {"message": text}}, status=400)
        if fault is Fault.LATE:
            await asyncio.sleep(self.late_s)
        running = Running()
        self.held.add(body["rid"])
        try:
            while self.paused:  # an abort does not reach it here
                await self._changed.wait()
        finally:
            self.held.discard(body["rid"])
        self.running[body["rid"]] = running
        self.peak_running = max(self.peak_running, len(self.running))
        try:
            answer = await self._run(body, running, fault)
        finally:
            self.running.pop(body["rid"], None)
        text = json.dumps(spoiled(answer, fault, vocab_size=self.vocab_size))
        if fault is Fault.CLOSED:
            request.transport.abort()
        if fault is Fault.TRUNCATED_JSON:
            text = text[: len(text) // 2]
        return web.Response(text=text, content_type="application/json")

    def _refusal(self, body):
        """Why it answers 400, or None."""
        sampling, length = body["sampling_params"], len(body["input_ids"])
        unknown = set(sampling) - SAMPLING_KEYS
        if unknown:
            return f"unknown field `{unknown.pop()}`, expected one of {SAMPLING_KEYS}"
        if length >= self.context_length:
            return f"The input ({length} tokens) is longer than the model's context length."
        if length + sampling["max_new_tokens"] > self.context_length:
            return "Requested token count exceeds the model's maximum context length."
        if "logit_bias" in sampling and self.tells_vocab_size:
            token = next(iter(sampling["logit_bias"]))
            return f"logit_bias must has keys in [0, {self.vocab_size - 1}], got {token}."
        if body["rid"] in self.running:
            return f"Duplicate request ID detected: {body['rid']}"
        assert min(body["input_ids"]) >= 0, "a real server would have died of this"
        assert max(body["input_ids"]) < self.vocab_size, "a real server would have died of this"
        return None

    async def _run(self, body, running, fault):
        """The honest answer."""
        ids, sampling = body["input_ids"], body["sampling_params"]
        stops = sampling.get("stop_token_ids", [])
        budget = sampling["max_new_tokens"]
        cut = {Fault.ABORT_EMPTY: 0, Fault.ABORT_PARTIAL: min(budget // 2, 4)}.get(fault)
        if fault is Fault.ABORT_BEFORE_SPANS:
            cut = 1
        reason = {"type": "length", "length": budget}
        script = self.script_of(ids, sampling)
        while len(running.tokens) < budget:
            while self._waits(running):
                await self._changed.wait()
            if running.is_aborted or len(running.tokens) == cut:
                reason = {"type": "abort", "message": "Aborted", "status_code": None}
                break
            token, logprob = next(script)
            await self.rest()
            running.tokens.append(token)
            running.logprobs.append(logprob)
            if token in stops:
                reason = {"type": "stop", "matched": token}
                break
        start = body["logprob_start_len"]
        last = self.vocab_size - 1  # is reported as 0, as by the real one
        logprobs = self.scored(ids) if start >= 0 else []
        scored = [
            [logprob, 0 if token == last else token, None]
            for logprob, token in zip(logprobs, ids, strict=False)
        ]
        entries = zip(running.logprobs, running.tokens, strict=True)
        return {
            "output_ids": list(running.tokens),
            "meta_info": {
                "id": body["rid"],
                "finish_reason": reason,
                "prompt_tokens": len(ids),
                "completion_tokens": len(running.tokens),
                "cached_tokens": 0,
                "weight_version": self.weight_version,
                "weight_versions": self._spans(running),
                "num_retractions": running.num_retractions,
                "input_token_logprobs": scored[max(start, 0) :],
                "output_token_logprobs": [[logprob, token, None] for logprob, token in entries],
            },
        }

    def script_of(self, ids, sampling):
        """What it says after a text."""
        del sampling
        return self.script(ids)

    def scored(self, ids):
        """Log-probs of the tokens of a text; nothing predicts the first."""
        return [None, *map(scored_logprob, ids[1:])]

    async def rest(self):
        """Between two tokens."""

    def _waits(self, running):
        is_held = self.hold_after is not None and len(running.tokens) >= self.hold_after
        return not running.is_aborted and (self.paused or is_held)

    def _spans(self, running):
        """Spans as the real one makes them: a version without tokens has none."""
        spans = []
        for version, end in [*running.changes, (self.weight_version, len(running.tokens))]:
            start = spans[-1]["end"] if spans else 0
            if spans and end <= start:
                continue
            spans.append({"version": version, "start": start, "end": end})
        return spans

    async def _abort(self, request):
        body = await request.json()
        for rid, running in self.running.items():
            # A real one compares beginnings.
            running.is_aborted |= bool(body.get("abort_all")) or rid.startswith(body["rid"])
        self.change()
        return web.Response()

    async def _pause(self, request):
        mode = (await request.json())["mode"]
        for running in self.running.values():
            running.is_aborted |= mode == "abort"
            running.num_retractions += mode == "retract"
        self.change(paused=mode)
        return web.json_response({"message": "Generation paused successfully.", "status": "ok"})

    async def _continue(self, _):
        self.change(paused=None)
        return web.json_response({"message": "Generation continued.", "status": "ok"})

    async def _flush(self, _):
        if self.running and self.paused != "retract":
            return web.Response(text="Flush cache failed.", status=400)
        return web.Response(text="Cache flushed.")

    async def _from_disk(self, request):
        body = await request.json()
        self.pushes.append(body)
        while self.running and not self.paused:  # a write lock
            await asyncio.sleep(0.001)
        return self._updated(body, model_path=body["model_path"])

    async def _begin(self, _):
        if not self.has_begin_route:
            return web.json_response({"detail": "Not Found"}, status=404)
        self.in_session = True
        return web.json_response({"success": True, "message": "Success"})

    async def _end(self, _):
        self.in_session = False
        return web.json_response({"success": True, "message": "Success"})

    async def _from_tensor(self, request):
        body = await request.json()
        if self.has_begin_route and not self.in_session:
            text = "must run between begin_weight_update() and end_weight_update()"
            return web.json_response({"success": False, "message": text}, status=400)
        assert len(body["serialized_named_tensors"]) == self.tp_size, "this kills a real one"
        self.pushes.append(body)
        return self._updated(body)

    def _updated(self, body, **values):
        """New weights: the running requests remember the old ones."""
        if body.get("flush_cache", True) and self.running and self.paused != "retract":
            text = "Weights were updated, but the cache was not flushed."
            return web.json_response({"success": False, "message": text}, status=400)
        if "weight_version" in body:
            for running in self.running.values():
                if running.tokens:
                    running.changes.append((self.weight_version, len(running.tokens)))
            values["weight_version"] = body["weight_version"]
        self.change(**values)
        text = "Succeeded to update model weights."
        return web.json_response({"success": True, "message": text, "num_paused_requests": 0})

    async def _set_version(self, request):
        self.change(weight_version=(await request.json())["new_version"])
        return web.json_response({"success": True, "message": "", "new_version": ""})


def counting(ids, vocab_size=512):
    """Yields tokens that depend on all before, never 0, and log-probs that tell them apart."""
    total = sum(ids) + len(ids)
    while True:
        token = 1 + total % (vocab_size - 1)
        yield token, -token / vocab_size
        total += token + 1


def scored_logprob(token):
    """The log-prob of a token that is scored: a multiple that float32 holds."""
    return -(token + 1) / 1024
