"""Ctrl-C and SIGTERM: the first one unwinds the run, the second one ends the process at once."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SIGNALED = 128  # exit code of a program that a signal ended, less the signal's number


class Interruption(KeyboardInterrupt):
    """Exception that a signal raises in the main thread.

    Args:
        signum: Number of the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


@contextmanager
def one_line_exit() -> Iterator[None]:
    """Open a context that a signal ends with one line and exit code 130 (Ctrl-C) or 143 (SIGTERM).

    Contexts inside are left first, which removes temporary folders and worker processes. Does nothing outside the main
    thread, where Python allows no signal handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {signum: signal.signal(signum, _interrupt) for signum in SIGNALS}
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    wakeup = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_end_at_second, args=(receiver,), daemon=True).start()
    try:
        yield
    except KeyboardInterrupt as error:
        signum = error.signum if isinstance(error, Interruption) else signal.SIGINT
        print(f"interrupted by {signal.Signals(signum).name}", file=sys.stderr)
        sys.exit(SIGNALED + signum)
    finally:
        signal.set_wakeup_fd(wakeup)
        for signum, handler in previous.items():
            signal.signal(signum, handler)
        sender.close()  # ends the thread


def _interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    """Raise `Interruption` in the main thread, once it runs Python code."""
    raise Interruption(signum)


def _end_at_second(receiver: socket.socket) -> None:
    """End the process and its children at the second signal, also while the main thread is busy outside Python.

    Args:
        receiver: Receives the number of each signal as a byte, at the moment it arrives.
    """
    received = 0
    while number := receiver.recv(1):
        received += number[0] in SIGNALS
        if received == 2:
            _kill_children()
            os._exit(SIGNALED + number[0])
    receiver.close()


def _kill_children() -> None:
    """Kill all processes that this one started."""
    import psutil

    for child in psutil.Process().children(recursive=True):
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
