"""How many tokens of prompts are computed between two steps of a running batch."""

from math import inf

SMOOTHING = 0.2  # share of the latest measurement in the speed
LEAST_SHARE = 0.1  # share of a time that is left for tokens beyond the shortest prompt, at least
LEAST_TOKENS = 8  # so that a prompt gets on however slow a model is


class PrefillBudget:
    """Tokens of prompts that may be computed while running requests wait, by the measured speed.

    Args:
        stall_s: Time that running requests may wait, in seconds.

    Attributes:
        least_s: Time of the shortest prompt: launches, and the reading of the weights.
    """

    def __init__(self, stall_s: float) -> None:
        self._stall_s, self.least_s = stall_s, 0.0
        self._seconds_per_token: float | None = None

    def measured(self, tokens: int, seconds: float) -> None:
        """Note the time of a part of a prompt."""
        latest = max(seconds - self.least_s, LEAST_SHARE * seconds) / tokens
        before = self._seconds_per_token
        self._seconds_per_token = latest if before is None else before + SMOOTHING * (latest - before)

    def tokens(self, limited: bool) -> float:
        """Return how many tokens may be computed now; infinity if nothing waits for them."""
        if not limited or not self._seconds_per_token:
            return inf
        seconds = max(self._stall_s - self.least_s, LEAST_SHARE * self._stall_s)
        return max(LEAST_TOKENS, int(seconds / self._seconds_per_token))
