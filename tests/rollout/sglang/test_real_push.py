"""Pushes to a real SGLang server, and its death; on request, as it takes minutes:

    CODJAX_SGLANG_PYTHON=/venv/bin/python CODJAX_SGLANG_PATH=/stubs \\
        pytest -m slow tests/rollout/sglang/test_real_push.py -s

The first names the Python that has SGLang; the second, on a CPU, its PYTHONPATH with a stand-in for
SGLang's native kernels.
"""

import asyncio
import os
import pathlib
import signal
import time

import aiohttp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from codjax import models
from codjax.models import hf_tensors
from codjax.rollout import sampler as samplers
from codjax.rollout.sglang import pool as pools
from codjax.rollout.sglang import processes, push, weights
from tests import small
from tests.rollout.sglang import push_server, test_processes

PYTHON = os.environ.get("CODJAX_SGLANG_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(PYTHON is None, reason="CODJAX_SGLANG_PYTHON names no SGLang"),
]
CONFIG = small.decoder_config(
    vocab_size=512, hidden_size=128, intermediate_size=256, head_dim=32, num_layers=3, init_std=0.2
)
TOKENS = np.random.default_rng(0).integers(0, 512, 40).astype(np.int32)
ARGUMENTS = (
    "--model-path {model_folder} --host {host} --port {port} --device cpu --dtype float32 "
    "--attention-backend torch_native --sampling-backend pytorch --disable-cuda-graph "
    "--max-total-tokens 8192 --mem-fraction-static 0.3 --skip-tokenizer-init"
)


class Connection(push_server.Connection):
    """As `push.Server`, to the real one."""

    async def model_info(self):
        async with self._session.get(f"{self._url}/model_info") as response:
            return await response.json()

    async def flush(self):
        async with self._session.post(f"{self._url}/flush_cache") as response:
            if response.status != 200:
                raise samplers.SamplerError(f"{self.name}: {await response.text()}")

    async def score(self, ids):
        params = {"temperature": 1.0, "max_new_tokens": 0}
        answer = await self._post(
            "generate",
            input_ids=ids.tolist(),
            sampling_params=params,
            return_logprob=True,
            logprob_start_len=0,
        )
        scored = answer["meta_info"]["input_token_logprobs"]
        return np.asarray([entry[0] for entry in scored[1:]], np.float32)

    async def generate(self, num_tokens):
        params = {"temperature": 1.0, "max_new_tokens": num_tokens, "ignore_eos": True}
        return await self._post("generate", input_ids=[1, 2, 3], sampling_params=params)


def make(policy_version, **changes):
    """A random policy; norms too."""
    model = models.init(CONFIG, seed=policy_version)
    rng = np.random.default_rng(policy_version)
    params = jax.tree.map(
        lambda x: x + jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype), nnx.state(model)
    )
    nnx.update(model, params)
    made = {
        "run_id": "run",
        "policy_version": policy_version,
        "layouts": hf_tensors.layouts(CONFIG, "float32"),
        "tensors": hf_tensors.tensors(CONFIG, nnx.to_pure_dict(nnx.state(model)), "float32"),
        "config": CONFIG.to_hf(),
        "probe": weights.Probe(
            tokens=TOKENS, logprobs=np.asarray(models.score(model, TOKENS[None]))[0]
        ),
    }
    return weights.NamedWeights(**(made | changes))


def settings(folder, start):
    return processes.ProcessSettings(
        name="real",
        command=("nice", "-n", "15", PYTHON, "-m", "sglang.launch_server", *ARGUMENTS.split()),
        environment={
            "SGLANG_USE_CPU_ENGINE": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.environ.get("CODJAX_SGLANG_PATH", ""),
        },
        model_folder=start,
        port=test_processes.free_port(),
        log_file=folder / "log",
        ready_timeout_s=400.0,
    )


def below(pid):
    """All processes below one."""
    listed = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    children = [int(child) for child in listed]
    return children + [deeper for child in children for deeper in below(child)]


async def check_that_a_paused_server_holds_a_scoring_request(server):
    """Why the probe comes after `continue`."""
    await server.pause("retract")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(5.0):
            await server.score(TOKENS)
    await server.continue_()


async def check_pushes(pusher, server, pushes):
    """While a response is sampled, which goes on under each of them."""
    generating = asyncio.create_task(server.generate(600))
    await asyncio.sleep(1.0)
    for staged in pushes:
        [outcome] = await pusher.push(staged, [server])
        print(outcome, f"{len(staged.payloads)} payloads")
        assert outcome.ok, outcome.error
    spans = (await generating)["meta_info"]["weight_versions"]
    print("spans of a response that was sampled meanwhile:", spans)
    assert [span["version"] for span in spans][-2:] == [staged.version for staged in pushes]
    assert (spans[0]["start"], spans[-1]["end"]) == (0, 600)


async def check_a_wrong_shape(server, staged):
    """SGLang would die of this tensor; it is never called."""
    wrong = [(name, array.T) for name, array in make(3).tensors]
    with pytest.raises(weights.WeightsError, match=r"must be float32 of shape .* got float32"):
        weights.stage_payloads(make(3, tensors=wrong))
    await check_gap(server, staged)


async def check_gap(server, staged):
    gap = np.abs(await server.score(TOKENS) - staged.probe.logprobs).max()
    print(f"largest difference to {staged.version}: {gap:.2g}")
    assert gap < 1e-4


async def check_a_death(pool, down, synced):
    """Killed, it comes back with the last good folder, and gets the newest weights by bytes."""
    stop = asyncio.Event()
    watching = asyncio.create_task(pool.watch(stop))
    server, *others = below(pool.processes["real"]._process.pid)
    print(f"the server has {len(others)} processes more")
    killed = time.monotonic()
    os.kill(server, signal.SIGKILL)
    while not synced:
        assert not watching.done(), watching.result()
        await asyncio.sleep(0.1)
    print(f"noticed after {down[0] - killed:.2f} s, mended after {time.monotonic() - killed:.1f} s")
    print(synced[0])
    assert synced[0].ok, synced[0].error
    stop.set()
    await watching


async def check_stop(pool):
    everything = below(pool.processes["real"]._process.pid)
    began = time.monotonic()
    await pool.stop()
    print(f"stopped {len(everything)} processes in {time.monotonic() - began:.1f} s")
    assert not any(map(test_processes.is_alive, everything))


def test_both_routes_and_a_death(tmp_path):
    start = weights.stage_folder(make(0), folder=tmp_path).folder
    disk = weights.stage_folder(make(1), folder=tmp_path, max_shard_bytes=500_000)
    payloads = weights.stage_payloads(make(2), bucket_bytes=500_000)
    pusher = push.Pusher(push.PushSettings(tolerance=1e-4), start_folders={"real": start})
    down, synced = [], []

    async def run():
        async with aiohttp.ClientSession() as session:
            one = settings(tmp_path, start)
            server = Connection("real", one.url, session)

            async def on_ready(name):
                await check_gap(server, disk)
                synced.append(await pusher.sync(server))

            pool = pools.ServerPool(
                [one],
                last_good=pusher.last_good,
                on_down=lambda name, error: down.append(time.monotonic()),
                on_ready=on_ready,
            )
            began = time.monotonic()
            await pool.start()
            print(f"\nready after {time.monotonic() - began:.1f} s")
            try:
                assert await pool.processes["real"].is_healthy()
                await check_that_a_paused_server_holds_a_scoring_request(server)
                await check_pushes(pusher, server, [disk, payloads])
                await check_a_wrong_shape(server, payloads)
                await check_a_death(pool, down, synced)
            finally:
                await check_stop(pool)

    asyncio.run(run())
