"""Decode graphs for one token: no transposes around an axis of length 1, and the same outputs."""

import numpy as np
import onnx_ir as ir

from accel.graph.cleanup.eliminate_noop_add import EliminateNoopAdd
from accel.graph.decode.one_token import OneToken, TransposeToReshape
from tests.graph.text import numbers, parse, run


def checked(body: str, inputs: str, outputs: str, *shape: int) -> list[str]:
    """The operators left, after checking that the outputs for one token are the same at two batch sizes."""
    text = f"g ({inputs}) => ({outputs}) {{ {body} }}"
    before, after = parse(text), parse(text)
    for graph_pass in (OneToken("new"), TransposeToReshape()):
        text_before = ir.to_proto(after).SerializeToString(deterministic=True)
        modified = graph_pass(after).modified
        assert modified == (ir.to_proto(after).SerializeToString(deterministic=True) != text_before)
    after = ir.from_proto(ir.to_proto(after))
    for batch in (1, 3):
        arrays = {"x": numbers(batch, *shape)}
        after_arrays = run(after, arrays)
        for name, right in run(before, arrays).items():
            np.testing.assert_array_equal(after_arrays[name], right)
    return [node.op_type for node in after.graph]


HEADS = """
    cut = Constant <value = int64[4] {0, 0, 6, 4}> ()
    rows = Reshape (x, cut)
    heads = Transpose <perm: ints = [0, 2, 1, 3]> (rows)
"""


def test_heads_of_one_token_are_not_transposed() -> None:
    """[batch, 1, heads, width] has the order in memory of [batch, heads, 1, width]."""
    body = HEADS + "y = Relu (heads)"
    left = checked(body, "float[batch, new, 24] x", "float[batch, 6, new, 4] y", 1, 24)
    assert "Transpose" not in left
    assert left.count("Reshape") == 2


def test_a_needed_transpose_stays() -> None:
    """Axes longer than 1 are exchanged."""
    body = "y = Transpose <perm: ints = [0, 1, 3, 2]> (x)"
    assert checked(body, "float[batch, new, 3, 4] x", "float[batch, new, 4, 3] y", 1, 3, 4) == ["Transpose"]


def test_parts_are_split_once() -> None:
    """Of a split by heads for the caches and one of features for attention, one `Split` is left."""
    body = (
        HEADS
        + """
    three = Constant <value = int64[3] {2, 2, 2}> ()
    wide = Constant <value = int64[3] {8, 8, 8}> ()
    q, k, v = Split <axis: int = 1> (heads, three)
    flat_q, flat_k, flat_v = Split <axis: int = -1> (x, wide)
    a = Relu (flat_q)
    b = Abs (k)
    c = Neg (v)"""
    )
    outputs = "float[batch, new, 8] a, float[batch, 2, new, 4] b, float[batch, 2, new, 4] c"
    left = checked(body, "float[batch, new, 24] x", outputs, 1, 24)
    assert left.count("Split") == 1
    assert "Transpose" not in left


def test_parts_of_every_head_stay() -> None:
    """Parts of each head are as large as parts of the features, but hold other elements."""
    body = (
        HEADS
        + """
    two = Constant <value = int64[2] {2, 2}> ()
    wide = Constant <value = int64[2] {12, 12}> ()
    left, right = Split <axis: int = 3> (heads, two)
    flat_left, flat_right = Split <axis: int = -1> (x, wide)
    a = Relu (flat_left)
    b = Abs (right)"""
    )
    outputs = "float[batch, new, 12] a, float[batch, 6, new, 2] b"
    assert checked(body, "float[batch, new, 24] x", outputs, 1, 24).count("Split") == 2


def test_parts_of_other_sizes_stay() -> None:
    """As many parts, but of other sizes: both splits are needed."""
    body = (
        HEADS
        + """
    three = Constant <value = int64[3] {2, 2, 2}> ()
    wide = Constant <value = int64[3] {4, 12, 8}> ()
    q, k, v = Split <axis: int = 1> (heads, three)
    flat_q, flat_k, flat_v = Split <axis: int = -1> (x, wide)
    a = Relu (flat_k)
    b = Abs (k)"""
    )
    outputs = "float[batch, new, 12] a, float[batch, 2, new, 4] b"
    assert checked(body, "float[batch, new, 24] x", outputs, 1, 24).count("Split") == 2


def test_one_number_is_not_counted() -> None:
    """A range over the new tokens, and the addition of its only element to positions of each sequence."""
    numbered = """
    zero = Constant <value = int64 {0}> ()
    one = Constant <value = int64 {1}> ()
    new_length = Shape <start: int = 1, end: int = 2> (x)
    new = Gather (new_length, zero)
    counted = Range (zero, new, one)
    placed = Add (x, counted)
    y = Neg (placed)"""
    body = numbered + "\n    z = Cast <to: int = 1> (counted)"
    text = f"g (int64[batch, new] x) => (int64[batch, new] y, float[new] z) <int64[new] counted> {{ {body} }}"
    after = parse(text)
    OneToken("new")(after)
    EliminateNoopAdd()(after)
    assert [node.op_type for node in after.graph if node.op_type != "Constant"] == ["Neg", "Cast"]
    found = run(after, {"x": np.array([[4], [9]])})
    np.testing.assert_array_equal(found["y"], [[-4], [-9]])
    np.testing.assert_array_equal(found["z"], [0])
