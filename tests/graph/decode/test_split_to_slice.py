"""Parts of different sizes are sliced one by one, and hold the same numbers."""

import numpy as np
import pytest

from accel.graph.decode.split_to_slice import SplitToSlice
from tests.graph.text import numbers, parse, rewritten

INPUTS = [{"x": numbers(b, 8, 6)} for b in (1, 3)]
OUT = {"q": "float[b, 5, 6] q", "k": "float[b, 2, 6] k", "v": "float[b, 1, 6] v"}


def operators(sizes: list[int], body: str, *outputs: str) -> list[str]:
    """The operators left of `body`, which splits `x` [b, 8, 6] into `sizes`."""
    model = parse(f"g (float[b, 8, 6] x) => ({', '.join(outputs)}) {{ {body} }}", {"sizes": np.array(sizes)})
    return rewritten(SplitToSlice(), [model], INPUTS)[0]


@pytest.mark.parametrize("axis", [1, -2])
def test_a_slice_for_each_part(axis: int) -> None:
    """Along an axis from the front, and one from the end."""
    body = f"q, k, v = Split <axis: int = {axis}> (x, sizes)"
    assert operators([5, 2, 1], body, *OUT.values()) == ["Slice"] * 3


def test_an_unused_part_is_not_sliced() -> None:
    """Only the part that is read gets a `Slice`."""
    body = "q, k, p = Split <axis: int = 1> (x, sizes) v = Neg (p)"
    assert operators([5, 2, 1], body, OUT["v"]) == ["Slice", "Neg"]


def test_equal_parts_stay_a_split() -> None:
    """ONNX Runtime splits equal parts without copies from the host."""
    body = "q, k = Split <axis: int = 1> (x, sizes)"
    outputs = ("float[b, 4, 6] q", "float[b, 4, 6] k")
    assert operators([4, 4], body, *outputs) == ["Split"]
