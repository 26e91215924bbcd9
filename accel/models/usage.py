"""Bookkeeping of calls in progress, so that a model can be used from several threads and closed at any time."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from threading import Condition, RLock


class Usage:
    """Count the calls in progress of one model.

    Args:
        exclusive: Let calls take turns, as on runtimes whose decode steps share buffers; otherwise they run in
            parallel.
    """

    def __init__(self, exclusive: bool) -> None:
        self._condition = Condition()
        self._turn = RLock() if exclusive else nullcontext()
        self._calls = 0
        self._closed = False

    @contextmanager
    def call(self) -> Iterator[None]:
        """Return a context for one call.

        Raises:
            RuntimeError: The model is closed.
        """
        with self._condition:
            if self._closed:
                raise RuntimeError("this model is closed: open its folder again with accel.load")
            self._calls += 1
        try:
            with self._turn:
                yield
        finally:
            with self._condition:
                self._calls -= 1
                self._condition.notify_all()

    def close(self) -> bool:
        """Refuse further calls and wait for those in progress; return False if that happened before."""
        with self._condition:
            if self._closed:
                return False
            self._closed = True
            self._condition.wait_for(lambda: self._calls == 0)
            return True
