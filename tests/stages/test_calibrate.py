"""What the audit sees, how long it looks, and what it says of a model that is broken in FP32."""

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


def test_every_element_is_counted_where_it_belongs() -> None:
    """Zero, below FP16's smallest, without all digits, ordinary, beyond, infinite, NaN: as numpy's own cast has it."""
    values = np.array([0, 1e-8, -3e-8, 6e-8, 6e-5, 7e-5, 1, -65504, 65519, 65520, 1e9, np.inf, np.nan, 0], np.float32)
    model = text.parse("g (float[b, k] x) => (float[b, k] y) { y = Neg (x) }", {})
    names = insert_observers(model)
    rows = batch_first_values(model)
    found = text.run(model, {"x": values.reshape(2, 7)})
    seen = read_observers(names, [found[name] for name in OUTPUTS], rows, (5, 2))["y"]
    with np.errstate(over="ignore"):
        half = np.abs(values.astype(np.float16))
    finite = np.isfinite(values)
    assert rows == {"x", "y"}
    assert seen.elements == 14
    assert seen.not_finite == (~finite).sum() == 2
    assert seen.overflow == (np.isinf(half) & finite).sum() == 2
    assert seen.vanishing == ((half == 0) & (values != 0)).sum() == 1
    assert seen.subnormal == ((half > 0) & (half < 2.0**-14)).sum() == 3
    assert seen.smallest == pytest.approx(1e-8)


def test_the_row_that_reached_furthest_is_known() -> None:
    """Of three rows the second, in batch 4; where the first axis is not the batch, only the batch."""
    model = text.parse("g (float[b, 2] x) => (float[2, b] y) { y = Transpose <perm = [1, 0]> (x) }", {})
    names = insert_observers(model)
    found = text.run(model, {"x": np.array([[1, 2], [-9, 3], [4, 5]], np.float32)})
    seen = read_observers(names, [found[name] for name in OUTPUTS], batch_first_values(model), (4, 3))
    assert seen["x"].source == (4, 1)
    assert seen["y"].source == (4, None)
    seen["x"].widen(ValueStatistics(8.0, 1.0, source=(5, 0)))
    assert seen["x"].source == (4, 1)
    seen["x"].widen(ValueStatistics(10.0, 1.0, source=(6, 2)))
    assert (seen["x"].largest, seen["x"].source) == (10.0, (6, 2))


def reaching(*largest: float) -> ValueStatistics:
    """A value that reached so far after each look."""
    held = ValueStatistics()
    for number, value in enumerate(largest, 1):
        held.widen(ValueStatistics(value, 1.0, source=(number, 0)))
        held.mark(number)
    return held


@pytest.mark.parametrize(
    ("largest", "open_"),
    [
        ((100, 200), False),  # doubled, and far from the limit
        ((10000, 20000), True),  # once more, and it is within the margin of two
        ((10000, 16000, 16300), False),  # grew, but no more
        ((30000, 40000), False),  # within the margin already: its nodes stay
        ((1, 300), True),  # hundreds of times further than before: nobody knows
    ],
)
def test_what_may_yet_reach_the_limit_is_not_settled(largest: tuple[float, ...], open_: bool) -> None:
    """A value is unsettled if another growth like the newest would count as overflow."""
    found = calibrate.unsettled({Component.DECODE: {"v": reaching(*largest)}}, overflow_margin=2.0)
    assert found == ([(Component.DECODE, "v")] if open_ else [])


@pytest.mark.parametrize(
    ("first", "most", "counts"), [(8, 64, [4, 8, 16, 32, 64]), (1, 4, [1, 2, 4]), (3, 3, [1, 3]), (5, 12, [2, 5, 10])]
)
def test_looks_are_twice_as_long_each_time(first: int, most: int, counts: list[int]) -> None:
    assert calibrate._batch_counts(first, most) == counts


def test_the_beginning_of_what_is_not_finite_is_named() -> None:
    """From the output back to the node, the weight or the input where finite numbers end."""
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
    held = {"x": ValueStatistics(1.0, 1.0), "harmless": bad, "a": bad, "b": bad, "logits": bad}

    def message(**changes: ValueStatistics) -> str:
        with pytest.raises(AccelError) as caught:
            calibrate.check_finite({Component.PREFILL: held | changes}, lambda component: model)
        return str(caught.value)

    assert (
        "prefill: output logits is NaN or infinite in FP32 already, beginning at the Div node with output a"
        in message()
    )
    assert "beginning at the input x" in message(x=bad)
    model.graph.initializers["w"].const_value = ir.tensor(np.array([[np.nan]], np.float32), name="w")
    assert "beginning at the weight w" in message(a=ValueStatistics(1.0, 1.0))
    calibrate.check_finite({Component.PREFILL: held | {"logits": ValueStatistics(1.0, 1.0)}}, lambda component: model)


def test_a_users_texts_are_looked_at(build: Build, tmp_path: Path) -> None:
    """Lines are read by the model's tokenizer and decoded, and the one that reached furthest is named."""
    lines = tmp_path / "words.txt"
    lines.write_text("a\nb\n\nsupercalifragilisticexpialidocious\n")
    given = (f"audit.texts={lines}", "audit.random=false", "precision=fp16")
    _, made = build("accel://t5-g2p", "[audit]", given)
    folder = made["calibrate"].folder
    record = json.loads((folder / calibrate.STATISTICS).read_text())
    assert record["batches"] == [["text 1: a", "text 2: b"], ["text 3: supercalifragilisticexpialidocious"]]
    assert record["stopped"] == "all 2 batches were used"
    held, rows = calibrate.read_statistics(folder)
    steps = [held[Component.DECODE][name].elements for name in ("logits",)]
    assert steps == [32 * 3 * 101]  # 32 steps of three lines over the vocabulary
    sources = {rows[seen.source[0]][seen.source[1] or 0] for seen in held[Component.ENCODER].values() if seen.source}
    assert "text 3: supercalifragilisticexpialidocious" in sources
