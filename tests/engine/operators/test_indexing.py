"""Reads and writes at indices, against ONNX Runtime."""

from pathlib import Path

import pytest
import torch

from accel.errors import AccelError
from tests.engine.one_node import HALF, Case, check, check_16_bits, ints, normal, parameters, run, scalar

X = normal(4, 3, 7)
CACHE = normal(2, 3, 6, 5)
CASES = [
    Case("Gather", [X, ints([0, -1], [2, -3])], {"axis": 1}),
    Case("Gather", [X, ints(3, 0, 0)]),
    Case("Gather", [X, scalar(-2)], {"axis": -1}),
    Case("Gather", [X, ints(1).int()], {"axis": 2}),
    Case("Gather", [ints(5, 6, 7), scalar(1)]),
    Case("GatherElements", [X, ints([[0, -1], [6, 2], [1, -7]])], {"axis": 2}),
    Case("GatherElements", [normal(3, 2), ints([-1, 0])]),
    Case("GatherND", [X, ints([[0, -1], [3, 2]])]),
    Case("GatherND", [X, ints([0, 1, -1], [3, -3, 2])]),
    Case("GatherND", [X > 0, ints([[0]], [[-1]])]),
    Case("ScatterND", [X, ints([[-1, 2]], [[0, 0]]), normal(2, 1, 7)]),
    Case("ScatterND", [normal(4, 3), ints([1], [1], [-4]), normal(3, 3)], {"reduction": "add"}),
    Case("TensorScatter", [CACHE, normal(2, 3, 1, 5), ints(4, 0)]),
    Case("TensorScatter", [CACHE, normal(2, 3, 2, 5), ints(4, 1)], {"axis": 2}),
    Case("TensorScatter", [CACHE, normal(2, 3, 2, 5)]),
    Case("TensorScatter", [CACHE, normal(2, 2, 6, 5), ints(1, 0)], {"axis": 1}),
    Case("TensorScatter", [CACHE, normal(2, 3, 3, 5), ints(5, 4)], {"mode": "circular"}),
    Case("NonZero", [torch.tensor([[True, False, True], [False, False, True]])]),
    Case("NonZero", [torch.zeros(3)]),
]


@parameters(CASES)
def test_against_onnxruntime(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path / "node.onnx")


@HALF
@parameters([case for case in CASES if case.operator.startswith(("Scatter", "Tensor"))])
def test_in_16_bits(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    check_16_bits(case, tmp_path / "node.onnx", dtype)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case("GatherND", [X, ints([0], [1])], {"batch_dims": 1}), r"node \(GatherND\): batch_dims=1 is not supported"),
        (Case("ScatterND", [X, ints([0]), normal(1, 3, 7)], {"reduction": "max"}), "reduction='max' is not supported"),
        (Case("Gather", [X, ints(9)]), r"node \(Gather\) can't run: index 9 is out of bounds"),
    ],
    ids=str,
)
def test_what_is_refused(case: Case, message: str, tmp_path: Path) -> None:
    with pytest.raises(AccelError, match=message):
        run(case, tmp_path / "node.onnx")
