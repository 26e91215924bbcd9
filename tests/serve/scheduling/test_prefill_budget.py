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
