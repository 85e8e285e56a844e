"""Running servers, as fixtures: a pair that all tests share, and others on request."""

import asyncio
import contextlib

import pytest

from tests.rollout.sglang.real import learner, local


@pytest.fixture(scope="session")
def _pair(tmp_path_factory):
    logs = tmp_path_factory.mktemp("pair")
    with local.started(learner.start_folder(logs), logs, num_servers=2) as running:
        yield running


@pytest.fixture
def pair(_pair):
    """Two servers of a tiny model, up, not paused and idle, with any weights."""

    async def mend():
        for process in _pair.processes.values():
            if not process.is_running:
                process.model_folder = _pair.folder
                await process.start()
                await process.wait_ready()
        for url in _pair.urls:
            await learner.calm(url, _pair.reach())

    asyncio.run(mend())
    return _pair


@pytest.fixture
def start_servers(tmp_path):
    """`start_servers(folder, num_servers=1)` → `local.Running` servers, which end with the test."""
    with contextlib.ExitStack() as stack:

        def start(folder, num_servers=1):
            return stack.enter_context(local.started(folder, tmp_path, num_servers=num_servers))

        yield start
