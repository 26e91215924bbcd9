"""Reductions, orders and softmax, against ONNX Runtime."""

from pathlib import Path

import torch

from tests.engine.one_node import HALF, Case, check, check_16_bits, ints, normal, parameters, scalar

X = normal(4, 3, 7)
TIES = torch.tensor([[2.0, 5.0, 2.0, 5.0, 1.0], [3.0, 3.0, 3.0, 3.0, 3.0]])
BOTH = (True, True)
FLOATS = [
    Case("ReduceSum", [X, ints(-1, 0)]),
    Case("ReduceSum", [X], {"keepdims": 0}),
    Case("ReduceSum", [X], {"noop_with_empty_axes": 1}),
    Case("ReduceMax", [X, ints(1)], {"keepdims": 0}),
    Case("ReduceMax", [X]),
    Case("CumSum", [X, scalar(-1)]),
    Case("CumSum", [X, scalar(1)], {"exclusive": 1}),
    Case("CumSum", [X, scalar(2)], {"exclusive": 1, "reverse": 1}),
    Case("TopK", [X, ints(2)], outputs=BOTH),
    Case("TopK", [X, ints(3)], {"axis": 1, "largest": 0}, outputs=BOTH),
    Case("TopK", [TIES, ints(3)], outputs=BOTH),
    Case("TopK", [TIES, ints(4)], {"largest": 0}, outputs=BOTH),
    Case("Softmax", [X * 5]),
    Case("Softmax", [X], {"axis": 1}),
]
OTHERS = [
    Case("ReduceSum", [ints([1, 2], [3, 4]).int(), ints(0)]),
    Case("ReduceMax", [ints([1, 2], [3, 4])], {"keepdims": 0, "noop_with_empty_axes": 0}),
    Case("CumSum", [ints([1, 1], [0, 1]).int(), scalar(1)], {"reverse": 1}),
    Case("Softmax", [torch.tensor([[-3.4028234663852886e38] * 3, [0.0, -3.4028234663852886e38, 1.0]])]),
]


@parameters([*FLOATS, *OTHERS])
def test_against_onnxruntime(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path / "node.onnx")


@HALF
@parameters([case for case in FLOATS if case.operator != "TopK"])
def test_in_16_bits(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    check_16_bits(case, tmp_path / "node.onnx", dtype)


@HALF
def test_long_sums_in_16_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    """Summed in 16 bits, ones would stop counting at 2,048 in FP16 and at 256 in BF16."""
    path = tmp_path / "node.onnx"
    check_16_bits(Case("ReduceSum", [torch.ones(2, 5000), ints(1)]), path, dtype)
    check_16_bits(Case("Softmax", [torch.zeros(2, 5000)]), path, dtype)
