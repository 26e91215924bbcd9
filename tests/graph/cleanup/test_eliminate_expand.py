"""Masks stay narrow where their consumers broadcast, and every output keeps its shape and numbers."""

import numpy as np
import pytest

from accel.graph.cleanup.eliminate_expand import EliminateExpand
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
    """Inputs of several shapes, with masked positions at the end of the last sequence."""
    cases = []
    for batch, new, source in ((1, 1, 5), (3, 2, 4), (2, 3, 1)):
        mask = np.ones((batch, source), np.int64)
        mask[-1, source // 2 :] = 0
        cases.append({"mask": mask, "scores": numbers(batch, 4, new, source)})
    return cases


def graph(body: str, start: str = "zero", outputs: str = "float[batch, 4, new, source] y") -> str:
    """The graph `body`, with a range that begins at the constant `start`."""
    two = "    two = Constant <value = int64 {2}> ()\n"
    return f"g ({INPUTS}) => ({outputs}) {{ {two}{body.replace('START', start)} }}"


def test_true_everywhere() -> None:
    """A range from zero is nowhere below zero: the mask over new tokens is removed with all that computes it."""
    model = parse(graph(MASK))
    (left,) = rewritten(EliminateExpand(), [model], inputs())
    assert not {"And", "GreaterOrEqual", "Range", "Gather"} & set(left)
    bias = next(node.outputs[0] for node in model.graph if node.op_type == "Where")
    assert [str(dim) for dim in bias.shape or ()] == ["batch", "1", "1", "source"]


def test_not_true_everywhere() -> None:
    """The first position is masked: the mask stays."""
    (left,) = rewritten(EliminateExpand(), [parse(graph(MASK, "one"))], inputs())
    assert {"And", "GreaterOrEqual", "Range"} <= set(left)


def test_redundant_expand() -> None:
    """An `Expand` to the shape of the other term of a sum is removed, also with a division in between."""
    sums = "wide = Expand (bias, lengths)\n half = Div (wide, two_) \n y = Add (scores, half)"
    body = MASK.replace("y = Add (scores, bias)", sums).replace("Where (visible", "Where (row")
    two = "two_ = Constant <value = float {2.0}> ()\n"
    (left,) = rewritten(EliminateExpand(), [parse(graph(two + body))], inputs())
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
    ids=["output", "not elementwise", "alone", "output beside a sum", "read twice", "by two paths"],
)
def test_needed_expand(last: str, outputs: str) -> None:
    """`Expand` stays where an output of the model, or a node that doesn't broadcast, would get another shape."""
    body = MASK.replace("y = Add (scores, bias)", last).replace("Where (visible", "Where (row")
    model = parse(graph(body, "one", outputs))
    for node in model.graph:  # noted by the exporter, beyond shape inference
        if node.outputs[0].name in ("wide", "a", "b", "y"):
            node.outputs[0].shape = model.graph.inputs[1].shape
    (left,) = rewritten(EliminateExpand(), [model], inputs())
    assert "Expand" in left
