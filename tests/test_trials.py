"""When a smaller plan is as good as the one that the rules make."""

import math

import pytest

from accel.trials import Result

KNOWN = Result({"random": [0.03, 0.04], "text": [0.003, 0.004]}, changed=1)


@pytest.mark.parametrize(
    ("errors", "changed", "passes"),
    [
        ({"random": [0.03, 0.04], "text": [0.003, 0.004]}, 1, True),
        ({"random": [0.04, 0.03], "text": [0.004, 0.0045]}, 0, True),  # calls may differ where the kind doesn't
        ({"random": [0.03, 0.04], "text": [0.006, 0.008]}, 1, False),  # text got worse, and random ids don't hide it
        ({"random": [0.03, 0.04], "text": [0.003, 0.004]}, 2, False),
        ({"random": [0.03, math.inf], "text": [0.003, 0.004]}, 0, False),
        ({"random": [math.inf]}, 0, False),  # it stopped there
    ],
)
def test_as_good_as_the_rules_plan(errors: dict[str, list[float]], changed: int, passes: bool) -> None:
    """Within a quarter of its distance from FP32 on each kind of input, with no more tokens changed, and finite."""
    assert Result(errors, changed).within(KNOWN) == passes


def test_errors_of_a_kind_are_pooled() -> None:
    """By the root of their mean square, so that one call far off counts more than many a little."""
    assert KNOWN.error("random") == pytest.approx(math.sqrt((9 + 16) / 2) / 100)
