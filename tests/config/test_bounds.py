"""Numbers out of bounds are named by their key, with the bounds."""

import math
from typing import Any

import pytest

from accel.config import bounds
from accel.config.schema import BenchmarkConfig, RuntimeConfig
from accel.errors import AccelError


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (BenchmarkConfig(warmup=-1), r"benchmark\.warmup=-1: must be from 0 to 1000000"),
        (BenchmarkConfig(warmup_tokens=0), r"benchmark\.warmup_tokens=0: must be from 1"),
        (BenchmarkConfig(time_budget_s=-1.0), r"benchmark\.time_budget_s=-1\.0: must be from"),
        (BenchmarkConfig(time_budget_s=math.nan), r"benchmark\.time_budget_s=nan: nan is no number"),
        (BenchmarkConfig(repeats=10**9), r"benchmark\.repeats=1000000000: must be from 1 to 1000000"),
    ],
)
def test_number_out_of_bounds(section: BenchmarkConfig, message: str) -> None:
    bounds.check(BenchmarkConfig(), "benchmark")
    with pytest.raises(AccelError, match=message):
        bounds.check(section, "benchmark")


@pytest.mark.parametrize(
    ("buckets", "message"),
    [([64, 0], "each number must be from 1"), (["64"], "each element must be of type int"), (5, "must be a list")],
)
def test_lists(buckets: Any, message: str) -> None:
    """Every element counts, and what an interpolation put in place of a list."""
    with pytest.raises(AccelError, match=message):
        bounds.check(RuntimeConfig(name="cpu", buckets=buckets), "runtime")
