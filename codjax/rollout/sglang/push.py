"""Staged weights into running servers, each verified before it is trusted.

    pusher = Pusher(settings, start_folders=…, on_failure=drain)
    staged = weights.stage_folder(…)                  # on the learner's thread
    outcomes = await pusher.push(staged, servers)     # on the event loop
    outcome = await pusher.sync(server)               # a restarted one, with the newest weights

Every server goes through the same steps, by itself:

    pause ("retract") → load → flush → version ─→ continue → score the probe
                └── whatever fails ──→ on_failure ──↗

The probe comes last because a paused SGLang holds every request, a scoring one too. So a server
whose probe fails has run for that moment: `on_failure` is called at once, and the owner drops what
the server was answering.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import pathlib
import shutil
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from codjax.rollout import sampler as samplers
from codjax.rollout.sglang.weights import Staged

_T = TypeVar("_T")


class Server(Protocol):
    """What a push needs of the connection to one server.

    Every method raises `SamplerError`, with one line that says why, unless the server says that it
    did what it was asked for.
    """

    @property
    def name(self) -> str:
        """For messages and for locks: one server, one name."""
        ...

    @property
    def tp_size(self) -> int:
        """Ranks that share one copy of the model."""
        ...

    @property
    def dp_size(self) -> int:
        """Copies of the model behind the one address."""
        ...

    async def pause(self, mode: str) -> None:
        """Stop generating; "retract" keeps the requests and forgets their keys and values."""
        ...

    async def continue_(self) -> None:
        """Go on generating."""
        ...

    async def flush(self) -> None:
        """Forget all cached prefixes."""
        ...

    async def update_from_disk(self, path: str, version: str) -> None:
        """Load a directory, under a new `weight_version`."""
        ...

    async def begin_update(self) -> bool:
        """Begin a session of `update_from_bytes`; False where the route is not there (404)."""
        ...

    async def update_from_bytes(
        self, payload: Sequence[str], version: str | None, flush: bool
    ) -> None:
        """Load tensors: one payload per rank; the last call has the version and flushes."""
        ...

    async def end_update(self) -> None:
        """End the session."""
        ...

    async def model_info(self) -> Mapping[str, Any]:
        """What `/model_info` answers; has "weight_version"."""
        ...

    async def score(self, ids: np.ndarray) -> np.ndarray:
        """Log-probability of each next token at temperature 1: int32 `[n]` -> float32 `[n-1]`."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class PushSettings:
    """How weights get to the servers.

    Attributes:
        call_timeout_s: for each call but the loading ones: pause, flush, continue, scoring.
        load_timeout_s: for a server to load a directory, or one payload.
        tolerance: largest allowed difference between a log-prob of the probe by the server and by
            the learner. In float32 they differ by 1e-6, in bfloat16 by tenths; wrong weights
            differ by whole units. Two versions of a policy may be nearer than this: that the
            newest was loaded is known by its version.
    """

    call_timeout_s: float = 60.0
    load_timeout_s: float = 600.0
    tolerance: float = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one server.

    Attributes:
        server: its name.
        version: that it was to get.
        ok: whether it has the weights, verified, and is generating.
        seconds: for all of it.
        num_bytes: of the weights.
        gap: largest difference of a log-prob of the probe; None where it was not scored.
        error: one line; None where ok.
        folder: that it may be started from again, with these weights; None by the bytes route, and
            where not ok.
    """

    server: str
    version: str
    ok: bool
    seconds: float
    num_bytes: int
    gap: float | None
    error: str | None
    folder: pathlib.Path | None


class PushError(samplers.SamplerError):
    """A step of a push was not done in time, or not as it was asked for."""


class Pusher:
    """Knows the newest weights and which folder each server may be started from again.

    Owns the `weights-RUN-*` folders beside the newest: all of them that no server needs go after a
    success. Used from one event loop; a push of a server waits for an earlier one of it.

    Attributes:
        last_good: server → folder that it is to be started from again: with the weights that it was
            last verified with. `ServerPool` takes this very mapping.
    """

    def __init__(
        self,
        settings: PushSettings,
        *,
        start_folders: Mapping[str, pathlib.Path] | None = None,
        on_failure: Callable[[str, str], None] | None = None,
    ) -> None:
        """Push with these settings.

        Args:
            settings: deadlines and tolerance.
            start_folders: server → folder that it was started from, which is its last good one
                until the first push; of a resumed run, it may be among those that we remove.
            on_failure: called with server and error as soon as a server's weights are in doubt,
                before it goes on generating unless only the probe could tell.
        """
        self.last_good: dict[str, pathlib.Path] = dict(start_folders or {})
        self._settings = settings
        self._on_failure = on_failure or (lambda server, error: None)
        self._newest: Staged | None = None
        self._turns: dict[str, asyncio.Lock] = {}
        self._in_hand: list[Staged] = []  # being pushed

    async def push(self, staged: Staged, servers: Sequence[Server]) -> list[Outcome]:
        """Give weights, the newest from now on, to all servers at once.

        Returns:
            One outcome per server, in their order; a failure of one stops no other.
        """
        self._newest = staged
        results = await asyncio.gather(
            *(self._push(server, staged) for server in servers), return_exceptions=True
        )
        for result in results:  # after all have ended: an error of ours ends the program
            if isinstance(result, BaseException):
                raise result
        self._remove_old()
        return [result for result in results if isinstance(result, Outcome)]

    async def sync(self, server: Server) -> Outcome | None:
        """Give the newest weights to a server that was started again, or is new.

        Returns:
            What came of it; None where nothing was pushed yet.
        """
        if self._newest is None:
            return None
        outcome = await self._push(server, self._newest)
        self._remove_old()
        return outcome

    def forget(self, server: str) -> None:
        """Keep no folder for a server that will not be started again."""
        self.last_good.pop(server, None)

    async def _push(self, server: Server, staged: Staged) -> Outcome:
        """The steps of one server, and what came of them."""
        began = time.monotonic()
        gap = None
        self._in_hand.append(staged)
        try:
            async with self._turns.setdefault(server.name, asyncio.Lock()):
                error = await self._load_paused(server, staged)
                if error is None:
                    gap, error = await self._verify(server, staged)
                    if error is not None:
                        self._on_failure(server.name, error)
        finally:
            self._in_hand.remove(staged)
        folder = staged.folder if error is None else None
        if folder is not None:
            self.last_good[server.name] = folder
        return Outcome(
            server=server.name,
            version=staged.version,
            ok=error is None,
            seconds=time.monotonic() - began,
            num_bytes=staged.num_bytes,
            gap=gap,
            error=error,
            folder=folder,
        )

    async def _load_paused(self, server: Server, staged: Staged) -> str | None:
        """Load between pause and continue; the error, if there was one."""
        error = None
        try:
            await self._call(server, "pausing", server.pause("retract"))
            await self._load(server, staged)
            await self._call(server, "flushing its cache", server.flush())
            await self._check_version(server, staged)
        except samplers.SamplerError as failure:
            error = str(failure)
            self._on_failure(server.name, error)
        finally:  # also where this task is cancelled: a server that stays paused answers nobody
            try:
                await self._call(server, "continuing", server.continue_())
            except samplers.SamplerError as failure:
                if error is None:
                    error = str(failure)
                    self._on_failure(server.name, error)
        return error

    async def _load(self, server: Server, staged: Staged) -> None:
        limit = self._settings.load_timeout_s
        if staged.folder is not None:
            load = server.update_from_disk(str(staged.folder), staged.version)
            await _within(limit, server, f"loading {staged.folder}", load)
            return
        if server.dp_size > 1:
            raise PushError(
                f"{server.name} has dp_size {server.dp_size}, and SGLang takes weights as bytes "
                "with dp_size 1 only; push by disk, or start one server per replica."
            )
        has_session = await self._call(server, "beginning an update", server.begin_update())
        try:
            await self._load_payloads(server, staged)
        except BaseException:
            if has_session:
                with contextlib.suppress(samplers.SamplerError):  # the first error tells more
                    await self._call(server, "ending the update", server.end_update())
            raise
        if has_session:
            await self._call(server, "ending the update", server.end_update())

    async def _load_payloads(self, server: Server, staged: Staged) -> None:
        for number, payload in enumerate(staged.payloads, start=1):
            is_last = number == len(staged.payloads)
            load = server.update_from_bytes(
                [payload] * server.tp_size, staged.version if is_last else None, is_last
            )
            what = f"loading payload {number} of {len(staged.payloads)}"
            await _within(self._settings.load_timeout_s, server, what, load)

    async def _check_version(self, server: Server, staged: Staged) -> None:
        info = await self._call(server, "telling its version", server.model_info())
        found = info.get("weight_version") if isinstance(info, Mapping) else None
        if found != staged.version:
            raise PushError(
                f"{server.name} has weights {found!r} after it was given "
                f"{staged.version!r}; does another run use it?"
            )

    async def _verify(self, server: Server, staged: Staged) -> tuple[float | None, str | None]:
        """Gap and error of the probe."""
        probe, tolerance = staged.probe, self._settings.tolerance
        try:
            scored = await self._call(server, "scoring the probe", server.score(probe.tokens))
        except samplers.SamplerError as failure:
            return None, str(failure)
        if scored.shape != probe.logprobs.shape:
            return None, (
                f"{server.name} scored {len(scored)} tokens of the probe, not "
                f"{len(probe.logprobs)}."
            )
        gap = float(np.max(np.abs(scored - probe.logprobs)))
        if gap <= tolerance:  # nan is not
            return gap, None
        return gap, (
            f"{server.name} does not have the weights {staged.version}: a log-prob of the probe is "
            f"{gap:.3g} from the learner's, and {tolerance:g} are allowed."
        )

    async def _call(self, server: Server, what: str, awaited: Awaitable[_T]) -> _T:
        return await _within(self._settings.call_timeout_s, server, what, awaited)

    def _remove_old(self) -> None:
        """Remove the folders of the run that no server may be started from again."""
        newest = self._newest
        if newest is None or newest.folder is None:
            return
        if newest.folder not in self.last_good.values():  # no success yet
            return
        keep = {*self.last_good.values(), *(staged.folder for staged in self._in_hand)}
        prefix = f"weights-{newest.run_id}-"
        newest_version = int(newest.version.rpartition("-")[2])
        for path in newest.folder.parent.glob(f"{prefix}*"):
            version = path.name.removeprefix(prefix)
            # Newer ones are staged already, and will be pushed.
            is_old = version.isdecimal() and int(version) < newest_version
            if is_old and path not in keep:
                with contextlib.suppress(FileNotFoundError):  # another push was quicker
                    shutil.rmtree(path)


async def _within(limit_s: float, server: Server, what: str, awaited: Awaitable[_T]) -> _T:
    """What is awaited, or an error that names it."""
    since = time.time()
    try:
        async with asyncio.timeout(limit_s):
            return await awaited
    except TimeoutError as error:
        clock = time.strftime("%H:%M:%S", time.localtime(since))
        raise PushError(
            f"{server.name}: {what} was awaited since {clock}, longer than the {limit_s:g} s that "
            "are allowed."
        ) from error
