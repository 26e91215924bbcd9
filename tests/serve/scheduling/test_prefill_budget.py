"""Tokens of prompts between two steps."""

from math import inf

import pytest

from accel.serve.scheduling.prefill_budget import LEAST_TOKENS, PrefillBudget


def test_follows_the_speed() -> None:
    """Without a measurement, or where nothing waits, there is no limit; a slow model still gets on."""
    budget = PrefillBudget(0.1)
    assert budget.tokens(True) == inf
    budget.measured(100, 0.1)  # 1 ms a token
    assert budget.tokens(False) == inf
    assert budget.tokens(True) == 100
    budget.measured(10, 0.06)  # 6 ms a token: a fifth of it counts
    assert budget.tokens(True) == pytest.approx(50, abs=1)
    for _ in range(50):
        budget.measured(1, 1.0)
    assert budget.tokens(True) == LEAST_TOKENS


def test_time_of_the_shortest_prompt() -> None:
    """It is no time of tokens, of which there are more where it leaves less."""
    budget = PrefillBudget(0.1)
    budget.least_s = 0.02
    budget.measured(100, 0.12)  # 1 ms a token beyond the shortest
    assert budget.tokens(True) == 80
    budget.least_s = 1.0
    assert budget.tokens(True) == 10
