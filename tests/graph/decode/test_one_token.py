"""A step of one token: nothing is moved around an axis of one place, and the numbers stay."""

import numpy as np
import onnx_ir as ir

from accel.graph.decode.one_token import one_token, transpose_to_reshape
from tests.graph.text import numbers, parse, run


def checked(body: str, inputs: str, outputs: str, *shape: int) -> list[str]:
    """The operators left. The graph says the same for one token, whatever the batch."""
    text = f"g ({inputs}) => ({outputs}) {{ {body} }}"
    before, after = parse(text), parse(text)
    one_token(after, "new")
    transpose_to_reshape(after)
    after = ir.from_proto(ir.to_proto(after))
    for batch in (1, 3):
        given = {"x": numbers(batch, *shape)}
        found = run(after, given)
        for name, right in run(before, given).items():
            np.testing.assert_array_equal(found[name], right)
    return [node.op_type for node in after.graph]


HEADS = """
    cut = Constant <value = int64[4] {0, 0, 6, 4}> ()
    rows = Reshape (x, cut)
    heads = Transpose <perm: ints = [0, 2, 1, 3]> (rows)
"""


def test_heads_of_one_token_are_not_turned() -> None:
    """[batch, 1, heads, width] lies as [batch, heads, 1, width] does."""
    body = HEADS + "y = Relu (heads)"
    left = checked(body, "float[batch, new, 24] x", "float[batch, 6, new, 4] y", 1, 24)
    assert "Transpose" not in left
    assert left.count("Reshape") == 2


def test_what_moves_more_than_one_place_is_turned() -> None:
    body = "y = Transpose <perm: ints = [0, 1, 3, 2]> (x)"
    assert checked(body, "float[batch, new, 3, 4] x", "float[batch, new, 4, 3] y", 1, 3, 4) == ["Transpose"]


def test_parts_are_cut_once() -> None:
    """By heads for the caches and side by side for attention: one `Split` is left, and the parts are the same."""
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
    """As large as the parts side by side, but cut out of each head: other numbers."""
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
    """As many parts, cut elsewhere: both are needed."""
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
