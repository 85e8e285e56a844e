"""The servers behind a sampler: which one is asked, which one is set aside, and its way back.

A replica serves from the moment when its owner says that its weights are current (`readmit`)
until it fails several times in a row, answers from other weights, or is drained. Then it is set
aside: nothing is sent there but probes, until the owner has given it weights and readmits it. The
owner's watch is a loop around `returned`:

    while True:
        url = await replicas.returned()
        …                                   # push the current weights there
        await replicas.readmit(url, policy_version=version)
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import re
import time
from collections.abc import Sequence

from codjax.rollout.sampler import SamplerError
from codjax.rollout.sglang import wire
from codjax.rollout.sglang.server import (
    BusyError,
    NoAnswerError,
    ServerClient,
    ServerSettings,
)

# The first that says per token which weights sampled it (`weight_versions`).
OLDEST_SGLANG = (0, 5, 19)
# Groups whose replica is remembered; a group is a pack, and a pack is over after some minutes.
_MAX_HOMES = 65536
_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpectedModel:
    """The model that every replica must run.

    Attributes:
        architecture: as in its Hugging Face config, such as "Qwen3ForCausalLM".
        vocab_size: V.
        context_tokens: longest prompt with its response that must fit.
        text: that a server's tokenizer must make `text_ids` of, if it has one; "" asks for nothing.
        text_ids: its tokens, without special ones.
    """

    architecture: str
    vocab_size: int
    context_tokens: int
    text: str = ""
    text_ids: tuple[int, ...] = ()


@dataclasses.dataclass(kw_only=True, eq=False)
class Replica:
    """One server and what is known of it.

    Attributes:
        client: its connections.
        info: what it said when it was checked.
        policy_version: of the weights that it was given last.
        in_flight: requests of ours that it is answering.
        num_failures: failed requests since the last good one.
        admission: counts its readmissions; a failure from before the last one is old news.
        distrusted: the last admission of which no answer is to be believed.
        num_set_aside: how often it was, again while it was; that ends a readmission under way.
        returned_at: when `returned` named it last, on the monotonic clock.
        aside: why nothing is sent to it, or None while it serves.
        aside_since: when it was set aside, on the monotonic clock.
    """

    client: ServerClient
    info: wire.ServerInfo | None = None
    policy_version: int = -1
    in_flight: int = 0
    num_failures: int = 0
    admission: int = 0
    distrusted: int = -1
    num_set_aside: int = 0
    returned_at: float = 0.0
    aside: str | None = "it was not given weights yet"
    aside_since: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def url(self) -> str:
        """Its address."""
        return self.client.url


class Replicas:
    """All servers of a sampler; owns their clients until `close`. One event loop."""

    def __init__(self, settings: ServerSettings, expected: ExpectedModel, run_id: str) -> None:
        self._settings, self._expected, self._run_id = settings, expected, run_id
        self.all = tuple(
            Replica(client=ServerClient(url, settings)) for url in dict.fromkeys(settings.urls)
        )
        self.num_set_aside = self.num_distrusted = 0
        self._homes: dict[int, Replica] = {}
        self._changed = asyncio.Event()  # replaced at every change of who serves

    async def connect(self) -> None:
        """Waits until every server is ready, and checks what it runs; none serves yet.

        Raises:
            SamplerError: one is not ready in time, or does not run the expected model.
        """
        try:
            async with asyncio.timeout(self._settings.ready_timeout_s):
                for replica in self.all:
                    await self._connect(replica)
        except TimeoutError:
            unready = next(replica.url for replica in self.all if replica.info is None)
            raise SamplerError(
                f"{unready} was not ready within {self._settings.ready_timeout_s:g} s "
                "(server.ready_timeout_s): is the server running, and does its log show an error?"
            ) from None

    async def close(self) -> None:
        """Ends all connections."""
        for replica in self.all:
            await replica.client.close()

    async def choose(self, group: int, *, avoid: Replica | None) -> Replica:
        """The replica to ask next: its group's, unless that is too busy; else the least busy.

        Waits while none serves.

        Raises:
            SamplerError: none served for `settings.replica_wait_s`.
        """
        deadline = time.monotonic() + self._settings.replica_wait_s
        while not (serving := [replica for replica in self.all if replica.aside is None]):
            try:
                await asyncio.wait_for(self._changed.wait(), deadline - time.monotonic())
            except TimeoutError:
                raise SamplerError(
                    f"no server served for {self._settings.replica_wait_s:g} s "
                    f"(server.replica_wait_s): {self.why_aside()}"
                ) from None
        others = [replica for replica in serving if replica is not avoid] or serving
        least = min(others, key=lambda replica: replica.in_flight)
        home = self._homes.pop(group, None)
        if home not in others or home.in_flight > least.in_flight + self._settings.max_imbalance:
            home = least
        self._homes[group] = home  # the last one in the order of use
        if len(self._homes) > _MAX_HOMES:
            del self._homes[next(iter(self._homes))]
        return home

    def oldest_version(self) -> int:
        """Of the weights of those that serve."""
        return min((r.policy_version for r in self.all if r.aside is None), default=-1)

    def has_other(self, replica: Replica) -> bool:
        """Whether another one serves."""
        return any(other.aside is None and other is not replica for other in self.all)

    def succeeded(self, replica: Replica) -> None:
        """It answered a request."""
        replica.num_failures = 0

    def failed(self, replica: Replica, reason: SamplerError, *, admission: int) -> None:
        """It failed a request that was sent while it was admitted for the `admission`-th time."""
        if admission != replica.admission or replica.aside is not None:
            return
        replica.num_failures += 1
        if isinstance(reason, wire.WrongWeightsError):
            self.set_aside(replica.url, str(reason))
        elif replica.num_failures >= self._settings.max_failures:
            text = f"{replica.num_failures} failures in a row, the last: {reason}"
            self.set_aside(replica.url, text)

    def set_aside(self, url: str, reason: str, *, distrust: bool = False) -> None:
        """Sends nothing there any more, until it is readmitted.

        With `distrust`, what it is answering now is not believed either: its weights are in doubt.
        """
        replica = self.of(url)
        if distrust:
            replica.distrusted = replica.admission
            self.num_distrusted += 1
            self._notify()
        if replica.aside is None:
            _logger.warning("Server %s is set aside: %s.", replica.url, reason.rstrip("."))
            self.num_set_aside += 1
            replica.aside_since = time.monotonic()
            self._notify()
        replica.num_set_aside += 1
        replica.aside = reason.rstrip(".")  # the newest reason is what is in its way

    async def readmit(self, url: str, *, policy_version: int | None) -> None:
        """Its weights are those of `policy_version`: it serves from now on, or goes on serving.

        To be called after every push, for every replica. None takes it as it is, for a teacher that
        nobody pushes to: it scores texts, and is asked for no answers.

        Raises:
            SamplerError: it is not ready, or runs another model or other weights after all, or was
                set aside while it was asked; it is set aside then.
        """
        replica = self.of(url)
        num_set_aside = replica.num_set_aside
        try:
            await self._check_weights(replica, policy_version)
        except SamplerError as error:
            self.set_aside(url, str(error))
            raise
        if replica.num_set_aside != num_set_aside:  # such as by a push that failed
            raise SamplerError(f"{url} was set aside while it was readmitted: {replica.aside}.")
        if replica.aside is not None:
            what = (
                "as it is" if policy_version is None else f"the weights of version {policy_version}"
            )
            _logger.info("Server %s serves %s.", url, what)
        version = -1 if policy_version is None else policy_version
        replica.policy_version, replica.aside, replica.num_failures = version, None, 0
        replica.admission += 1
        self._notify()

    async def returned(self) -> str:
        """The address of a replica that was set aside and is ready; waits for one.

        Each is returned again until it is readmitted, and those in turn of which there are several:
        an owner that cannot give them weights should wait before it asks again.
        """
        while True:
            for replica in sorted(self.all, key=lambda replica: replica.returned_at):
                if replica.aside is not None and await self.is_back(replica):
                    replica.returned_at = time.monotonic()
                    return replica.url
            if all(replica.aside is None for replica in self.all):
                await self._changed.wait()
            else:
                await asyncio.sleep(self._settings.probe_interval_s)

    async def is_back(self, replica: Replica) -> bool:
        """Whether a server that was set aside takes requests again."""
        try:
            return await replica.client.wake()
        except SamplerError:  # something else may listen there now
            return False

    async def inspect(self, replica: Replica) -> None:
        """Asks a server what it runs.

        Raises:
            SamplerError: it is not the expected model, or does not say.
        """
        info = await replica.client.info()
        check(replica, info, self._expected)
        found = await replica.client.vocab_size()
        wanted = self._expected.vocab_size
        if found is not None and found != wanted:
            raise SamplerError(
                f"{replica.url} has a vocabulary of {found}, and the model one of {wanted}: start "
                "it with a checkpoint of model.source."
            )
        await self._check_tokenizer(replica, info)
        replica.info = info

    async def settled(self, replica: Replica, version: int, *, admission: int) -> bool:
        """Whether an answer by weights of a version is to be believed, once that is known.

        A server goes on answering before its new weights have been verified.

        Args:
            replica: who answered.
            version: of the newest weights in the answer.
            admission: of the replica when it was asked.
        """
        limit_s = self._settings.replica_wait_s
        deadline = time.monotonic() + limit_s
        while admission > replica.distrusted and version > replica.policy_version:
            if replica.aside is not None:
                return False
            try:
                await asyncio.wait_for(self._changed.wait(), deadline - time.monotonic())
            except TimeoutError:
                self.set_aside(
                    replica.url,
                    f"it answers from version {version}, which nobody gave it in {limit_s:g} s",
                    distrust=True,
                )
        return admission > replica.distrusted

    def is_in_doubt(self) -> bool:
        """Whether a server was distrusted and has not been readmitted: a router still asks it."""
        return any(r.aside is not None and r.distrusted == r.admission for r in self.all)

    async def reached(self, version: int, *, since: int) -> bool:
        """Whether an answer of any server is to be believed, once its version has been verified.

        Args:
            version: of the newest weights in the answer.
            since: `num_distrusted` when it was asked.
        """
        deadline = time.monotonic() + self._settings.replica_wait_s
        while since == self.num_distrusted:
            if version <= max((r.policy_version for r in self.all), default=-1):
                return True
            try:
                await asyncio.wait_for(self._changed.wait(), deadline - time.monotonic())
            except TimeoutError:
                return False
        return False

    async def drain(self, urls: Sequence[str]) -> None:
        """Sets servers aside and ends what they do; partial answers go on elsewhere, or wait.

        Raises:
            SamplerError: one was not idle within `settings.drain_timeout_s`.
        """
        replicas = [self.of(url) for url in urls]
        for replica in replicas:
            if replica.aside is None:
                self.set_aside(replica.url, "it was drained")
        drains = (self._drain(replica) for replica in replicas)
        errors = await asyncio.gather(*drains, return_exceptions=True)
        for error in filter(None, errors):
            raise error

    def of(self, url: str) -> Replica:
        """The replica at an address."""
        return next(replica for replica in self.all if replica.url == url.rstrip("/"))

    def why_aside(self) -> str:
        """Who was set aside, since when and why, in one line."""
        now = time.monotonic()
        return "; ".join(
            f"{replica.url} set aside {now - replica.aside_since:.0f} s ago: {replica.aside}"
            for replica in self.all
            if replica.aside is not None
        )

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _connect(self, replica: Replica) -> None:
        while not await replica.client.wake():
            await asyncio.sleep(self._settings.probe_interval_s)
        await self.inspect(replica)

    async def _check_tokenizer(self, replica: Replica, info: wire.ServerInfo) -> None:
        """What a server makes of texts is not used; another tokenizer tells of another model."""
        expected = self._expected
        if not expected.text or not info.has_tokenizer:
            return
        found = await replica.client.tokenize(expected.text)
        if found is not None and tuple(found) != expected.text_ids:
            raise SamplerError(
                f"{replica.url} has another tokenizer than tokenizer.source: it makes "
                f"{found[:8]}… of {expected.text!r}, and not {list(expected.text_ids[:8])}…: start "
                "it with a checkpoint of model.source, or with --skip-tokenizer-init."
            )

    async def _check_weights(self, replica: Replica, policy_version: int | None) -> None:
        url = replica.url
        if not await replica.client.is_ready():
            raise NoAnswerError(f"{url} is not ready: it loads, is paused, or is gone.")
        replica.info = await replica.client.info()
        check(replica, replica.info, self._expected)
        if policy_version is None:
            return
        wanted = wire.version_name(self._run_id, policy_version)
        if replica.info.weight_version != wanted:
            raise wire.WrongWeightsError(
                f"{url} has the weights {replica.info.weight_version!r}, and should have "
                f"{wanted!r}: push them there first."
            )

    async def _drain(self, replica: Replica) -> None:
        deadline = time.monotonic() + self._settings.drain_timeout_s
        seen, admission = "it did not answer", replica.admission
        while time.monotonic() < deadline:
            if replica.admission != admission:  # it serves again, and what it does is wanted
                return
            try:
                await replica.client.abort_all()
                load = await replica.client.load()
            except (NoAnswerError, BusyError) as error:
                seen = str(error)
            else:
                if not (load.num_running or load.num_waiting or replica.in_flight):
                    return
                seen = (
                    f"{load.num_running} running, {load.num_waiting} waiting, "
                    f"{replica.in_flight} of ours unanswered"
                )
            await asyncio.sleep(min(0.1, self._settings.drain_timeout_s))
        raise SamplerError(
            f"{replica.url} was not idle {self._settings.drain_timeout_s:g} s "
            f"(server.drain_timeout_s) after it was told to drop its requests: {seen}."
        )


def check(replica: Replica, info: wire.ServerInfo, expected: ExpectedModel) -> None:
    """Raises if a server cannot serve the model.

    Tokens go in and come out, and stop tokens go with each request: a server needs no tokenizer.
    One that it has is compared when it is connected.
    """
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", info.sglang_version)
    if numbers is None or tuple(map(int, numbers.groups())) < OLDEST_SGLANG:
        raise SamplerError(
            f"{replica.url} runs sglang {info.sglang_version or '(unknown)'}; needed is "
            f"{'.'.join(map(str, OLDEST_SGLANG))} or later, which says which weights sampled "
            "which tokens."
        )
    if info.architecture != expected.architecture:
        raise SamplerError(
            f"{replica.url} runs a {info.architecture or 'model of no name'} "
            f"({info.model_path}), and the model is a {expected.architecture}: start it with a "
            "checkpoint of model.source."
        )
    if info.context_tokens < expected.context_tokens:
        raise SamplerError(
            f"{replica.url} has room for {info.context_tokens} tokens of prompt and response, and "
            f"rollout.max_prompt_tokens + rollout.max_response_tokens are "
            f"{expected.context_tokens}: start it with a larger --context-length or "
            "--mem-fraction-static, or lower these."
        )
