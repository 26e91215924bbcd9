"""Permission to run Python code that a checkpoint's folder brings along, which nothing but the user grants.

The permission holds within a block and for one thread: code that isn't inside `allowing(True)` is refused, so a call
that forgets to ask is safe.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_allowed: ContextVar[bool] = ContextVar("accel_remote_code_allowed", default=False)


def is_allowed() -> bool:
    """Return whether code in a checkpoint's folder may run here."""
    return _allowed.get()


@contextmanager
def allowing(allowed: bool) -> Iterator[None]:
    """Set the permission for the block, and restore the one before at its end."""
    token = _allowed.set(allowed)
    try:
        yield
    finally:
        _allowed.reset(token)


def set_for_process(allowed: bool) -> None:
    """Set the permission of a worker process's main thread, for as long as the process lives."""
    _allowed.set(allowed)
