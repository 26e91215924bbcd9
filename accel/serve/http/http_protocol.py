"""Uvicorn's HTTP protocol with limits on clients that are slow or send endless heads, which uvicorn doesn't set.

It is the one over httptools: over h11, which is written in Python, an event of a stream takes about twice the CPU time.
"""

import asyncio
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD = 64 * 1024  # bytes of a request's head, as far as they arrive before its end


class LimitedProtocol(HttpToolsProtocol):
    """HTTP/1.1 over one connection, with limits on slow clients and on heads.

    Attributes:
        head_timeout_s: See `limited_protocol`.
        unread_timeout_s: Likewise.
    """

    head_timeout_s: ClassVar[float]
    unread_timeout_s: ClassVar[float]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._head_timer: asyncio.TimerHandle | None = None
        self._unread_timer: asyncio.TimerHandle | None = None
        self._in_head, self._head_bytes = False, 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin a connection."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # hear of every byte that the client's system doesn't take
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """Take bytes of a request."""
        super().data_received(data)
        self._head_bytes = self._head_bytes + len(data) if self._in_head else 0
        if self._head_bytes > MAX_HEAD and not self.transport.is_closing():
            self.send_400_response("The head of the request is too long.")
        self._await_head()

    def on_message_begin(self) -> None:
        """Begin a request."""
        super().on_message_begin()
        self._in_head = True

    def on_headers_complete(self) -> None:
        """End a request's head."""
        self._in_head = False
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        """End a request."""
        super().on_response_complete()
        self._await_head()

    def _await_head(self) -> None:
        """Run the timer of the head while no request is in progress."""
        waiting = self.cycle is None or self.cycle.response_complete
        if not waiting and self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        elif waiting and self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_timeout_s, self._cut)

    def pause_writing(self) -> None:
        """Note that the client has fallen behind."""
        super().pause_writing()
        if self._unread_timer is None:
            self._unread_timer = self.loop.call_later(self.unread_timeout_s, self._cut)

    def resume_writing(self) -> None:
        """Note that the client has read everything."""
        super().resume_writing()
        self._stop_unread_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the connection."""
        super().connection_lost(exc)
        self._stop_unread_timer()
        if self._head_timer is not None:
            self._head_timer.cancel()

    def _stop_unread_timer(self) -> None:
        """Stop the timer of unread bytes."""
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None

    def _cut(self) -> None:
        """Close the connection at once: `close` would wait for the client to read."""
        self.transport.abort()


def limited_protocol(head_timeout_s: float, unread_timeout_s: float) -> type[LimitedProtocol]:
    """Return a protocol class that cuts the connections of slow clients; uvicorn makes an object of it for each.

    Args:
        head_timeout_s: Seconds within which the head of a request must arrive, counted from the connection or the end
            of the reply before. A client that sends it byte by byte holds a connection for no longer.
        unread_timeout_s: Seconds that sent bytes may stay unread, once the buffers of both systems are full.
    """
    limits = {"head_timeout_s": head_timeout_s, "unread_timeout_s": unread_timeout_s}
    return type("LimitedProtocol", (LimitedProtocol,), limits)
