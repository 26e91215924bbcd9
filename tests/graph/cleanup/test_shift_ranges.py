"""Ranges are shifted at their limits, and hold the same numbers."""

import onnx_ir as ir
import pytest

from accel.graph.cleanup.shift_ranges import ShiftRanges
from tests.graph.text import numbers, parse, rewritten

LENGTHS = """
    zero = Constant <value = int64 {0}> ()
    one = Constant <value = int64 {1}> ()
    new_shape = Shape (x)
    new = Squeeze (new_shape)
    past_shape = Shape (past)
    length = Squeeze (past_shape)
"""


def graph(body: str, output: str = "int64[n] y") -> ir.Model:
    return parse(f"g (float[n] x, float[p] past) => ({output}) {{ {LENGTHS} {body} }}")


def checked(model: ir.Model) -> ir.Model:
    """The graph after the pass, with equal outputs at several lengths."""
    inputs = [{"x": numbers(new), "past": numbers(past)} for new, past in ((1, 5), (3, 0), (4, 2), (2, 7))]
    rewritten(ShiftRanges(), [model], inputs)
    return model


def sums_of_vectors(model: ir.Model) -> int:
    return sum(node.op_type == "Add" and len(node.outputs[0].shape or ()) > 0 for node in model.graph)


@pytest.mark.parametrize("order", ["counted, length", "length, counted"])
def test_range_begins_where_the_past_ends(order: str) -> None:
    """In either order of the sum; no vector is added any more."""
    model = checked(graph(f"counted = Range(zero, new, one)\n y = Add({order})"))
    assert sums_of_vectors(model) == 0
    assert [node.op_type for node in model.graph].count("Range") == 1


def test_start_and_delta_are_kept() -> None:
    """A range from one with delta two is shifted at both limits."""
    body = "two = Add(one, one)\n counted = Range(one, new, two)\n y = Add(counted, length)"
    assert sums_of_vectors(checked(graph(body, "int64[m] y"))) == 0


def test_views_in_between() -> None:
    """Unsqueezed before the sum, like positions before they are compared."""
    body = """axes = Constant <value_ints = [1, 2]> ()
        counted = Range(zero, new, one)
        cube = Unsqueeze(counted, axes)
        y = Add(cube, length)"""
    assert sums_of_vectors(checked(graph(body, "int64[n, 1, 1] y"))) == 0


def test_the_range_stays_for_others() -> None:
    """Another consumer still reads the range from zero."""
    body = "counted = Range(zero, new, one)\n y = Add(counted, length)\n z = Neg(counted)"
    model = checked(graph(body, "int64[n] y, int64[n] z"))
    assert [node.op_type for node in model.graph].count("Range") == 2


@pytest.mark.parametrize(
    "body",
    [
        "counted = Range(zero, new, one)\n y = Add(counted, counted)",
        "counted = Range(zero, new, one)\n y = Mul(counted, length)",
        "counted = Range(zero, new, one)\n vector = Unsqueeze(length, zeros)\n y = Add(counted, vector)",
    ],
    ids=["two ranges", "product", "vector"],
)
def test_left_alone(body: str) -> None:
    """Sums of two vectors and products stay."""
    model = graph(f"zeros = Constant <value_ints = [0]> ()\n {body}")
    work = ("Range", "Add", "Mul")
    before = [node.op_type for node in model.graph if node.op_type in work]
    assert [node.op_type for node in checked(model).graph if node.op_type in work] == before
