"""Ctrl-C and SIGTERM: the first one unwinds the run, the second one ends the process at once."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from accel.system.signals import SIGNALED, SIGNALS, Interruption, interrupter, notice

REPEAT_S, REPEATS = 0.2, 5  # how often a signal is sent again to a main thread that hasn't noticed it


@contextmanager
def one_line_exit() -> Iterator[None]:
    """Open a context that a signal ends with one line and exit code 130 (Ctrl-C) or 143 (SIGTERM).

    Contexts inside are left first, which removes temporary folders and worker processes. Does nothing outside the main
    thread, where Python allows no signal handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    interrupter.called.clear()
    wakeup = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    hook = sys.unraisablehook
    previous: dict[signal.Signals, Any] = {signum: signal.getsignal(signum) for signum in SIGNALS}
    try:
        for signum in SIGNALS:
            signal.signal(signum, interrupter)
        sys.unraisablehook = partial(_notice_ignored, hook)
        threading.Thread(target=_watch, args=(receiver,), daemon=True).start()
        yield
    except KeyboardInterrupt as error:
        number = error.signum if isinstance(error, Interruption) else signal.SIGINT
        previous = dict.fromkeys(SIGNALS, signal.SIG_DFL)  # another one ends what Python does at exit, without a word
        print(notice(number), file=sys.stderr)
        sys.exit(SIGNALED + number)
    finally:
        sys.unraisablehook = hook
        signal.set_wakeup_fd(wakeup)
        for signum, handler in previous.items():
            signal.signal(signum, handler)
        sender.close()  # ends the thread


def _notice_ignored(hook: Callable[[Any], Any], unraisable: Any) -> None:
    """Have a signal sent again whose exception was raised in a destructor or callback, where Python drops it.

    Args:
        hook: Reports all other dropped exceptions.
        unraisable: As for `sys.unraisablehook`.
    """
    if isinstance(unraisable.exc_value, Interruption):
        interrupter.called.clear()
    else:
        hook(unraisable)


def _watch(receiver: socket.socket) -> None:
    """See to it that the first signal reaches the main thread, and end the process and its children at the second.

    The main thread doesn't notice a signal that arrives while it begins to wait for a lock; sent again, the signal
    interrupts the wait. The second one works also while the main thread is busy outside Python.

    Args:
        receiver: Receives the number of each signal as a byte, at the moment it arrives.
    """
    received = repeated = signum = 0
    main = threading.main_thread()
    while True:
        try:
            number = receiver.recv(1)
        except TimeoutError:
            if not interrupter.called.is_set() and repeated < REPEATS and main.ident is not None:
                signal.pthread_kill(main.ident, signum)
                repeated += 1
            continue
        if not number:
            break
        signum = number[0]
        received += signum in SIGNALS
        if received - repeated >= 2:
            _kill_children()
            os._exit(SIGNALED + signum)
        if signum in SIGNALS:
            receiver.settimeout(REPEAT_S)
    receiver.close()


def _kill_children() -> None:
    """Kill all processes that this one started."""
    import psutil

    for child in psutil.Process().children(recursive=True):
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
