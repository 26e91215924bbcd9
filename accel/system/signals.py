"""Signals that end a run: an exception in the main thread, raised where it can do no harm."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SIGNALED = 128  # exit code of a program that a signal ended, less the signal's number


def notice(signum: int) -> str:
    """Return the line that a person sees."""
    return f"interrupted by {signal.Signals(signum).name}"


class Interruption(KeyboardInterrupt):
    """Exception that a signal raises in the main thread.

    Args:
        signum: Number of the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class Interrupter:
    """Handler of signals that raises `Interruption`, or does so later, or ends the process, as it is told.

    Attributes:
        called: Set when the main thread has run the handler.
    """

    def __init__(self) -> None:
        self.called = threading.Event()
        self._depth = 0
        self._pending: int | None = None
        self._at_once = False

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        """Handle a signal: `signal.signal` takes this."""
        self.called.set()
        if self._at_once:
            os.write(2, f"{notice(signum)}\n".encode())
            os._exit(SIGNALED + signum)
        if self._depth:
            self._pending = signum
        else:
            raise Interruption(signum)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Open a context where there is nothing to leave, such as imports: a signal ends the process at once.

        An exception would leave modules half imported, whose functions fail when Python calls them at exit.
        """
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def by_exception(self) -> None:
        """Let signals raise an exception from now on, in a context of `at_once` too: there is something to leave."""
        self._at_once = False

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Open a context of the main thread that a signal ends at its end only."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            pending, self._pending = self._pending, None
            if pending is not None:
                raise Interruption(pending)


interrupter = Interrupter()  # the process has one handler per signal


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Open a context in which processes are started: signals take effect after it, and never in those processes.

    The processes inherit that `SIGNALS` are blocked: this one is interrupted, and ends them.
    """
    if threading.current_thread() is not threading.main_thread():
        with _blocked():
            yield
        return
    with interrupter.deferred(), _blocked():
        yield


@contextmanager
def _blocked() -> Iterator[None]:
    """Block `SIGNALS` in this thread, and in processes that it starts."""
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # as it starts, Python unblocks these signals
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
