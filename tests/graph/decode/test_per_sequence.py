"""A graph mapped over a vector gives, for each of its numbers, what it gives for that number alone."""

import numpy as np
import onnx_ir as ir
import pytest

from accel.graph.decode.per_sequence import NotStaticError, PerSequence
from accel.graph.passes import remove_unused
from tests.graph.text import numbers, parse, run

WEIGHTS = {
    "zero": np.array(0, np.int64),
    "one": np.array(1, np.int64),
    "first": np.array([0], np.int64),
    "second": np.array([1], np.int64),
    "same": np.array([1, 1], np.int64),
    "table": numbers(40, 5),
    "scale": numbers(3),
    "last_axis": np.array([3], np.int64),
    "outer": np.array([0, 2], np.int64),
    "six": np.array([6], np.int64),
    "two": np.array([2], np.int64),
    "wide": np.ones((2, 3, 1), np.int64),
}
POSITIONS = (3, 0, 7)
# Shapes that exporters know, and ONNX's inference doesn't.
SHAPES = "int64[new] counted, int64[new] places, int64[1, new] row, int64[1, new] unchanged, int64[batch, new] copies"
INPUTS = "int64 p, float[batch, new, 5] x, int64[batch, new] ids"
PLACES = """
    shape = Shape <start: int = 1, end: int = 2> (ids)
    new = Gather (shape, zero)
    counted = Range (zero, new, one)
    places = Add (counted, p)
"""


def graph(body: str, output: str) -> ir.Model:
    return parse(f"g ({INPUTS}) => ({output} y) <{SHAPES}> {{ {PLACES} {body} }}", WEIGHTS)


def mapped(body: str, output: str) -> list[str]:
    """The operators left, after comparing each sequence of a batch with the graph before, run on it alone."""
    before, after = graph(body, output), graph(body, output)
    number = after.graph.inputs[0]
    number.shape = ir.Shape(["batch"])
    PerSequence(after.graph, [number], "batch").rewrite_uses()
    for new in (1, 2):
        x, ids = numbers(3, new, 5), np.arange(3 * new).reshape(3, new)
        found = run(after, {"p": np.array(POSITIONS), "x": x, "ids": ids})["y"]
        for row, position in enumerate(POSITIONS):
            right = run(before, {"p": np.array(position), "x": x[row : row + 1], "ids": ids[row : row + 1]})["y"]
            np.testing.assert_allclose(found[row : row + 1], right, rtol=1e-6)
    shape = after.graph.outputs[0].shape
    assert shape is not None
    assert str(shape[0]) == "batch"
    remove_unused(after)
    return [node.op_type for node in after.graph]


FLOATS, INTS = "float[batch, new, 5]", "int64[batch, new]"


def test_embedding_of_positions() -> None:
    """The axis of the batch takes the place of an axis that was 1: no node is added to put it there."""
    left = mapped("row = Unsqueeze (places, first)\n rows = Gather (table, row)\n y = Add (x, rows)", FLOATS)
    assert left.count("Unsqueeze") == 1  # of `p`, to add it to each new token's number


def test_bias_by_distance() -> None:
    """As in T5: a table by distance, turned to [1, heads, new, new]."""
    body = """
        column = Unsqueeze (places, second)
        distance = Sub (counted, column)
        bias = Gather (table, distance)
        turned = Transpose <perm: ints = [2, 0, 1]> (bias)
        heads = Unsqueeze (turned, first)
        x_t = Transpose <perm: ints = [0, 2, 1]> (x)
        column_x = Unsqueeze (x_t, last_axis)
        y = Add (column_x, heads)"""
    assert mapped(body, "float[batch, 5, new, new]").count("Transpose") == 2


def test_rotation_angles() -> None:
    """As in T5Gemma: products with frequencies, joined with themselves."""
    body = """
        cell = Unsqueeze (places, outer)
        number = Cast <to: int = 1> (cell)
        angles = Mul (number, scale)
        both = Concat <axis: int = 2> (angles, angles)
        cosine = Cos (both)
        wide_x = Concat <axis: int = 2> (x, x)
        cut = Slice (wide_x, first, six, two)
        y = Mul (cut, cosine)"""
    mapped(body, "float[batch, new, 6]")


def test_copies_for_the_batch() -> None:
    """As in Whisper: positions are repeated for each sequence of the batch."""
    body = """
        row = Unsqueeze (places, first)
        unchanged = Expand (row, same)
        size = Shape <start: int = 0, end: int = 1> (ids)
        times = Concat <axis: int = 0> (size, second)
        copies = Tile (unchanged, times)
        y = Add (copies, ids)"""
    assert not {"Tile", "Expand"} & set(mapped(body, INTS))


def test_transposition_of_left_out_axes() -> None:
    """An axis of length 1 that moves is put back first."""
    body = """
        row = Unsqueeze (places, first)
        column = Transpose <perm: ints = [1, 0]> (row)
        number = Cast <to: int = 1> (column)
        y = Add (x, number)"""
    mapped(body, FLOATS)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("y = Add (places, wide)", r"\(Add\): its output depends on positions and has no axis of the batch"),
        ("y = ReduceSum (places)", r"\(ReduceSum\): it can't be computed for each sequence's position"),
        ("y = Gather (places, first)", r"\(Gather\): it can't be computed"),
        ("y = Gather <axis: int = 1> (table, places)", r"\(Gather\): it takes positions as indices into another axis"),
        ("row = Unsqueeze (places, first)\n y = Tile (row, times)", r"\(Tile\): it repeats positions"),
        ("column = Unsqueeze (places, second)\n y = Add (column, ids)", r"\(Add\): it broadcasts positions along"),
        ("y = Unsqueeze (places, shape)", r"\(Unsqueeze\): its axes are not constant"),
    ],
    ids=["output", "sum", "data", "columns", "repeated", "over the batch", "axes"],
)
def test_what_cannot_be_mapped(body: str, reason: str) -> None:
    """The error names the node."""
    model = parse(f"g ({INPUTS}) => (int64[k] y) {{ {PLACES} {body} }}", WEIGHTS | {"times": np.array([3, 2])})
    number = model.graph.inputs[0]
    number.shape = ir.Shape(["batch"])
    with pytest.raises(NotStaticError, match=reason):
        PerSequence(model.graph, [number], "batch").rewrite_uses()
