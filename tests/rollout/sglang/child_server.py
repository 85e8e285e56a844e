"""A server process of the tests: `python child_server.py PORT FOLDER MODE…`.

Answers /ready and /health, starts a helper process that ignores SIGTERM, and writes both process
numbers into FOLDER/pids. Modes:

    dies      ends at once, with words
    deaf      never answers /ready
    stubborn  ignores SIGTERM
    unwell    does not answer /health
    old       has no /ready
"""

import asyncio
import os
import pathlib
import signal
import subprocess
import sys

HELPER = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"


async def main(port, folder, modes):
    print(f"loading {folder} on GPUs {os.environ.get('CUDA_VISIBLE_DEVICES')}", flush=True)
    if "dies" in modes:
        print("out of memory", flush=True)
        sys.exit(3)
    if "stubborn" in modes:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    helper = subprocess.Popen([sys.executable, "-c", HELPER])
    escaped = subprocess.Popen([sys.executable, "-c", HELPER], start_new_session=True)
    pids = folder / "pids"
    pids.with_suffix(".new").write_text(f"{os.getpid()} {helper.pid} {escaped.pid}")
    pids.with_suffix(".new").replace(pids)

    async def answer(reader, writer):
        path = (await reader.readline()).split()[1:2]
        while (await reader.readline()).strip():
            pass
        silent = (path == [b"/health"] and "unwell" in modes) or "deaf" in modes
        if silent:
            await asyncio.sleep(600)
        status = "404 Not Found" if path == [b"/ready"] and "old" in modes else "200 OK"
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode())
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3:]))
