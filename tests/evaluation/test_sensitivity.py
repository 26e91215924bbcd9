"""Comparison of a smaller precision plan with that of the rules, by sensitivity trials."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from accel.adapters.types import Component
from accel.evaluation.sensitivity import RecordedCall, SensitivityTrial, TrialResult
from accel.graph import files
from accel.graph.precision.formats import FP16
from accel.graph.precision.observer import ValueStatistics
from accel.graph.precision.plan import Plan, Reason
from accel.runtime.session import SessionSettings
from tests.graph import text

BASELINE = TrialResult({"random": [0.03, 0.04], "text": [0.003, 0.004]}, changed=1)


@pytest.mark.parametrize(
    ("errors", "changed", "passes"),
    [
        ({"random": [0.03, 0.04], "text": [0.003, 0.004]}, 1, True),
        (
            {"random": [0.04, 0.03], "text": [0.004, 0.0045]},
            0,
            True,
        ),  # single calls may be worse if the kind of input is not
        (
            {"random": [0.03, 0.04], "text": [0.006, 0.008]},
            1,
            False,
        ),  # worse on text, which equal errors on random ids don't compensate
        ({"random": [0.03, 0.04], "text": [0.003, 0.004]}, 2, False),
        ({"random": [0.03, math.inf], "text": [0.003, 0.004]}, 0, False),
        ({"random": [math.inf]}, 0, False),  # the trial stopped at a non-finite output
    ],
)
def test_as_good_as_the_rules_plan(errors: dict[str, list[float]], changed: int, passes: bool) -> None:
    """Errors may be 1.25 times the baseline's on each kind of input, finite, and with no more tokens changed."""
    assert TrialResult(errors, changed).within(BASELINE) == passes


def test_errors_of_a_kind_are_pooled() -> None:
    """By the root mean square, so that one large error counts more than many small ones."""
    assert BASELINE.error("random") == pytest.approx(math.sqrt((9 + 16) / 2) / 100)


@pytest.mark.parametrize(("overflow_margin", "scale"), [(1.0, 1.0), (2.0, 2.0), (3.0, 4.0)])
def test_trial_keeps_the_overflow_margin(tmp_path: Path, overflow_margin: float, scale: float) -> None:
    """A value within the overflow margin of the limit is scaled by a power of two, so that it overflows in a trial."""
    statistics = {
        "far": ValueStatistics(20000.0, 1.0),
        "near": ValueStatistics(40000.0, 1.0),
        "beyond": ValueStatistics(70000.0, 1.0),
    }
    graph = text.parse("g (float[n] x) => (float[n] near) { near = Neg (x) }", {})
    files.save(graph, tmp_path / "decode.onnx")
    tensors = {"in.x": torch.tensor([40000.0, 1.0]), "out.near": torch.tensor([-40000.0, -1.0])}
    save_file(tensors, tmp_path / "0.call")
    calls = [RecordedCall("random", 0, tmp_path / "0.call")]
    trial = SensitivityTrial(
        Component.DECODE, tmp_path / "decode.onnx", calls, SessionSettings(), FP16, overflow_margin, statistics, ()
    )
    expected = [name for name, value in statistics.items() if value.largest * overflow_margin > 65504]
    assert trial._overflow_scales() == dict.fromkeys(expected, scale)
    assert trial(Plan()).finite == (overflow_margin == 1)
    assert trial(Plan({"near": Reason("overflow", "near")}, specs={"near": Reason("overflow", "near")})).finite
