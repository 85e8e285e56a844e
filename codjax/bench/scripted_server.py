"""A server that answers `/generate` as SGLang does, with answers made before, after a fixed wait.

    with serving(answers, latency_s=0.1) as server:
        …                                   # ask server.url
        server.peak_in_flight()

It runs in a process of its own and does as little as a server can, so that what is measured is the
client: it looks for the end of the prompt in the body, and copies bytes. Run as a script, without
any package, it reads what to answer from its input and ends when that ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

# How many of the prompt's last tokens decide which answer it gets.
NUM_KEY_TOKENS = 8
RID = "RID"  # stands for the id of the request in an answer made before
ANY = "any"  # the last token of a prompt that has no answers of its own
_HEAD = (
    "HTTP/1.1 {}\r\nserver: uvicorn\r\ncontent-length: {}\r\ncontent-type: application/json\r\n\r\n"
)


def chosen(last_tokens: Sequence[int], num_answers: int) -> int:
    """Which of the answers a prompt gets, that ends in up to `NUM_KEY_TOKENS` such tokens."""
    return sum(last_tokens) % num_answers


class Server(NamedTuple):
    """A running server."""

    url: str

    def peak_in_flight(self) -> int:
        """Most requests that were waiting for their answers at once, since this was last asked."""
        with urllib.request.urlopen(f"{self.url}/peak") as answer:
            return int(answer.read())


@contextlib.contextmanager
def serving(
    answers: Mapping[str, Sequence[str]], info: Mapping[str, Any], *, latency_s: float
) -> Iterator[Server]:
    """A server in another process, which ends with the block.

    Args:
        answers: to prompts by their last token (`ANY`: all others), JSON with `RID` in place of
            the request's id.
        info: JSON by route, for GET.
        latency_s: seconds from a request to its answer.
    """
    job = {"answers": answers, "info": info, "latency_s": latency_s}
    process = subprocess.Popen(
        [sys.executable, "-I", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            yield Server(f"http://127.0.0.1:{int(process.stdout.readline())}")
        finally:
            process.kill()


class _Script:
    """What is answered, and how much is under way."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        self.latency_s: float = job["latency_s"]
        self.info = {route: _response(json.dumps(a)) for route, a in job["info"].items()}
        self._answers = {
            None if last == ANY else int(last): [_Answer(text) for text in texts]
            for last, texts in job["answers"].items()
        }
        self.in_flight = self.peak = 0

    def answer(self, body: bytes) -> bytes:
        """To a body of `/generate`, in whichever way its JSON is spaced."""
        start = body.index(b"[", body.index(b'"input_ids"')) + 1
        end = body.index(b"]", start)
        key = body[start:end].rsplit(b",", NUM_KEY_TOKENS)[-NUM_KEY_TOKENS:]
        last = [int(number) for number in key]
        answers = self._answers.get(last[-1]) or self._answers[None]
        rid = re.search(rb'"rid"\s*:\s*"([^"]*)"', body)
        assert rid is not None
        return answers[chosen(last, len(answers))].to(rid.group(1))


class _Answer:
    def __init__(self, text: str) -> None:
        self._before, self._after = text.encode().split(RID.encode())

    def to(self, rid: bytes) -> bytes:
        length = len(self._before) + len(rid) + len(self._after)
        head = _HEAD.format("200 OK", length).encode()
        return b"".join((head, self._before, rid, self._after))


def _response(content: str, status: str = "200 OK") -> bytes:
    return (_HEAD.format(status, len(content)) + content).encode()


class _Connection(asyncio.Protocol):
    """One connection: a request is answered before the next one is sent on it."""

    def __init__(self, script: _Script) -> None:
        self._script = script
        self._received = bytearray()
        self._missing = 0  # bytes until it is worth looking again

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        if len(self._received) < self._missing:
            return
        split = self._received.find(b"\r\n\r\n")
        if split < 0:
            return
        head = bytes(self._received[:split])
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        self._missing = split + 4 + (int(length.group(1)) if length else 0)
        if len(self._received) < self._missing:
            return
        body = bytes(self._received[split + 4 : self._missing])
        del self._received[: self._missing]
        self._missing = 0
        self._handle(head.split(b" ", 2)[1].decode(), body)

    def _handle(self, route: str, body: bytes) -> None:
        script = self._script
        if route == "/generate":
            script.in_flight += 1
            script.peak = max(script.peak, script.in_flight)
            loop = asyncio.get_running_loop()
            loop.call_later(script.latency_s, self._finish, script.answer(body))
        elif route == "/peak":
            self._transport.write(_response(str(script.peak)))
            script.peak = script.in_flight
        else:
            unknown = _response('{"detail":"Not Found"}', "404 Not Found")
            self._transport.write(script.info.get(route, unknown))

    def _finish(self, response: bytes) -> None:
        self._script.in_flight -= 1
        self._transport.write(response)


async def _serve(job: Mapping[str, Any]) -> None:
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    script = _Script(job)
    server = await loop.create_server(lambda: _Connection(script), "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    loop.add_reader(sys.stdin.fileno(), ended.set)  # whoever started it is gone
    await ended.wait()


if __name__ == "__main__":
    asyncio.run(_serve(json.loads(sys.stdin.readline())))
