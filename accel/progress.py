"""What a long computation tells whoever started it: a line now and then, and how far it is.

The library reports here and prints nothing. The command line installs a listener that shows it; without one, lines go
to the logger `accel.progress` at level INFO.
"""

import logging
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, TypeVar

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Listener(Protocol):
    """Shows progress to a person."""

    def note(self, message: str) -> None:
        """Show one line."""
        ...

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Return a context during which stage `name` is shown to be at work."""
        ...

    def track(self, items: Iterable[T], description: str, total: int | None) -> Iterator[T]:
        """Yield `items` and show how many are done, of `total` if that is known."""
        ...


_listener: Listener | None = None


def install(listener: Listener | None) -> None:
    """Let `listener` show the progress of this process; None: nobody does."""
    global _listener
    _listener = listener


def note(message: str) -> None:
    """Tell one line."""
    if _listener is not None:
        _listener.note(message)
    else:
        logger.info(message)


def stage(name: str) -> AbstractContextManager[None]:
    """Return a context for the work of stage `name`."""
    return _listener.stage(name) if _listener is not None else nullcontext()


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield `items`, and tell how far it is within the stage at work. `total`: how many, where `items` can't say it."""
    if _listener is None:
        yield from items
    else:
        yield from _listener.track(items, description, total)
