"""Parts of different sizes are cut one by one, and hold the same numbers."""

import numpy as np
import pytest

from accel.graph.decode.split_to_slice import split_to_slice
from tests.graph.text import numbers, parse, rewritten

INPUTS = [{"x": numbers(b, 8, 6)} for b in (1, 3)]
OUT = {"q": "float[b, 5, 6] q", "k": "float[b, 2, 6] k", "v": "float[b, 1, 6] v"}


def operators(sizes: list[int], body: str, *outputs: str) -> list[str]:
    """Those left of `body`, which cuts `x` [b, 8, 6]."""
    model = parse(f"g (float[b, 8, 6] x) => ({', '.join(outputs)}) {{ {body} }}", {"sizes": np.array(sizes)})
    return rewritten(lambda models: split_to_slice(models[0]), [model], INPUTS)[0]


@pytest.mark.parametrize("axis", [1, -2])
def test_a_slice_for_each_part(axis: int) -> None:
    body = f"q, k, v = Split <axis: int = {axis}> (x, sizes)"
    assert operators([5, 2, 1], body, *OUT.values()) == ["Slice"] * 3


def test_a_part_that_nothing_reads_is_not_cut() -> None:
    body = "q, k, p = Split <axis: int = 1> (x, sizes) v = Neg (p)"
    assert operators([5, 2, 1], body, OUT["v"]) == ["Slice", "Neg"]


def test_equal_parts_stay_a_split() -> None:
    body = "q, k = Split <axis: int = 1> (x, sizes)"
    outputs = ("float[b, 4, 6] q", "float[b, 4, 6] k")
    assert operators([4, 4], body, *outputs) == ["Split"]
