"""Beginnings that several prompts share, such as a system prompt: computed once, then reused."""

from collections import deque
from dataclasses import dataclass

from torch import Tensor

from accel.models.prompt_cache import PromptCache

LEAST = 32  # tokens: shorter beginnings are computed again
MULTIPLE = 16  # tokens: beginnings are cut to a multiple, so that one isn't kept for every common word that follows
RECENT = 16  # prompts that a new one is compared with


@dataclass(frozen=True, eq=False)
class Beginning:
    """How a prompt begins among others.

    Attributes:
        cache: Cache of tokens that it begins with; None without one.
        boundary: Number of its tokens behind which its caches are kept for other prompts; 0 for none.
    """

    cache: PromptCache | None = None
    boundary: int = 0

    @property
    def alone(self) -> bool:
        """True if it shares nothing with others."""
        return self.cache is None and not self.boundary


class SharedPrefixes:
    """Prompt caches of beginnings that at least two recent prompts share, the one used last at the end.

    Args:
        capacity: Number of caches kept; 0 for none.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._caches: list[PromptCache] = []
        self._recent: deque[Tensor] = deque(maxlen=RECENT)

    def beginning(self, prompt: Tensor) -> Beginning:
        """Return how a prompt [1, length] begins. Later ones are compared with it."""
        if prompt.shape[1] <= LEAST:  # too short to share that many tokens, and have one of its own
            return Beginning()
        cache = self.find(prompt)
        return Beginning(cache, self.boundary(prompt, cache))

    def find(self, prompt: Tensor) -> PromptCache | None:
        """Return the cache that shares most tokens with a prompt [1, length]; None if no beginning is long enough."""
        best = max(self._caches, key=lambda cache: common(cache.ids, prompt), default=None)
        if best is None or min(common(best.ids, prompt), prompt.shape[1] - 1) < LEAST:
            return None
        self._caches = [*(cache for cache in self._caches if cache is not best), best]
        return best

    def boundary(self, prompt: Tensor, found: PromptCache | None) -> int:
        """Return behind how many tokens of a prompt [1, length] a cache is to be kept; 0 if it isn't worth it.

        Args:
            prompt: The prompt, which later ones are compared with.
            found: What `find` has found for it.
        """
        if not self._capacity:
            return 0
        shared = max((common(other, prompt) for other in self._recent), default=0)
        self._recent.append(prompt)
        shared = min(shared, prompt.shape[1] - 1) // MULTIPLE * MULTIPLE
        known = 0 if found is None else common(found.ids, prompt)
        return shared if shared >= max(LEAST, known + MULTIPLE) else 0

    def keep(self, cache: PromptCache) -> None:
        """Keep a cache; drop the one that wasn't used for longest if there are too many."""
        self._caches = [*self._caches, cache][-self._capacity :]


def common(first: Tensor, second: Tensor) -> int:
    """Return the number of tokens that two prompts [1, length] begin with alike."""
    length = min(first.shape[1], second.shape[1])
    differs = (first[0, :length] != second[0, :length]).nonzero()
    return int(differs[0]) if len(differs) else length
