"""Elementwise arithmetic, activations and casts, against ONNX Runtime."""

from pathlib import Path

import pytest
import torch

from accel.engine.registry import MICROSOFT
from tests.engine.one_node import HALF, Case, check, check_16_bits, ints, normal, parameters, run

NAN, INF = float("nan"), float("inf")
FLOATS = [
    Case("Add", [normal(3, 1, 5), normal(4, 1)]),
    Case("Sub", [normal(7), normal(2, 3, 7)]),
    Case("Mul", [normal(2, 3), torch.tensor(0.5)]),
    Case("Div", [normal(2, 3), normal(3).abs() + 1]),
    Case("Pow", [normal(5, 3), torch.tensor(3.0)]),
    Case("Pow", [normal(5, 3).abs(), normal(5, 1)]),
    Case("Neg", [normal(3, 5)]),
    Case("Max", [normal(3, 1), normal(5), normal(2, 1, 1)]),
    Case("Max", [normal(3, 5)]),
    Case("Min", [normal(3, 1), normal(5), normal(2, 1, 1)]),
    Case("Sin", [normal(3, 5, scale=9)]),
    Case("Cos", [normal(3, 5, scale=9)]),
    Case("Tanh", [normal(3, 5, scale=2)]),
    Case("Sigmoid", [normal(3, 5, scale=9)]),
    Case("QuickGelu", [normal(3, 5, scale=9)], {"alpha": 1.0}, MICROSOFT),
    Case("QuickGelu", [normal(3, 5, scale=9)], domain=MICROSOFT),
    Case("Relu", [normal(3, 5)]),
    Case("Gelu", [normal(3, 5, scale=2)]),
    Case("Gelu", [normal(3, 5, scale=2)], {"approximate": "tanh"}),
]
OTHERS = [
    Case("Add", [ints(1, 2), ints([1], [2**40])]),
    Case("Sub", [ints(1, 2), ints([5], [7])]),
    Case("Mul", [ints(1, 2).int(), ints([5], [7]).int()]),
    Case("Div", [ints(-7, 7, -7, 7), ints(2, 2, -2, -2)]),
    Case("Mod", [ints(-7, 7, -7, 7, 3), ints(2, 2, -2, -2, 5)]),
    Case("Mod", [ints([-9], [4]), ints(8)]),
    Case("Pow", [normal(3), ints(2)]),
    Case("Pow", [ints(4, 3), torch.tensor([0.5, 2.0])]),
    Case("Neg", [ints(1, -2)]),
    Case("Max", [torch.tensor([1.0, NAN, -INF]), torch.tensor([NAN, 0.0, 3.0])]),
    Case("Min", [torch.tensor([1.0, NAN, -INF]), torch.tensor([NAN, 0.0, 3.0])]),
    Case("Max", [ints(1, -113), ints([-5], [3])]),
    Case("Min", [ints(1, -113), ints(0)]),
    Case("Cast", [torch.tensor([1.9, -1.9, 0.0, 3e4])], {"to": 7}),
    Case("Cast", [torch.tensor([1.9, -1.9, 0.0, 3e4])], {"to": 6}),
    Case("Cast", [torch.tensor([0.5, 0.0, -0.0, NAN])], {"to": 9}),
    Case("Cast", [torch.tensor([1e5, -7e4, 65504.0, 1e-8, NAN])], {"to": 10}),
    Case("Cast", [ints(3, -1, 2**53 + 1)], {"to": 1}),
    Case("Cast", [torch.tensor([True, False])], {"to": 7}),
    Case("Cast", [normal(5).half()], {"to": 1}),
]


@parameters([*FLOATS, *OTHERS])
def test_against_onnxruntime(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path / "node.onnx")


@HALF
@parameters(FLOATS)
def test_in_16_bits(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    check_16_bits(case, tmp_path / "node.onnx", dtype)


@pytest.mark.parametrize("value", [1.0, 1.00390625, 3.3895e38, 1e39, -0.1])
def test_cast_to_bfloat16(value: float, tmp_path: Path) -> None:
    """Numpy, and so ONNX Runtime's interface, has no such dtype."""
    found = run(Case("Cast", [torch.tensor([value])], {"to": 16}), tmp_path / "node.onnx")
    assert torch.equal(found, torch.tensor([value], dtype=torch.bfloat16))
