"""What a thread hands over to others, all of a batch at once: calls on event loops, messages to other processes."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

Call = Callable[[], None]
Deliver = Callable[[list[Any]], None]
Waiting = dict[Deliver, list[Any]]

_thread = threading.local()  # `waiting`: what waits for the end of `batched`


@contextmanager
def batched() -> Iterator[None]:
    """Context in which `hand_over` and `call` deliver this thread's items at the end, all of a receiver at once.

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
        for deliver, items in waiting.items():
            deliver(items)


def hand_over(deliver: Deliver, item: Any) -> None:
    """Deliver an item, with others of the same `deliver` within `batched`.

    Args:
        deliver: Takes items, from any thread. It must return at once and never raise.
        item: The item.
    """
    waiting: Waiting | None = getattr(_thread, "waiting", None)
    if waiting is None:
        deliver([item])
    else:
        waiting.setdefault(deliver, []).append(item)


def call(loop: asyncio.AbstractEventLoop, function: Call) -> None:
    """Call a function on a loop, from any thread; of no effect if the loop is closed."""
    hand_over(_Wake(loop), function)


@dataclass(frozen=True)
class _Wake:
    """Lets a loop make calls, unless it is closed.

    Attributes:
        loop: The loop.
    """

    loop: asyncio.AbstractEventLoop

    def __call__(self, calls: list[Call]) -> None:
        """Wake the loop once for all calls."""

        def schedule() -> None:
            for each in calls:
                self.loop.call_soon(each)  # one that raises stops no other

        try:
            self.loop.call_soon_threadsafe(schedule)
        except RuntimeError:  # the loop is closed, and nobody waits for these calls
            return
