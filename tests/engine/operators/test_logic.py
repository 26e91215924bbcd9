"""Comparisons and selections, against ONNX Runtime."""

from pathlib import Path

import torch

from tests.engine.one_node import Case, check, ints, normal, parameters

TRUTH = torch.tensor([[True], [False]]), torch.tensor([True, False])
CASES = [
    Case("Equal", [ints(1, 2, 3), ints([1], [3])]),
    Case("Equal", [torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("nan")])]),
    Case("Less", [ints(1, 2, 3), ints([1], [3])]),
    Case("Less", [normal(3, 1), normal(4)]),
    Case("LessOrEqual", [ints(1, 2, 3), ints([1], [3])]),
    Case("Greater", [ints(1, 2, 3), ints([1], [3])]),
    Case("And", TRUTH),
    Case("Not", [TRUTH[0]]),
    Case("Where", [TRUTH[0], normal(3, 1, 2), torch.tensor(-3.4028234663852886e38)]),
    Case("Where", [torch.tensor(True), ints(1, 2), ints([3], [4])]),
    Case("Where", [TRUTH[1], torch.tensor([1.0, float("nan")]), torch.tensor([float("inf"), 2.0])]),
]


@parameters(CASES)
def test_against_onnxruntime(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path / "node.onnx")
