"""Errors of tokens: the same as computed at once, in whatever blocks."""

import pytest
import torch

from accel.evaluation import compare
from accel.evaluation.compare import token_errors


@pytest.mark.parametrize("at_once", [1, 100, 2**17])
@pytest.mark.parametrize("shape", [(2, 5, 300), (3, 4, 7, 8), (1, 1, 9)], ids=["logits", "cache", "one"])
def test_blocks_change_nothing(shape: tuple[int, ...], at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one token, of several that don't divide their number, and of all; NaN spreads to its own token only."""
    monkeypatch.setattr(compare, "VALUES_AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    found = torch.randn(shape, generator=generator)
    expected = torch.randn(shape, generator=generator, dtype=torch.float64)
    found[(0, *[0] * (len(shape) - 3), -1, 0)] = torch.nan
    direct = (found.double() - expected).abs().movedim(-2, 1).flatten(2).amax(2)  # [rows, tokens]
    errors = token_errors(found, expected)
    assert torch.equal(errors.isnan(), direct.isnan())
    assert errors.isnan().sum() == 1
    assert torch.equal(errors.nan_to_num(), direct.nan_to_num())


def test_a_cache_without_tokens_has_no_errors() -> None:
    """A cache of length 0 has no value to compare."""
    assert token_errors(torch.zeros(2, 4, 0, 8), torch.zeros(2, 4, 0, 8)).shape == (2, 0)
