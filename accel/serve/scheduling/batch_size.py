"""Size of a running batch: as few rows, as short as its requests need, because a step takes the time of all of it."""

from collections.abc import Sequence
from dataclasses import dataclass

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

    It grows at once. It shrinks when it is empty, or when `PATIENCE` steps in a row would have been possible in a
    smaller size, so that requests that come and go don't move it to and fro.

    Args:
        most_rows: Largest number of rows.
        allowed: Numbers of rows that the runtime was captured for; empty for any.
        buckets: Lengths of rows.
    """

    def __init__(self, most_rows: int, allowed: Sequence[int], buckets: Buckets) -> None:
        powers = [1 << exponent for exponent in range(most_rows.bit_length()) if 1 << exponent < most_rows]
        self.choices = [size for size in allowed if size <= most_rows] or [*powers, most_rows]
        self._buckets = buckets
        self._roomy_steps = 0

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

    def next(self, now: Rows, needed: BatchSize, empty: bool) -> BatchSize:
        """Return the size for the next step.

        Args:
            now: The rows.
            needed: Smallest size that is enough.
            empty: True if no request is decoded yet.
        """
        present = BatchSize(now.capacity, now.max_length, now.source_length)
        if empty:
            return needed
        if not present.covers(needed):
            self._roomy_steps = 0
            return BatchSize(*(max(pair) for pair in zip(_values(present), _values(needed), strict=True)))
        self._roomy_steps = 0 if needed == present else self._roomy_steps + 1
        return needed if self._roomy_steps >= PATIENCE else present


def _values(size: BatchSize) -> tuple[int, int, int]:
    """Return the three numbers of a size."""
    return size.rows, size.tokens, size.source
