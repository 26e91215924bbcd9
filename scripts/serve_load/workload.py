"""Requests of a load: random prompts, each with a number of new tokens."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

FIRST_ID = 3  # ids below are special ones in most vocabularies


@dataclass(frozen=True)
class Work:
    """A request.

    Attributes:
        prompt: Token ids.
        new_tokens: Number of new tokens that the reply has.
    """

    prompt: list[int]
    new_tokens: int


def random_work(
    count: int, vocabulary: int, prompt_tokens: Sequence[int], new_tokens: Sequence[int], seed: int = 0
) -> list[Work]:
    """Return requests of random ids.

    Args:
        count: Number of requests.
        vocabulary: Number of ids that a prompt may have.
        prompt_tokens: Fewest and most tokens of a prompt; lengths are uniform between them.
        new_tokens: Fewest and most new tokens, likewise.
        seed: Seed of all of it.
    """
    source = random.Random(seed)  # noqa: S311  # a load, no secrets
    return [
        Work(
            [source.randrange(FIRST_ID, vocabulary) for _ in range(source.randint(*prompt_tokens))],
            source.randint(*new_tokens),
        )
        for _ in range(count)
    ]


def arrival_times(count: int, rate: float, seed: int = 0) -> list[float]:
    """Return when requests of a Poisson process arrive, in seconds: gaps are exponentially distributed.

    Args:
        count: Number of requests.
        rate: Requests a second, on average.
        seed: Seed.
    """
    source = random.Random(seed)  # noqa: S311  # a load, no secrets
    times, now = [], 0.0
    for _ in range(count):
        now += source.expovariate(rate)
        times.append(now)
    return times
