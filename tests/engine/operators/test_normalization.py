"""Layer normalisation and its variants, against ONNX Runtime."""

from pathlib import Path

import pytest
import torch

from accel.errors import AccelError
from tests.engine.one_node import HALF, Case, check, check_16_bits, normal, parameters, run

MICROSOFT = "com.microsoft"
X, SKIP, BIAS, BETA, SCALE = (
    normal(2, 3, 9),
    normal(2, 3, 9, scale=2),
    normal(9),
    normal(9, scale=3),
    normal(9, scale=2),
)
AND_SUM = (True, False, False, True)
CASES = [
    Case("LayerNormalization", [X, SCALE, BETA]),
    Case("LayerNormalization", [X + 3, SCALE], {"epsilon": 0.1}),
    Case("LayerNormalization", [X, normal(3, 9), normal(3, 9)], {"axis": 1, "stash_type": 1}),
    Case("SimplifiedLayerNormalization", [X, SCALE]),
    Case("SimplifiedLayerNormalization", [X, SCALE], {"epsilon": 0.1, "axis": -1}),
    Case("SkipLayerNormalization", [X, SKIP, SCALE], {}, MICROSOFT),
    Case("SkipLayerNormalization", [X, SKIP, SCALE, BETA], {}, MICROSOFT, AND_SUM),
    Case("SkipLayerNormalization", [X, SKIP, SCALE, None, BIAS], {"epsilon": 0.1}, MICROSOFT, AND_SUM),
    Case("SkipLayerNormalization", [X, SKIP[:1], SCALE, BETA, BIAS], {}, MICROSOFT, AND_SUM),
    Case("SkipLayerNormalization", [X, SKIP[0], SCALE, BETA, BIAS], {}, MICROSOFT, AND_SUM),
    Case("SkipSimplifiedLayerNormalization", [X, SKIP, SCALE], {}, MICROSOFT),
    Case("SkipSimplifiedLayerNormalization", [X, SKIP, SCALE], {"epsilon": 0.1}, MICROSOFT, AND_SUM),
    Case("SkipSimplifiedLayerNormalization", [X, SKIP, SCALE, BIAS], {"epsilon": 1e-6}, MICROSOFT, AND_SUM),
]


@parameters(CASES)
def test_against_onnxruntime(case: Case, tmp_path: Path) -> None:
    """ONNX Runtime subtracts the squared mean from the mean of squares, which costs digits: up to 1.5e-5 here."""
    check(case, tmp_path / "node.onnx", atol=2e-5 if case.operator == "SkipLayerNormalization" else 1e-6)


@HALF
@parameters(CASES)
def test_in_16_bits(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    check_16_bits(case, tmp_path / "node.onnx", dtype)


@parameters([case for case in CASES if not case.attributes])
def test_squares_beyond_the_range_of_fp16(case: Case, tmp_path: Path) -> None:
    """The squares of inputs around 3,000 overflow FP16, but not the FP32 that norms are computed in."""
    large = Case(case.operator, [X * 3000, *case.inputs[1:]], case.attributes, case.domain)
    check_16_bits(large, tmp_path / "node.onnx", torch.float16)


@parameters([case for case in CASES if not case.attributes])
def test_the_default_epsilon(case: Case, tmp_path: Path) -> None:
    """It decides what becomes of small numbers, and is not the same for all norms."""
    small = Case(case.operator, [X * 1e-4, *(each if each is None else each * 1e-4 for each in case.inputs[1:])])
    check(Case(small.operator, small.inputs, {}, case.domain, case.outputs), tmp_path / "node.onnx", 1e-3, 1e-8)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            Case("LayerNormalization", [X, SCALE], {"stash_type": 11}),
            r"node \(LayerNormalization\): stash_type=11 is not supported, only 1 \(FP32\)",
        ),
        (
            Case("SkipLayerNormalization", [X, SKIP, SCALE], {}, MICROSOFT, (True, True)),
            r"node \(SkipLayerNormalization\): output 1 \(out1\) is not supported",
        ),
    ],
    ids=str,
)
def test_what_is_refused(case: Case, message: str, tmp_path: Path) -> None:
    with pytest.raises(AccelError, match=message):
        run(case, tmp_path / "node.onnx")
