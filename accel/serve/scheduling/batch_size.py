"""Size of a running batch: as few rows, as short as its requests need, because a step takes the time of all of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from accel.models.rows import Rows
from accel.runtime.buckets import Buckets

SHORTEST_SOURCE = 16  # tokens; doubled until an input fits
PATIENCE = 16  # steps that a smaller size has to do before the batch moves to it


@dataclass(frozen=True)
class BatchSize:
    """Number and lengths of rows.

    Attributes:
        rows: Number of rows.
        tokens: Decoder tokens that each holds.
        source: Longest input of an encoder, in tokens.
    """

    rows: int
    tokens: int
    source: int

    def covers(self, other: "BatchSize") -> bool:
        """Return whether this size is at least the other one in every respect."""
        return self.rows >= other.rows and self.tokens >= other.tokens and self.source >= other.source


class Sizing:
    """Decides when a running batch moves to another size.

    It grows at once. It shrinks when a smaller size would have done for as long as the latest moves took, and for
    `PATIENCE` steps or while it is empty, so that requests that come and go don't move it to and fro. A move to a size
    that has to be captured first takes longer than hundreds of steps.

    Args:
        most_rows: Largest number of rows.
        allowed: Numbers of rows that the runtime was captured for; empty for any.
        buckets: Lengths of rows.
    """

    def __init__(self, most_rows: int, allowed: Sequence[int], buckets: Buckets) -> None:
        powers = [1 << exponent for exponent in range(most_rows.bit_length()) if 1 << exponent < most_rows]
        self.choices = [size for size in allowed if size <= most_rows] or [*powers, most_rows]
        self._buckets = buckets
        self._roomy_steps, self._roomy_since = 0, inf
        self._move_s = 0.0

    def moved(self, seconds: float) -> None:
        """Note how long a move took. Of longer ones before, half of the time is remembered at each."""
        self._move_s = max(seconds, self._move_s / 2)

    def emptied(self, at: float) -> None:
        """Note since when there is no request in the batch, in seconds on any clock."""
        self._roomy_since = min(self._roomy_since, at)

    def rounded(self, rows: int, tokens: int, source: int) -> BatchSize:
        """Return the smallest size for so many rows and tokens.

        Raises:
            ValueError: The model has fewer positions.
        """
        bucket = self._buckets.smallest(tokens)
        if bucket is None:
            raise ValueError(f"{tokens} tokens: the model has {self._buckets.limit} positions")
        source_length = SHORTEST_SOURCE
        while source_length < source:
            source_length *= 2
        return BatchSize(next(size for size in self.choices if size >= rows), bucket, source_length)

    def next(self, now: Rows, needed: BatchSize, empty: bool, at: float) -> BatchSize:
        """Return the size for the next step.

        Args:
            now: The rows.
            needed: Smallest size that is enough.
            empty: True if no request is decoded yet.
            at: Present time, in seconds on the clock of `emptied`.
        """
        present = BatchSize(now.capacity, now.max_length, now.source_length)
        if needed == present or not present.covers(needed):
            self._roomy_steps, self._roomy_since = 0, inf
            pairs = zip(_values(present), _values(needed), strict=True)
            return needed if empty else BatchSize(*(max(pair) for pair in pairs))
        self._roomy_steps, self._roomy_since = self._roomy_steps + 1, min(self._roomy_since, at)
        pays = at - self._roomy_since >= self._move_s
        return needed if pays and (empty or self._roomy_steps >= PATIENCE) else present


def _values(size: BatchSize) -> tuple[int, int, int]:
    """Return the three numbers of a size."""
    return size.rows, size.tokens, size.source
