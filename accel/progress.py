"""Progress of long computations: messages, the stage that runs, and how many of its items are done.

The library reports here and prints nothing. The command line installs a listener that displays it; without one,
messages go to the logger `accel.progress` at level INFO.
"""

import logging
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, TypeVar

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Listener(Protocol):
    """Display of progress."""

    def note(self, message: str) -> None:
        """Display a message."""
        ...

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Return a context during which stage `name` is displayed as running."""
        ...

    def track(self, items: Iterable[T], description: str, total: int | None) -> Iterator[T]:
        """Yield `items`, and display how many are done, of `total` if that is known."""
        ...


_listener: Listener | None = None


def install(listener: Listener | None) -> None:
    """Display the progress of this process by `listener`, or by nothing if it is None."""
    global _listener
    _listener = listener


def note(message: str) -> None:
    """Report a message."""
    if _listener is not None:
        _listener.note(message)
    else:
        logger.info(message)


def stage(name: str) -> AbstractContextManager[None]:
    """Return a context during which stage `name` is reported as running."""
    return _listener.stage(name) if _listener is not None else nullcontext()


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield `items`, and report how many are done.

    Args:
        items: The items.
        description: What is being done, such as "generating".
        total: Number of items, where `items` has no length.
    """
    if _listener is None:
        yield from items
    else:
        yield from _listener.track(items, description, total)
