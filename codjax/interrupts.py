"""Ctrl-C: the first one ends a command in good order, the second at once."""

from __future__ import annotations

import os
import signal
import socket
import threading

_TWICE = b"\ncodjax: interrupted twice; ended at once.\n"


def take(status: int) -> None:
    """Take SIGINT for this process, from the main thread; nothing under nohup, which ignores it.

    The first raises KeyboardInterrupt, as usual. Python runs handlers between two of its own
    instructions only, so the second is noticed by a thread: it ends the process also where the main
    thread hangs in a collective, a compilation or a write.

    Args:
        status: exit status of a process that is ended at once.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)  # as `set_wakeup_fd` insists
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    threading.Thread(
        target=_watch, args=(reader, writer, status), name="interrupts", daemon=True
    ).start()


def _watch(reader: socket.socket, writer: socket.socket, status: int) -> None:
    """Counts the signals that arrive."""
    count = 0
    while writer.fileno() >= 0:  # for ever: it is held here, so that it stays open
        count += sum(number == signal.SIGINT for number in reader.recv(64))
        if count >= 2:
            os.write(2, _TWICE)
            os._exit(status)
