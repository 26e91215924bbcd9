"""Positions are counted from where they begin, and stay the same numbers."""

import numpy as np
import onnx_ir as ir
import pytest

from accel.graph.cleanup.shift_ranges import shift_ranges
from tests.graph.text import numbers, parse, run

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
    """The graph after the pass, its numbers the same at several lengths, none of them the other's."""
    inputs = [{"x": numbers(new), "past": numbers(past)} for new, past in ((1, 5), (3, 0), (4, 2), (2, 7))]
    before = [run(model, given) for given in inputs]
    shift_ranges([model])
    for given, expected in zip(inputs, before, strict=True):
        for name, array in run(model, given).items():
            np.testing.assert_array_equal(array, expected[name])
    return model


def sums_of_vectors(model: ir.Model) -> int:
    return sum(node.op_type == "Add" and len(node.outputs[0].shape or ()) > 0 for node in model.graph)


@pytest.mark.parametrize("order", ["counted, length", "length, counted"])
def test_range_begins_where_the_past_ends(order: str) -> None:
    """Either order of the sum; nothing is added on the device any more."""
    model = checked(graph(f"counted = Range(zero, new, one)\n y = Add({order})"))
    assert sums_of_vectors(model) == 0
    assert [node.op_type for node in model.graph].count("Range") == 1


def test_start_and_step_are_kept() -> None:
    """A range from one in steps of two is shifted at both ends."""
    body = "two = Add(one, one)\n counted = Range(one, new, two)\n y = Add(counted, length)"
    assert sums_of_vectors(checked(graph(body, "int64[m] y"))) == 0


def test_views_in_between() -> None:
    """Unsqueezed, as positions are before they are compared."""
    body = """axes = Constant <value_ints = [1, 2]> ()
        counted = Range(zero, new, one)
        cube = Unsqueeze(counted, axes)
        y = Add(cube, length)"""
    assert sums_of_vectors(checked(graph(body, "int64[n, 1, 1] y"))) == 0


def test_the_range_itself_stays_for_others() -> None:
    """Somebody else still counts from zero."""
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
    """Only the sum with a scalar is a shift."""
    model = graph(f"zeros = Constant <value_ints = [0]> ()\n {body}")
    work = ("Range", "Add", "Mul")
    before = [node.op_type for node in model.graph if node.op_type in work]
    assert [node.op_type for node in checked(model).graph if node.op_type in work] == before
