"""An sglang-router before the servers: optional, and for answers only.

It spreads requests by its own policy and asks another server when one is gone. Weights, pauses and
scores do not go through it (it answers 404), so the servers are known one by one all the same.
"""

from __future__ import annotations

import asyncio
import time

from codjax.rollout.sampler import SamplerError
from codjax.rollout.sglang.server import NoAnswerError, ServerClient, ServerSettings


class Router:
    """The connections to it, and whether it is there. Whoever makes it closes `client`.

    Attributes:
        client: its connections.
        in_flight: requests of ours that it is answering.
        num_failures: failed requests since the last good one.
        down: why it is asked nothing but whether it is ready, or None.
        down_since: on the monotonic clock.
    """

    def __init__(self, settings: ServerSettings) -> None:
        assert settings.router is not None
        self.client = ServerClient(settings.router, settings)
        self.in_flight = self.num_failures = 0
        self.down: str | None = "it does not answer /readiness or /health"
        self.down_since = time.monotonic()
        self._settings = settings

    def failed(self, error: NoAnswerError) -> None:
        """It did not answer a request."""
        self.num_failures += 1
        if self.num_failures >= self._settings.max_failures and self.down is None:
            self.down, self.down_since = str(error), time.monotonic()

    async def ready(self) -> None:
        """Returns once it can be asked.

        Raises:
            SamplerError: it cannot for `server.replica_wait_s`.
        """
        while self.down is not None:
            if await self._is_ready():
                self.num_failures, self.down = 0, None
            elif time.monotonic() - self.down_since > self._settings.replica_wait_s:
                raise SamplerError(
                    f"{self.client.url} (server.router) was not ready for "
                    f"{self._settings.replica_wait_s:g} s (server.replica_wait_s): {self.down}"
                )
            else:
                await asyncio.sleep(self._settings.probe_interval_s)

    async def _is_ready(self) -> bool:
        """Whether it has servers to ask; its /health says that all is well without any."""
        try:
            return await self.client.is_ready("/readiness")
        except SamplerError as error:  # something else may listen there now
            self.down = f"{error} (is it an sglang-router?)"
            return False
