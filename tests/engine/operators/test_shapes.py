"""Operators on shapes, against ONNX Runtime."""

from pathlib import Path

import torch

from accel.engine.operators.shapes import expand, tile
from tests.engine.one_node import Case, check, ints, normal, parameters, scalar

X, LAST, FIRST = normal(4, 3, 7), 2**63 - 1, -(2**63)
CASES = [
    Case("Shape", [X]),
    Case("Shape", [X], {"start": 1}),
    Case("Shape", [X], {"start": -2, "end": -1}),
    Case("Shape", [X], {"start": 2, "end": 9}),
    Case("Shape", [torch.tensor(3.0)]),
    Case("Reshape", [X, ints(0, -1)]),
    Case("Reshape", [X, ints(7, 0, 2, -1)]),
    Case("Reshape", [normal(2, 0), ints(0, 5)], {"allowzero": 1}),
    Case("Reshape", [torch.tensor(3.0), ints(1, 1)]),
    Case("Unsqueeze", [X, ints(-1, 0, 2)]),
    Case("Unsqueeze", [torch.tensor(3.0), ints(0)]),
    Case("Squeeze", [normal(1, 3, 1, 2), ints(-2)]),
    Case("Squeeze", [normal(1, 3, 1, 2), ints(0, 2)]),
    Case("Squeeze", [normal(1, 3, 1, 2)]),
    Case("Transpose", [X], {"perm": [1, 2, 0]}),
    Case("Transpose", [X]),
    Case("Expand", [normal(3, 1), ints(2, 1, 4)]),
    Case("Expand", [normal(3, 2), ints(1, 1)]),
    Case("Expand", [scalar(5), ints(3)]),
    Case("Tile", [X, ints(2, 1, 3)]),
    Case("Tile", [normal(1, 3, 1), ints(2, 1, 3)]),
    Case("Concat", [X, normal(4, 2, 7), normal(4, 0, 7)], {"axis": -2}),
    Case("Concat", [ints(1, 2), ints(3)], {"axis": 0}),
    Case("Split", [X, ints(1, 4, 2)], {"axis": -1}, outputs=(True, True, True)),
    Case("Split", [X], {"axis": 2, "num_outputs": 3}, outputs=(True, True, True)),
    Case("Split", [X], {"num_outputs": 2}, outputs=(True, True)),
    Case("Split", [normal(5)], {"num_outputs": 3}, outputs=(True, True, True)),
    Case("Slice", [X, ints(1), ints(3)]),
    Case("Slice", [X, ints(0, -3), ints(LAST, -1), ints(-2, 2)]),
    Case("Slice", [X, ints(1, 0), ints(LAST, 9), ints(2, 0), ints(2, 3)]),
    Case("Slice", [X, ints(-1, 5), ints(FIRST, 0), ints(2, 0), ints(-2, -1)]),
    Case("Slice", [X, ints(LAST, 2), ints(1, 2), ints(2, 1), ints(-3, -1)]),
    Case("Slice", [X, ints(5), ints(2), ints(-1)]),
    Case("Range", [scalar(2), scalar(11), scalar(3)]),
    Case("Range", [scalar(3), scalar(-4), scalar(-2)]),
    Case("Range", [scalar(3), scalar(-4), scalar(2)]),
    Case("Range", [torch.tensor(0.5), torch.tensor(2.0), torch.tensor(0.5)]),
]


@parameters(CASES)
def test_against_onnxruntime(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path / "node.onnx")


def test_broadcasts_are_views() -> None:
    """What is repeated along axes of length 1 isn't copied."""
    x = normal(1, 512, 8)
    for repeated in (expand(x, ints(3, 1, 1)), tile(x, ints(3, 1, 1))):
        assert repeated.shape == (3, 512, 8)
        assert repeated.data_ptr() == x.data_ptr()
