"""Masks stay as narrow as they are, and what they are added to comes out the same."""

import numpy as np
import pytest

from accel.graph.cleanup.eliminate_expand import eliminate_expand
from tests.graph.text import numbers, parse, rewritten

INPUTS = "int64[batch, source] mask, float[batch, 4, new, source] scores"
MASK = """
    zero = Constant <value = int64 {0}> ()
    one = Constant <value = int64 {1}> ()
    none = Constant <value = float {0.0}> ()
    far = Constant <value = float {-1e9}> ()
    axes = Constant <value = int64[2] {1, 2}> ()
    shown = Cast <to: int = 9> (mask)
    row = Unsqueeze (shown, axes)
    lengths = Shape (scores)
    new = Gather (lengths, two)
    count = Range (zero, new, one)
    column_axes = Constant <value = int64[3] {0, 1, 3}> ()
    column = Unsqueeze (count, column_axes)
    there = GreaterOrEqual (column, START)
    visible = And (there, row)
    bias = Where (visible, none, far)
    y = Add (scores, bias)
"""


def inputs() -> list[dict[str, np.ndarray]]:
    found = []
    for batch, new, source in ((1, 1, 5), (3, 2, 4), (2, 3, 1)):
        mask = np.ones((batch, source), np.int64)
        mask[-1, source // 2 :] = 0
        found.append({"mask": mask, "scores": numbers(batch, 4, new, source)})
    return found


def graph(body: str, start: str = "zero", outputs: str = "float[batch, 4, new, source] y") -> str:
    two = "    two = Constant <value = int64 {2}> ()\n"
    return f"g ({INPUTS}) => ({outputs}) {{ {two}{body.replace('START', start)} }}"


def test_true_everywhere() -> None:
    """Counting from zero, nothing is below zero: the mask over new tokens goes, with all that made it."""
    model = parse(graph(MASK))
    (left,) = rewritten(eliminate_expand, [model], inputs())
    assert not {"And", "GreaterOrEqual", "Range", "Gather"} & set(left)
    bias = next(node.outputs[0] for node in model.graph if node.op_type == "Where")
    assert [str(dim) for dim in bias.shape or ()] == ["batch", "1", "1", "source"]


def test_not_true_everywhere() -> None:
    """The first place fails: the mask stays."""
    (left,) = rewritten(eliminate_expand, [parse(graph(MASK, "one"))], inputs())
    assert {"And", "GreaterOrEqual", "Range"} <= set(left)


def test_expanded_for_nothing() -> None:
    """To the shape of what it is added to, which does that by itself; on the way to a sum as well."""
    sums = "wide = Expand (bias, lengths)\n half = Div (wide, two_) \n y = Add (scores, half)"
    body = MASK.replace("y = Add (scores, bias)", sums).replace("Where (visible", "Where (row")
    two = "two_ = Constant <value = float {2.0}> ()\n"
    (left,) = rewritten(eliminate_expand, [parse(graph(two + body))], inputs())
    assert "Expand" not in left


@pytest.mark.parametrize(
    ("last", "outputs"),
    [
        ("wide = Expand (bias, lengths)", "float[batch, 4, new, source] wide"),
        ("wide = Expand (bias, lengths)\n y = Softmax (wide)", "float[batch, 4, new, source] y"),
        ("wide = Expand (bias, lengths)\n y = Neg (wide)", "float[batch, 4, new, source] y"),
        ("wide = Expand (bias, lengths)\n y = Neg (wide)\n z = Add (y, scores)", "float[batch, 4, new, source] y"),
        ("wide = Expand (bias, lengths)\n y = Mul (wide, wide)", "float[batch, 4, new, source] y"),
        (
            "wide = Expand (bias, lengths)\n a = Neg (wide)\n b = Abs (wide)\n y = Add (a, b)",
            "float[batch, 4, new, source] y",
        ),
    ],
    ids=["the caller's", "not element by element", "alone", "a caller's beside a sum", "twice", "by two ways"],
)
def test_what_must_be_wide(last: str, outputs: str) -> None:
    """Where a reader, or the caller, would get another shape, it is expanded as before."""
    body = MASK.replace("y = Add (scores, bias)", last).replace("Where (visible", "Where (row")
    model = parse(graph(body, "one", outputs))
    for node in model.graph:  # as the exporter notes what inference doesn't follow
        if node.outputs[0].name in ("wide", "a", "b", "y"):
            node.outputs[0].shape = model.graph.inputs[1].shape
    (left,) = rewritten(eliminate_expand, [model], inputs())
    assert "Expand" in left
