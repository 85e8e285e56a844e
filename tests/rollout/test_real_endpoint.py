"""A real SGLang server as an endpoint to evaluate; on request, as it takes a minute:

    CODJAX_SGLANG_PYTHON=/venv/bin/python CODJAX_SGLANG_PATH=/stubs \\
        pytest -m slow tests/rollout/test_real_endpoint.py -s

The variables are those of tests/rollout/sglang/test_real_push.py.
"""

import asyncio
import os
import pathlib

import pytest

from codjax import build, config_files, evaluate, models
from codjax import chat as chats
from codjax.rollout.sglang import processes
from tests.rollout.sglang import test_processes

PYTHON = os.environ.get("CODJAX_SGLANG_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(PYTHON is None, reason="CODJAX_SGLANG_PYTHON names no SGLang"),
]
TINY = pathlib.Path(__file__).parents[1] / "tiny.py"
KEY = "sk-very-secret"
ARGUMENTS = (
    "--model-path {model_folder} --host {host} --port {port} --device cpu --dtype float32 "
    "--attention-backend torch_native --sampling-backend pytorch --disable-cuda-graph "
    f"--max-total-tokens 8192 --mem-fraction-static 0.3 --api-key {KEY}"
)


def config():
    made = config_files.load(str(TINY))
    made.evaluation.temperature = 0.0
    made.evaluation.endpoint.api_key_variable = "CODJAX_TEST_KEY"
    made.model.init_std = made.model.embedding_std = 0.5  # so that answers differ
    for entry in made.evaluation.matrix.values():
        entry.num_packs = 16
    return made


def save(folder):
    """Random weights of the config's model, with its tokenizer."""
    made = config()
    chat = chats.load_chat(made.tokenizer.source)
    models.save_pretrained(models.init(build.make_model(made, chat).config, seed=0), folder)
    chat.tokenizer.save_pretrained(folder)


def test_a_served_model_gets_the_rewards_that_it_gets_in_process(tmp_path, monkeypatch):
    monkeypatch.setenv("CODJAX_TEST_KEY", KEY)
    save(tmp_path / "model")
    server = processes.ServerProcess(
        processes.ProcessSettings(
            name="real",
            command=("nice", "-n", "15", PYTHON, "-m", "sglang.launch_server", *ARGUMENTS.split()),
            environment={
                "SGLANG_USE_CPU_ENGINE": "1",
                "HF_HUB_OFFLINE": "1",
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.environ.get("CODJAX_SGLANG_PATH", ""),
            },
            model_folder=tmp_path / "model",
            port=test_processes.free_port(),
            log_file=tmp_path / "log",
            api_key=KEY,
            ready_timeout_s=400.0,
        )
    )

    async def start():
        await server.start()
        await server.wait_ready()

    try:
        asyncio.run(start())
        address = f"{server.settings.url}/v1"
        served = evaluate.main(config(), address, str(tmp_path / "served"))
    finally:
        asyncio.run(server.stop())
    here = evaluate.main(config(), str(tmp_path / "model"), str(tmp_path / "here"))
    assert served["checkpoint"] == f"{tmp_path / 'model'} at {address}"
    assert served["tasksets"] == here["tasksets"]
    for path in (tmp_path / "served").rglob("*"):
        assert KEY.encode() not in path.read_bytes()
