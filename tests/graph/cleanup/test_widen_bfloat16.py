"""Arithmetic in bfloat16 becomes FP32 with rounding after each operator, and gives bfloat16's numbers."""

import numpy as np
import pytest
import torch

from accel.graph.cleanup.widen_bfloat16 import WidenBfloat16
from accel.runtime.providers import RUNTIME_ERRORS
from tests.graph.text import numbers, parse, run

BODY = """
g (float[n, 5] x, float[n, 5] z) => (float[n, 5] y)
{
    a = Cast <to = 16> (x)
    b = Cast <to = 16> (z)
    product = Mul (a, b)
    sum = Add (product, a)
    ratio = Div (sum, b)
    same = Identity (ratio)
    y = Cast <to = 1> (same)
}
"""


def test_numbers_are_those_of_bfloat16() -> None:
    """Every number equals that of PyTorch in bfloat16; FP32 without rounding would differ."""
    model = parse(BODY)
    inputs = {"x": numbers(400, 5), "z": numbers(400, 5, seed=1)}
    with pytest.raises(RUNTIME_ERRORS, match="Mul"):
        run(model, inputs)
    assert WidenBfloat16()(model).modified
    a, b = (torch.from_numpy(inputs[name]).bfloat16() for name in ("x", "z"))
    expected = ((a * b + a) / b).float().numpy()
    found = run(model, inputs)["y"]
    assert np.array_equal(found, expected)
    wide = (inputs["x"] * inputs["z"] + inputs["x"]) / inputs["z"]
    assert not np.allclose(found, wide, rtol=1e-3)


def test_other_types_are_left_alone() -> None:
    """FP32 arithmetic stays as it is."""
    model = parse("g (float[n, 5] x) => (float[n, 5] y) { p = Mul (x, x)\n y = Neg (p) }")
    assert not WidenBfloat16()(model).modified
    assert [node.op_type for node in model.graph] == ["Mul", "Neg"]
