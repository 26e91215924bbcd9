"""Matrix products, against ONNX Runtime."""

from pathlib import Path

import torch

from tests.engine.one_node import HALF, Case, check, check_16_bits, normal, parameters

MICROSOFT = "com.microsoft"
CASES = [
    Case("MatMul", [normal(2, 3, 5), normal(5, 7)]),
    Case("MatMul", [normal(2, 1, 3, 5), normal(4, 5, 7)]),
    Case("MatMul", [normal(5), normal(2, 5, 7)]),
    Case("MatMul", [normal(3, 5), normal(5)]),
    Case("FusedMatMul", [normal(2, 3, 5), normal(7, 5)], {"transB": 1}, MICROSOFT),
    Case("FusedMatMul", [normal(2, 5, 3), normal(2, 5, 7)], {"transA": 1, "alpha": 0.5}, MICROSOFT),
    Case("FusedMatMul", [normal(2, 5, 3), normal(7, 5)], {"transA": 1, "transB": 1}, MICROSOFT),
    Case("Gemm", [normal(3, 5), normal(5, 7)]),
    Case("Gemm", [normal(3, 5), normal(5, 7), normal(7)]),
    Case("Gemm", [normal(3, 5), normal(7, 5), normal(3, 1)], {"transB": 1, "alpha": 0.5, "beta": 2.0}),
    Case("Gemm", [normal(5, 3), normal(5, 7), torch.tensor(0.25)], {"transA": 1, "beta": 0.5}),
    Case("Gemm", [normal(3, 5), normal(5, 7)], {"alpha": 3.0}),
]


@parameters(CASES)
def test_against_onnxruntime(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path / "node.onnx")


@HALF
@parameters(CASES)
def test_in_16_bits(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    check_16_bits(case, tmp_path / "node.onnx", dtype)


@HALF
def test_long_sums_in_16_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    """Products are summed in FP32: ones would stop counting at 2,048 in FP16 and at 256 in BF16."""
    for case in (
        Case("MatMul", [torch.ones(1, 5000), torch.ones(5000, 2)]),
        Case("FusedMatMul", [torch.ones(1, 5000), torch.ones(2, 5000)], {"transB": 1}, MICROSOFT),
        Case("Gemm", [torch.ones(1, 5000), torch.ones(5000, 2), torch.ones(2)]),
    ):
        check_16_bits(case, tmp_path / "node.onnx", dtype)
