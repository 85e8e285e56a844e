"""Checks of asynchrony and of SGLang servers."""

from __future__ import annotations

import os
import re
import urllib.parse
from typing import Any

from ml_collections import ConfigDict

from codjax import checks

_AT_LEAST_1 = ("bucket_mb", "max_in_flight", "max_failures")
_AT_LEAST_0 = ("max_imbalance", "max_retries")
_SECONDS = (
    "backoff_s",
    "max_backoff_s",
    "connect_timeout_s",
    "request_timeout_s",
    "control_timeout_s",
    "weights_timeout_s",
    "ready_timeout_s",
    "replica_wait_s",
    "drain_timeout_s",
    "probe_interval_s",
)


def check_asynchrony(rollout: ConfigDict) -> None:
    """How far rollouts run ahead, and what only some ways of it read."""
    checks.at_least(rollout, "rollout.max_staleness", 0, "it counts updates")
    checks.at_least(rollout, "rollout.sync_every", 1, "it counts updates")
    checks.require(
        rollout.sync_every <= rollout.max_staleness + 1,
        "rollout.sync_every",
        f"be at most rollout.max_staleness + 1 = {rollout.max_staleness + 1}",
        "the last rollout before new weights is that old",
        rollout.sync_every,
    )
    checks.positive(rollout, "rollout.deadline_s")
    checks.at_least(rollout, "rollout.steps_at_once", 1, "it counts rollout steps")
    replay = rollout.replay
    checks.at_least(replay, "rollout.replay.max_uses", 1, "it counts updates")
    checks.at_least(replay, "rollout.replay.decay", 0, "it is taken off a priority")
    checks.at_least(replay, "rollout.replay.noise", 0, "it is a standard deviation")
    if rollout.in_flight_updates:
        checks.require(
            rollout.max_staleness >= 1,
            "rollout.in_flight_updates",
            "be false when rollout.max_staleness is 0",
            "new weights come while a step is sampled, so its first tokens are older",
            rollout.in_flight_updates,
        )
        return
    idle = (
        ("steps_at_once", rollout.steps_at_once, 2),
        ("replay.max_uses", replay.max_uses, 1),
        ("replay.decay", replay.decay, 2.0),
        ("replay.noise", replay.noise, 2.0),
    )
    for key, value, default in idle:
        checks.require(
            value == default,
            f"rollout.{key}",
            f"be {default}",
            "rollout.in_flight_updates is false, and then steps are sampled and trained on one "
            "after the other",
            value,
        )


def check_server(config: ConfigDict) -> None:
    """The servers of `rollout.sampler` "sglang"; the sections of other samplers are idle."""
    server = config.server
    for name in _AT_LEAST_1:
        checks.at_least(server, f"server.{name}", 1, "it is a count")
    for name in _AT_LEAST_0:
        checks.at_least(server, f"server.{name}", 0, "it is a count")
    for name in _SECONDS:
        checks.positive(server, f"server.{name}")
    if server.probe_tolerance is not None:
        checks.positive(server, "server.probe_tolerance")
    _check_urls(server)
    _check_local(server)
    is_used = config.rollout.sampler == "sglang"
    checks.require(
        not is_used or bool(server.urls) or bool(server.local.num),
        "server.urls",
        "name servers that run, or server.local.num say how many to start",
        "rollout.sampler is sglang",
        tuple(server.urls),
    )
    for key in ("api_key_variable", "admin_api_key_variable"):
        name = server[key]
        is_there = name is None or bool(os.environ.get(name))
        why = "it names a variable of the environment that holds a key"
        is_ok = is_there or not (is_used or server.local.num)
        checks.require(is_ok, f"server.{key}", "be set in the environment", why, name)


def _check_urls(server: ConfigDict) -> None:
    for key, url in [
        *(("server.urls", url) for url in server.urls),
        ("server.router", server.router),
    ]:
        if url is not None:
            must = 'be like "http://10.0.0.2:30000", without a path'
            checks.require(_is_address(url), key, must, "routes are appended to it", url)
    checks.require(
        len(set(server.urls)) == len(server.urls),
        "server.urls",
        "name each once",
        "it is a set",
        tuple(server.urls),
    )
    checks.require(
        server.router is None or len(server.urls) > 0,
        "server.router",
        "be left unset without server.urls",
        "weights do not go through a router",
        server.router,
    )


def _is_address(url: Any) -> bool:
    if not isinstance(url, str):
        return False
    parts = urllib.parse.urlsplit(url)
    try:
        has_port = parts.port is not None
    except ValueError:
        return False
    is_bare = parts.path in ("", "/") and not parts.query and not parts.fragment
    return parts.scheme in ("http", "https") and bool(parts.hostname) and has_port and is_bare


def _check_local(server: ConfigDict) -> None:
    local = server.local
    for name in ("num", "gpus_per_server", "first_gpu", "max_restarts"):
        checks.at_least(local, f"server.local.{name}", 0, "it is a count")
    checks.positive(local, "server.local.stop_timeout_s")
    last = local.first_port + max(local.num, 1) - 1
    checks.require(
        local.first_port >= 1 and last <= 65535,
        "server.local.first_port",
        f"leave room for {max(local.num, 1)} ports up to 65535",
        "each server has its own",
        local.first_port,
    )
    for name in ("command", "arguments"):
        words = tuple(local[name])
        is_text = all(isinstance(word, str) and word for word in words)
        checks.require(is_text, f"server.local.{name}", "be words", "they start a program", words)
    checks.require(
        len(local.command) > 0, "server.local.command", "name a program", "it is started", ()
    )
    taken = [
        word for word in local.arguments if re.match(r"--(model-path|host|port|dtype)\b", word)
    ]
    checks.require(
        not taken,
        "server.local.arguments",
        "leave out --model-path, --host, --port and --dtype",
        "they follow from other keys",
        tuple(taken),
    )
    checks.require(
        local.num == 0 or len(server.urls) > 0 or server.route == "disk",
        "server.route",
        'be "disk" with server.local',
        "local servers are started from the folder of the newest weights",
        server.route,
    )
