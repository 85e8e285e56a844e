"""Fake servers with a fleet over them, and weights that they say they have."""

import asyncio
import contextlib

import numpy as np
from aiohttp import web

from codjax.rollout.sglang import fleet, push, weights
from tests.rollout.sglang.fake_server import FakeServer, scored_logprob
from tests.rollout.sglang.serving import EXPECTED, PROMPT, params, settings

PUSHES = push.PushSettings(call_timeout_s=5, load_timeout_s=5, tolerance=1e-6)
SHAPE = {"model.embed_tokens.weight": (np.dtype(np.float32), (512, 2))}


def staged(folder, version, **changes):
    logprobs = np.array([scored_logprob(token) for token in PROMPT[1:]], np.float32)
    made = {
        "run_id": "run",
        "policy_version": version,
        "layouts": SHAPE,
        "tensors": [(name, np.zeros(shape, dtype)) for name, (dtype, shape) in SHAPE.items()],
        "config": {"tie_word_embeddings": True, "vocab_size": 512},
        "probe": weights.Probe(tokens=PROMPT, logprobs=logprobs),
    }
    return weights.stage_folder(weights.NamedWeights(**made | changes), folder=folder)


@contextlib.asynccontextmanager
async def opened(num_servers=2, **changes):
    """(fleet, servers), connected."""
    async with contextlib.AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(Server()) for _ in range(num_servers)]
        made = fleet.Fleet(settings(servers, **changes), PUSHES, EXPECTED, run_id="run")
        await stack.enter_async_context(made.opened())
        yield made, servers


def serving(made):
    return [replica.aside is None for replica in made.sampler.replicas.all]


def versions(made):
    return [replica.policy_version for replica in made.sampler.replicas.all]


async def ask(made, count=1):
    return await asyncio.gather(
        *(made.sampler.generate(PROMPT, params(), seed=0, group=i) for i in range(count))
    )


class Server(FakeServer):
    """A `FakeServer` that does not take weights, or fails at what surrounds them.

    Attributes:
        update: "takes", "refuses" or "hangs".
        continues: whether it goes on when told to; else it answers 503 and stays paused.
        is_found: whether anything but a proxy answers when it is asked whether it is ready.
        tells_version: whether /model_info has what it should.
        info_waits: event before its answer, or None.
        scoring: scores wait for it, if there is one.
        is_wrong: scores are those of other weights.
    """

    update = "takes"
    continues = is_found = tells_version = True
    info_waits = scoring = None
    is_wrong = False

    async def _run(self, body, running, fault):
        if body["logprob_start_len"] >= 0 and self.scoring is not None:
            await self.scoring.wait()
        return await super()._run(body, running, fault)

    def scored(self, ids):
        return [None, *[-9.0] * (len(ids) - 1)] if self.is_wrong else super().scored(ids)

    async def _continue(self, request):
        return await super()._continue(request) if self.continues else web.Response(status=503)

    async def _ready(self, request):
        return await super()._ready(request) if self.is_found else web.Response(status=404)

    async def _model_info(self, request):
        if self.info_waits is not None:
            await self.info_waits.wait()
        return await super()._model_info(request) if self.tells_version else web.json_response({})

    async def _from_disk(self, request):
        if self.update == "hangs":
            self.pushes.append(await request.json())
            await asyncio.sleep(60)
        if self.update == "refuses":
            return web.json_response({"success": False, "message": "out of memory"}, status=400)
        return await super()._from_disk(request)
