"""A scripted server in a process: `python -m tests.rollout.sglang.fake_process PORT FILE`.

It ends as soon as there is such a file, and does not start while there is.
"""

import asyncio
import pathlib
import sys

from tests.rollout.sglang.fake_server import FakeServer


async def main(port, dies):
    async with FakeServer(weight_version="default", port=port):
        while not dies.exists():
            await asyncio.sleep(0.02)
    sys.exit(3)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), pathlib.Path(sys.argv[2])))
