"""Runs a command and outlives nobody: `python guard.py GRACE_S COMMAND…`, a program of its own.

The parent holds the other end of our standard input. When it ends, however it was ended, the pipe
closes, and we end the command with all that it started: SIGTERM, after GRACE_S seconds SIGKILL. The
same at SIGTERM. When the command itself ends, what it leaves behind is killed at once: it holds the
memory that the next start needs. We end last, with the command's exit status (128 + signal, as a
shell has it). If somebody kills us, the kernel kills the command.

Standard library only, and nothing of codjax: it starts in milliseconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pathlib
import select
import signal
import subprocess
import sys
import time

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
_POLL_S = 0.05
_KILLED_S = 10.0  # the kernel may take a while to free a large process


def main(grace_s: float, command: list[str]) -> int:
    """Run the command to its end, or to ours.

    Args:
        grace_s: between SIGTERM and SIGKILL.
        command: program and arguments.

    Returns:
        Its exit status.
    """
    libc = ctypes.CDLL(None)
    # What the command leaves behind becomes our child, even if it changed its process group.
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    wake_read, wake_write = os.pipe()
    for number in (wake_read, wake_write):
        os.set_blocking(number, False)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    asked_to_stop = []
    signal.signal(signal.SIGTERM, lambda *_: asked_to_stop.append(True))
    signal.signal(signal.SIGCHLD, lambda *_: None)  # only to wake up
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's, who will tell us
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0),  # noqa: PLW1509 (no threads)
    )
    stdin = sys.stdin.fileno()
    while child.poll() is None and not asked_to_stop:
        readable, _, _ = select.select([stdin, wake_read], [], [])
        if wake_read in readable:
            os.read(wake_read, 512)
        if stdin in readable and not os.read(stdin, 512):
            break
    _end_all(child, grace_s if child.returncode is None else 0.0)
    status = child.returncode
    if status is None:  # not even SIGKILL ends it: it hangs in the kernel
        return 128 + signal.SIGKILL
    return status if status >= 0 else 128 - status


def _end_all(child: subprocess.Popen[bytes], grace_s: float) -> None:
    """End the command's process group and everything else below us, and reap it."""
    signals = ((signal.SIGTERM, grace_s), (signal.SIGKILL, _KILLED_S))
    for number, limit_s in signals if grace_s else signals[1:]:
        deadline = time.monotonic() + limit_s
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        while time.monotonic() < deadline:
            child.poll()
            others = [pid for pid in _children() if pid != child.pid]
            if child.returncode is not None:
                for pid in others:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, number)
                    with contextlib.suppress(ChildProcessError):
                        os.waitpid(pid, os.WNOHANG)
                if not others:
                    return
            time.sleep(_POLL_S)


def _children() -> list[int]:
    """Our children, those that have ended and were not reaped included."""
    listed = pathlib.Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    return [int(pid) for pid in listed.split()]


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
