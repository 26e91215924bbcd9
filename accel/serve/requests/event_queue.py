"""Events of a scheduler's thread, handed to the event loop."""

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from accel.serve import loop_calls
from accel.serve.protocol import Event, Finished, Listener, TokenLogprobs, Tokens


@dataclass
class Arrivals:
    """Events of one sequence, taken together.

    Attributes:
        index: Number of the sequence in its HTTP request.
        ids: New tokens.
        logprobs: One for each of them where the request asked for them, else empty.
        times: When the first and the last of them came, on `time.monotonic`'s clock; empty without tokens.
        end: The last event of the sequence, if it has come.
    """

    index: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    times: tuple[float, ...] = ()
    end: Finished | None = None

    def add(self, event: Event) -> None:
        """Add an event."""
        if isinstance(event, Tokens):
            self.ids += event.ids
            self.logprobs += event.logprobs
            self.times = (*self.times[:1], time.monotonic())
        else:
            self.end = event


class EventQueue:
    """Events of the sequences of one HTTP request, from any thread to its event loop, by `loop_calls.call`.

    Args:
        max_tokens: Tokens that may wait here.
        coalesce_s: Seconds after some events were taken, in which further ones are gathered.
        overflow: Called once on the event loop when more do.
        ends_only: Gather the events of a sequence until its last one, which saves the event loop the turns between.
    """

    def __init__(
        self, max_tokens: int, coalesce_s: float, overflow: Callable[[], None], ends_only: bool = False
    ) -> None:
        self._max_tokens, self._coalesce_s, self._overflow = max_tokens, coalesce_s, overflow
        self._ends_only = ends_only
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._arrivals: dict[int, Arrivals] = {}
        self._tokens = 0
        self._overflowed = False
        self._arrived, self._finished = asyncio.Event(), asyncio.Event()
        self._last_taken = -coalesce_s

    def listener(self, index: int) -> Listener:
        """Return the listener of the request's sequence `index`."""

        def listen(event: Event) -> None:
            ends = isinstance(event, Finished)
            with self._lock:
                wakes = ends if self._ends_only else not self._arrivals
                if ends or not self._overflowed:
                    if index not in self._arrivals:
                        self._arrivals[index] = Arrivals(index)
                    self._arrivals[index].add(event)
                self._tokens += len(event.ids) if isinstance(event, Tokens) else 0
                overflows = self._tokens > self._max_tokens and not self._overflowed
                self._overflowed |= overflows
            if overflows:
                loop_calls.call(self._loop, self._overflow)
            if wakes:
                loop_calls.call(self._loop, self._arrived.set)
            if ends:
                loop_calls.call(self._loop, self._finished.set)

        return listen

    async def take(self) -> list[Arrivals]:
        """Wait for events, and return all that there are, by sequence.

        The first events of all are returned at once, and the last event of a sequence doesn't wait for others. All
        between are gathered for `coalesce_s`, as a reply of many small parts costs more than one of few.
        """
        await self._arrived.wait()
        pause = self._last_taken + self._coalesce_s - self._loop.time()
        if pause > 0:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._finished.wait(), pause)
        with self._lock:
            arrivals, self._arrivals = self._arrivals, {}
            self._tokens = 0
            self._arrived.clear()
            self._finished.clear()
        self._last_taken = self._loop.time()
        return list(arrivals.values())
