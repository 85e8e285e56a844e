"""What `config.server` says, as the records that the parts of this package take."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Sequence

from ml_collections import ConfigDict

from codjax import chat as chats
from codjax.rollout.sglang.processes import ProcessSettings
from codjax.rollout.sglang.push import PushSettings
from codjax.rollout.sglang.replicas import ExpectedModel
from codjax.rollout.sglang.server import ServerSettings

# Letters, numbers, white space and signs, of which tokenizers make different things.
_TEXT = "Connect 3 dots:\n  naïve agents, 2026 → 日本語 <answer>x == 1.5e-3;</answer>"
# Right weights differ by 1e-6 in float32 and by tenths in bfloat16; wrong ones by units.
_TOLERANCES = {"float32": 1e-4, "bfloat16": 0.5}


def local_urls(server: ConfigDict) -> tuple[str, ...]:
    """Addresses, on this machine, of the servers that `server.local` starts.

    >>> from codjax.config import default_config
    >>> server = default_config().server
    >>> server.local.num = 2
    >>> local_urls(server)
    ('http://127.0.0.1:30000', 'http://127.0.0.1:30001')
    """
    ports = range(server.local.first_port, server.local.first_port + server.local.num)
    host = "127.0.0.1" if server.local.host == "0.0.0.0" else server.local.host
    return tuple(f"http://{host}:{port}" for port in ports)


def server_settings(server: ConfigDict, urls: Sequence[str]) -> ServerSettings:
    """How these servers are reached."""
    same = {field.name for field in dataclasses.fields(ServerSettings)} & set(server)
    return ServerSettings(
        **{name: server[name] for name in same}
        | {
            "urls": tuple(urls),
            "api_key": _secret(server.api_key_variable),
            "admin_api_key": _secret(server.admin_api_key_variable),
        }
    )


def push_settings(server: ConfigDict) -> PushSettings:
    """How weights get there."""
    return PushSettings(
        call_timeout_s=server.control_timeout_s,
        load_timeout_s=server.weights_timeout_s,
        tolerance=server.probe_tolerance or _TOLERANCES[server.dtype],
    )


def expected_model(
    config: ConfigDict, chat: chats.Chat, *, architecture: str, vocab_size: int
) -> ExpectedModel:
    """What the servers must run, and have room for.

    Args:
        config: of the run.
        chat: of `tokenizer.source`; a builtin one is in no server.
        architecture: of the model, in its Hugging Face config.
        vocab_size: V.
    """
    rollout, is_builtin = config.rollout, config.tokenizer.source.startswith("builtin:")
    return ExpectedModel(
        architecture=architecture,
        vocab_size=vocab_size,
        context_tokens=rollout.max_prompt_tokens + rollout.max_response_tokens,
        text="" if is_builtin else _TEXT,
        text_ids=() if is_builtin else tuple(chat.respond(_TEXT)[:-1].tolist()),
    )


def process_settings(
    server: ConfigDict, *, model_folder: pathlib.Path, log_folder: pathlib.Path
) -> list[ProcessSettings]:
    """The servers of `server.local`, each named by its address.

    Args:
        server: `config.server`.
        model_folder: that they start with.
        log_folder: a log file for each is written there.
    """
    local, made = server.local, []
    keys = [
        ("--api-key", server.api_key_variable),
        ("--admin-api-key", server.admin_api_key_variable),
    ]
    words = ["--model-path", "{model_folder}", "--host", "{host}", "--port", "{port}"]
    words += ["--dtype", server.dtype]
    if local.gpus_per_server > 1:
        words += ["--tp-size", str(local.gpus_per_server)]
    for flag, variable in keys:
        if variable is not None:
            words += [flag, _secret(variable) or ""]
    for index, url in enumerate(local_urls(server)):
        first = local.first_gpu + index * local.gpus_per_server
        gpus = ",".join(str(first + gpu) for gpu in range(local.gpus_per_server))
        made.append(
            ProcessSettings(
                name=url,
                command=(*local.command, *words, *local.arguments),
                model_folder=model_folder,
                host=local.host,
                port=local.first_port + index,
                log_file=log_folder / f"server_{local.first_port + index}.log",
                gpus=gpus or None,
                api_key=_secret(server.api_key_variable) or "",
                secrets=tuple(_secret(name) or "" for _, name in keys if name is not None),
                ready_timeout_s=server.ready_timeout_s,
                stop_timeout_s=local.stop_timeout_s,
                max_restarts=local.max_restarts,
            )
        )
    return made


def _secret(variable: str | None) -> str | None:
    """The key in a variable of the environment; `validate` has seen that it is there."""
    return None if variable is None else os.environ[variable]
