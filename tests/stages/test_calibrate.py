"""Calibration: its statistics, when it settles, and its message for a model that is broken in FP32."""

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from accel.adapters.types import Component
from accel.errors import AccelError
from accel.graph.precision.observer import (
    OUTPUTS,
    ValueStatistics,
    batch_first_values,
    infer_types,
    insert_observers,
    read_observers,
)
from accel.stages import calibrate
from tests.conftest import Build
from tests.graph import text


def test_elements_are_counted_by_magnitude() -> None:
    """Zero, vanishing, subnormal, normal, overflowing, infinite and NaN elements are counted as numpy casts them."""
    values = np.array([0, 1e-8, -3e-8, 6e-8, 6e-5, 7e-5, 1, -65504, 65519, 65520, 1e9, np.inf, np.nan, 0], np.float32)
    model = text.parse("g (float[b, k] x) => (float[b, k] y) { y = Neg (x) }", {})
    names = insert_observers(model)
    rows = batch_first_values(model)
    found = text.run(model, {"x": values.reshape(2, 7)})
    statistics = read_observers(names, [found[name] for name in OUTPUTS], rows, (5, 2))["y"]
    with np.errstate(over="ignore"):
        half = np.abs(values.astype(np.float16))
    finite = np.isfinite(values)
    assert rows == {"x", "y"}
    assert statistics.elements == 14
    assert statistics.not_finite == (~finite).sum() == 2
    assert statistics.overflow == (np.isinf(half) & finite).sum() == 2
    assert statistics.vanishing == ((half == 0) & (values != 0)).sum() == 1
    assert statistics.subnormal == ((half > 0) & (half < 2.0**-14)).sum() == 3
    assert statistics.smallest == pytest.approx(1e-8)


def test_source_of_the_largest_magnitude() -> None:
    """Batch and row of the largest element are recorded; only the batch where the first axis isn't the rows."""
    model = text.parse("g (float[b, 2] x) => (float[2, b] y) { y = Transpose <perm = [1, 0]> (x) }", {})
    names = insert_observers(model)
    found = text.run(model, {"x": np.array([[1, 2], [-9, 3], [4, 5]], np.float32)})
    statistics = read_observers(names, [found[name] for name in OUTPUTS], batch_first_values(model), (4, 3))
    assert statistics["x"].source == (4, 1)
    assert statistics["y"].source == (4, None)
    statistics["x"].widen(ValueStatistics(8.0, 1.0, source=(5, 0)))
    assert statistics["x"].source == (4, 1)
    statistics["x"].widen(ValueStatistics(10.0, 1.0, source=(6, 2)))
    assert (statistics["x"].largest, statistics["x"].source) == (10.0, (6, 2))


def statistics_of(*largest: float) -> ValueStatistics:
    """Return the statistics of a value with these largest magnitudes, one after each doubling of the batches."""
    statistics = ValueStatistics()
    for number, value in enumerate(largest, 1):
        statistics.widen(ValueStatistics(value, 1.0, source=(number, 0)))
        statistics.mark(number)
    return statistics


@pytest.mark.parametrize(
    ("largest", "is_unsettled"),
    [
        ((100, 200), False),  # doubled, but far from the limit
        ((10000, 20000), True),  # doubling once more would exceed the limit divided by the overflow margin
        ((10000, 16000, 16300), False),  # no longer grows much
        ((30000, 40000), False),  # counts as overflow already, so its nodes stay in FP32
        ((1, 300), True),  # grew by a factor of 300
    ],
)
def test_value_that_may_reach_the_limit_is_unsettled(largest: tuple[float, ...], is_unsettled: bool) -> None:
    """A value is unsettled if it would count as overflow after growing once more by the newest factor."""
    found = calibrate.unsettled({Component.DECODE: {"v": statistics_of(*largest)}}, overflow_margin=2.0)
    assert found == ([(Component.DECODE, "v")] if is_unsettled else [])


@pytest.mark.parametrize(
    ("first", "most", "counts"), [(8, 64, [4, 8, 16, 32, 64]), (1, 4, [1, 2, 4]), (3, 3, [1, 3]), (5, 12, [2, 5, 10])]
)
def test_numbers_of_batches_double(first: int, most: int, counts: list[int]) -> None:
    assert calibrate._batch_counts(first, most) == counts


def test_origin_of_non_finite_values_is_named() -> None:
    """The message traces an output back to the node, weight or input where values become non-finite."""
    model = text.parse(
        """g (float[n, 3] x) => (float[n, 3] logits) <float zero = {0.0}> {
            harmless = Log (zero)
            a = Div (x, zero)
            b = Add (a, w)
            logits = Relu (b)
        }""",
        {"w": np.ones((2, 9), np.float32)},
    )
    infer_types(model)
    bad = ValueStatistics(float("inf"), 1.0, not_finite=3)
    statistics = {"x": ValueStatistics(1.0, 1.0), "harmless": bad, "a": bad, "b": bad, "logits": bad}

    def message(**changes: ValueStatistics) -> str:
        with pytest.raises(AccelError) as caught:
            calibrate.check_finite({Component.PREFILL: statistics | changes}, lambda component: model)
        return str(caught.value)

    assert (
        "prefill: output logits is NaN or infinite in FP32 already, beginning at the Div node with output a"
        in message()
    )
    assert "beginning at the input x" in message(x=bad)
    model.graph.initializers["w"].const_value = ir.tensor(np.array([[np.nan]], np.float32), name="w")
    assert "beginning at the weight w" in message(a=ValueStatistics(1.0, 1.0))
    calibrate.check_finite(
        {Component.PREFILL: statistics | {"logits": ValueStatistics(1.0, 1.0)}}, lambda component: model
    )


def test_calibration_on_texts_of_the_user(build: Build, tmp_path: Path) -> None:
    """Calibration runs on each line, and the line with the largest magnitude is named."""
    lines = tmp_path / "words.txt"
    lines.write_text("a\nb\n\nsupercalifragilisticexpialidocious\n")
    overrides = (f"audit.texts={lines}", "audit.random=false", "precision=fp16")
    _, artifacts = build("accel://t5-g2p", "[audit]", overrides)
    folder = artifacts["calibrate"].folder
    record = json.loads((folder / calibrate.STATISTICS).read_text())
    assert record["batches"] == [["text 1: a", "text 2: b"], ["text 3: supercalifragilisticexpialidocious"]]
    assert record["stopped"] == "all 2 batches were used"
    statistics, rows = calibrate.read_statistics(folder)
    elements = [statistics[Component.DECODE][name].elements for name in ("logits",)]
    assert elements == [32 * 3 * 101]  # 32 decode steps x 3 lines x vocabulary
    sources = {
        rows[value.source[0]][value.source[1] or 0] for value in statistics[Component.ENCODER].values() if value.source
    }
    assert "text 3: supercalifragilisticexpialidocious" in sources
