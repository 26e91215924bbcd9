"""Calls on event loops from other threads."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Call = Callable[[], None]
Waiting = dict[asyncio.AbstractEventLoop, list[Call]]

_thread = threading.local()  # `waiting`: the calls that wait for the end of `batched`


@contextmanager
def batched() -> Iterator[None]:
    """Context in which `call` makes this thread's calls at the end, all of a loop at once.

    Waking a loop is a system call, at which the thread gives up the interpreter's lock. It gets the lock back when the
    loop's thread waits or has had it for `sys.getswitchinterval()`. So a step that wakes a loop for each of its rows
    may take longer than its computation.
    """
    waiting: Waiting = {}
    _thread.waiting = waiting
    try:
        yield
    finally:
        del _thread.waiting
        for loop, calls in waiting.items():
            _wake(loop, calls)


def call(loop: asyncio.AbstractEventLoop, function: Call) -> None:
    """Call a function on a loop, from any thread; of no effect if the loop is closed."""
    waiting: Waiting | None = getattr(_thread, "waiting", None)
    if waiting is None:
        _wake(loop, [function])
    else:
        waiting.setdefault(loop, []).append(function)


def _wake(loop: asyncio.AbstractEventLoop, calls: list[Call]) -> None:
    """Let a loop make calls, unless it is closed."""

    def schedule() -> None:
        for each in calls:
            loop.call_soon(each)  # one that raises stops no other

    try:
        loop.call_soon_threadsafe(schedule)
    except RuntimeError:  # the loop is closed, and nobody waits for these calls
        return
