"""Lengths of static caches."""

from collections.abc import Sequence


class Buckets:
    """Lengths that a static cache may have: those configured, then powers of 2 and the means between them.

    Args:
        lengths: The first lengths, in decoder tokens.
        limit: Number of positions of the model, beyond which no static cache is made; None without such a limit.
    """

    def __init__(self, lengths: Sequence[int], limit: int | None = None) -> None:
        self.lengths, self.limit = sorted(lengths), limit

    def smallest(self, tokens: int) -> int | None:
        """Return the shortest length for `tokens` tokens; None if they exceed the limit."""
        if self.limit is not None and tokens > self.limit:
            return None
        length = next((length for length in self.lengths if length >= tokens), None)
        if length is None:
            power = 1 << (tokens - 1).bit_length()  # the smallest power of 2 that is long enough
            length = power if tokens > power * 3 // 4 else power * 3 // 4
        return length if self.limit is None else min(length, self.limit)
