"""From `config.server` to records: addresses, keys, launch lines, what is expected of a server."""

import pathlib

import numpy as np
import pytest

from codjax import chat as chats
from codjax.config import default_config
from codjax.rollout.sglang import settings


def config_with(**changes):
    config = default_config()
    config.update_from_flattened_dict({f"server.{key}": value for key, value in changes.items()})
    return config


def test_every_number_of_a_server_comes_from_the_config():
    config = config_with(max_in_flight=7, request_timeout_s=3.0, router="http://r:1")
    made = settings.server_settings(config.server, ["http://a:1"])
    assert (made.urls, made.max_in_flight, made.request_timeout_s) == (("http://a:1",), 7, 3.0)
    assert (made.router, made.api_key, made.admin_api_key) == ("http://r:1", None, None)


def test_keys_come_from_the_environment_and_are_not_shown(monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret-user")
    monkeypatch.setenv("MY_ADMIN_KEY", "secret-admin")
    config = config_with(api_key_variable="MY_KEY", admin_api_key_variable="MY_ADMIN_KEY")
    made = settings.server_settings(config.server, ["http://a:1"])
    assert (made.api_key, made.admin_api_key) == ("secret-user", "secret-admin")
    assert "secret" not in repr(made)
    assert "secret" not in config.to_json_best_effort()


@pytest.mark.parametrize(
    ("dtype", "chosen", "tolerance"),
    [("bfloat16", None, 0.5), ("float32", None, 1e-4), ("bfloat16", 0.1, 0.1)],
)
def test_the_tolerance_of_the_probe_follows_from_the_dtype(dtype, chosen, tolerance):
    config = config_with(dtype=dtype, probe_tolerance=chosen)
    assert settings.push_settings(config.server).tolerance == tolerance


def test_the_launch_lines_of_local_servers(monkeypatch, tmp_path):
    monkeypatch.setenv("MY_KEY", "secret-user")
    config = config_with(
        api_key_variable="MY_KEY",
        **{"local.num": 2, "local.gpus_per_server": 2, "local.first_gpu": 4},
    )
    made = settings.process_settings(
        config.server, model_folder=pathlib.Path("/models/a"), log_folder=tmp_path
    )
    assert [one.name for one in made] == ["http://127.0.0.1:30000", "http://127.0.0.1:30001"]
    assert [one.gpus for one in made] == ["4,5", "6,7"]
    assert " ".join(made[1].command) == (
        "python3 -m sglang.launch_server --model-path {model_folder} --host {host} --port {port} "
        "--dtype bfloat16 --tp-size 2 --api-key secret-user --skip-tokenizer-init"
    )
    assert made[1].log_file == tmp_path / "server_30001.log"


def test_servers_that_choose_their_own_devices():
    config = config_with(**{"local.num": 1, "local.gpus_per_server": 0})
    (made,) = settings.process_settings(
        config.server, model_folder=pathlib.Path("a"), log_folder=pathlib.Path("b")
    )
    assert made.gpus is None
    assert "--tp-size" not in made.command


def test_what_a_server_must_make_of_a_text_is_what_our_tokenizer_makes():
    config = default_config()
    config.tokenizer.source = "/models/of/a/folder"  # where a builtin one would not be asked
    chat = chats.load_chat("builtin:bytes")
    made = settings.expected_model(config, chat, architecture="Qwen3ForCausalLM", vocab_size=300)
    assert chat.decode(np.array(made.text_ids, np.int32)) == made.text
    assert made.context_tokens == 12000
    config.tokenizer.source = "builtin:bytes"
    made = settings.expected_model(config, chat, architecture="Qwen3ForCausalLM", vocab_size=300)
    assert (made.text, made.text_ids) == ("", ())
