"""Search for stop strings in text that arrives in pieces."""

from collections.abc import Sequence


class StopStrings:
    """Passes text on up to the stop string that is complete first, which may lie across pieces.

    Args:
        stops: The strings, none of them empty.

    Attributes:
        any: There are stop strings.
        found: A stop string was found; no text comes after it.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self.any = stops, bool(stops)
        self._held = ""  # end of the text, which may be the beginning of a stop string
        self.found = False

    def add(self, text: str) -> str:
        """Return the text that can't belong to a stop string any more."""
        if self.found:
            return ""
        held = self._held + text
        found = [(place + len(stop), place) for stop in self._stops if (place := held.find(stop)) >= 0]
        if found:
            self.found, self._held = True, ""
            return held[: min(found)[1]]
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def finish(self) -> str:
        """Return the text that was held back, as none comes after it."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that `stop` begins with."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
