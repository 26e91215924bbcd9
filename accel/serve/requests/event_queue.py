"""Events of a scheduler's thread, handed to the event loop."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress

from accel.serve.protocol import Event, Finished, Listener, Tokens


class EventQueue:
    """Events of the sequences of one HTTP request, from any thread to its event loop.

    Args:
        max_tokens: Tokens that may wait here.
        coalesce_s: Seconds after some events were taken, in which further ones are gathered.
        overflow: Called once on the event loop when more do.
    """

    def __init__(self, max_tokens: int, coalesce_s: float, overflow: Callable[[], None]) -> None:
        self._max_tokens, self._coalesce_s, self._overflow = max_tokens, coalesce_s, overflow
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._events: list[tuple[int, Event]] = []
        self._tokens = 0
        self._overflowed = False
        self._arrived, self._finished = asyncio.Event(), asyncio.Event()
        self._last_taken = -coalesce_s

    def listener(self, index: int) -> Listener:
        """Return the listener of the request's sequence `index`."""

        def listen(event: Event) -> None:
            with self._lock:
                wake = not self._events
                if not self._overflowed:
                    self._events.append((index, event))
                self._tokens += len(event.ids) if isinstance(event, Tokens) else 0
                overflows = self._tokens > self._max_tokens and not self._overflowed
                self._overflowed |= overflows
            if overflows:
                self._call(self._overflow)
            if wake:
                self._call(self._arrived.set)
            if isinstance(event, Finished):
                self._call(self._finished.set)

        return listen

    def _call(self, function: Callable[[], None]) -> None:
        """Call `function` on the event loop, unless the server has ended."""
        try:
            self._loop.call_soon_threadsafe(function)
        except RuntimeError:  # the loop is closed, and nobody waits for these events
            return

    async def take(self) -> list[tuple[int, Event]]:
        """Wait for events, and return all that there are, with the numbers of their sequences.

        The first events of all are returned at once, and the last event of a sequence doesn't wait for others. All
        between are gathered for `coalesce_s`, as a reply of many small parts costs more than one of few.
        """
        await self._arrived.wait()
        pause = self._last_taken + self._coalesce_s - self._loop.time()
        if pause > 0:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._finished.wait(), pause)
        with self._lock:
            events, self._events = self._events, []
            self._tokens = 0
            self._arrived.clear()
            self._finished.clear()
        self._last_taken = self._loop.time()
        return events
