"""Lengths are read from shapes without views, and stay the same numbers."""

import onnx_ir as ir
import pytest

from accel.graph.cleanup.direct_lengths import DirectLengths
from accel.graph.passes import run_pass
from tests.graph.text import numbers, parse, rewritten, weight

HEAD = """
    zero = Constant <value = int64 {0}> ()
    one = Constant <value = int64 {1}> ()
    rest = Constant <value = int64[1] {-1}> ()
    first = Constant <value = int64[1] {0}> ()
    rows_shape = Shape <start: int = 0, end: int = 1> (x)
    rows = Squeeze (rows_shape)
    new_shape = Shape <start: int = 1, end: int = 2> (x)
    new = Squeeze (new_shape)
    past_shape = Shape <start: int = 1, end: int = 2> (past)
    length = Squeeze (past_shape)
    total = Add (new, length)
"""
INPUTS = [
    {"x": numbers(rows, new, 4), "past": numbers(rows, past)} for rows, new, past in ((3, 5, 2), (2, 1, 7), (1, 3, 0))
]


def graph(body: str, output: str) -> ir.Model:
    return parse(f"g (float[b, n, 4] x, float[b, p] past) => ({output}) {{ {HEAD} {body} }}")


def views_of_lengths(model: ir.Model) -> list[str]:
    """Names of the nodes whose output ONNX Runtime keeps in the memory of a length."""
    lengths = {value for node in model.graph if node.op_type in ("Shape", "Add", "Mul") for value in node.outputs}
    lengths = {value for value in lengths if value.dtype == ir.DataType.INT64 and len(value.shape or ()) < 2}
    views = []
    for node in model.graph:
        if node.op_type in ("Squeeze", "Unsqueeze", "Reshape") and node.inputs[0] in lengths:
            views.append(node.name or node.op_type)
            lengths.update(node.outputs)
    return views


@pytest.mark.parametrize("widen", ["Reshape (new, rest)", "Unsqueeze (new, first)"])
def test_a_shape_of_lengths(widen: str) -> None:
    """A `Reshape` to computed lengths, as in GPT-2, with a range over one of them."""
    body = f"""
        counted = Range (zero, new, one)
        new_vector = {widen}
        rows_vector = Reshape (rows, rest)
        flat = Reshape (x, rest)
        shape = Concat <axis: int = 0> (rows_vector, new_vector, rest)
        y = Reshape (flat, shape)"""
    model = graph(body, "float[b, n, k] y, int64[n] counted")
    assert views_of_lengths(model)
    (left,) = rewritten(DirectLengths(), [model], INPUTS)
    assert views_of_lengths(model) == []
    assert left.count("Squeeze") == 0
    assert left.count("Reshape") == 2


def test_a_sum_of_lengths() -> None:
    """The number of past and new tokens plus a constant, once as a scalar and once in a shape."""
    body = """
        more = Add (total, one)
        wide = Unsqueeze (more, first)
        ones = Expand (one, wide)
        y = Range (zero, more, one)"""
    model = graph(body, "int64[t] ones, int64[t] y")
    rewritten(DirectLengths(), [model], INPUTS)
    assert views_of_lengths(model) == []


def test_no_length() -> None:
    """Another scalar, a complete shape, and a vector that is the model's output are left alone."""
    body = """
        least = ReduceMin <keepdims: int = 0> (past)
        wide = Unsqueeze (least, first)
        whole = Shape (x)
        column = Shape <start: int = 2, end: int = 3> (x)
        y = Reshape (past, rest)"""
    model = graph(body, "float[1] wide, int64[3] whole, int64[1] column, float[m] y")
    inputs = [each for each in INPUTS if each["past"].size]
    (left,) = rewritten(DirectLengths(), [model], inputs)
    assert left.count("Unsqueeze") == 1
    assert "Gather" not in left


def test_a_sum_with_another_scalar() -> None:
    """A sum whose second term can't be a vector is reshaped as before, and gets no nodes for the first term."""
    body = """
        least = ReduceMin <keepdims: int = 0> (past)
        other = Cast <to = 7> (least)
        more = Add (total, other)
        wide = Unsqueeze (more, first)
        y = Neg (wide)"""
    (left,) = rewritten(DirectLengths(), [graph(body, "int64[1] y")], [each for each in INPUTS if each["past"].size])
    assert left.count("Unsqueeze") == 1
    assert left.count("Add") == 2


def test_one_constant_in_all_graphs() -> None:
    """An added constant has the same name in every graph, so that merging finds it once."""
    models = [graph("y = Range (zero, total, one)", "int64[t] y") for _ in range(2)]
    run_pass(DirectLengths(), models)
    for model in models:
        (name,) = (name for name, value in model.graph.initializers.items() if value.const_value is not None)
        assert name == "scalar_0"
        assert weight(model, name) == 0
