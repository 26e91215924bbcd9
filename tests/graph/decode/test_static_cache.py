"""A step over caches of a fixed length computes what the one with growing caches does, and writes where it should."""

import numpy as np
import onnx_ir as ir
import pytest

from accel.graph.decode.static_cache import Names, NotStaticError, static_cache
from tests.graph.text import Arrays, numbers, parse, run

NAMES = Names("position", "bucket")
CACHE = {"past_k": "present_k"}
HEAD = """
    zero = Constant <value = int64 {0}> ()
    one = Constant <value = int64 {1}> ()
    two = Constant <value = int64 {2}> ()
    rows = Constant <value = int64[1] {0}> ()
    far = Constant <value = float {-1e9}> ()
    new_length = Shape <start: int = 1, end: int = 2> (x)
    new = Gather (new_length, zero)
    past_length = Shape <start: int = 1, end: int = 2> (past_k)
    past = Gather (past_length, zero)
    total = Add (past, new)
    present_k = Concat <axis: int = 1> (past_k, x)
"""
# What attention does with it: tokens see those before them, and the mask's.
ATTENTION = """
    slots = Range (zero, total, one)
    places = Range (past, total, one)
    column = Unsqueeze (places, ones)
    seen = LessOrEqual (slots, column)
    shown = Cast <to: int = 9> (attention_mask)
    shown_rows = Unsqueeze (shown, ones)
    visible = And (seen, shown_rows)
    turned = Transpose <perm: ints = [0, 2, 1]> (present_k)
    scores = MatMul (x, turned)
    masked = Where (visible, scores, far)
    shares = Softmax (masked)
    attended = MatMul (shares, present_k)
"""
INPUTS = "float[batch, new, 4] x, int64[batch, total] attention_mask, float[batch, past, 4] past_k"


def decode(body: str, outputs: str) -> ir.Model:
    ones = "    ones = Constant <value = int64[1] {1}> ()\n"
    present = f"{outputs}, float[batch, sum, 4] present_k" if outputs else "float[batch, sum, 4] present_k"
    return parse(f"g ({INPUTS}) => ({present}) {{ {HEAD}{ones}{body} }}")


def inputs(batch: int, past: int, new: int) -> Arrays:
    mask = np.ones((batch, past + new), np.int64)
    mask[-1, : min(2, past)] = 0
    return {"x": numbers(batch, new, 4), "past_k": numbers(batch, past, 4, seed=5), "attention_mask": mask}


def checked(body: str, outputs: str) -> ir.Model:
    """Both steps say the same at several lengths; what lies behind the tokens is noise, and stays as it was."""
    growing, static = decode(body, outputs), decode(body, outputs)
    static_cache(static, CACHE, NAMES)
    for batch, past, new, bucket in ((1, 3, 1, 4), (2, 5, 1, 9), (3, 4, 3, 8), (2, 1, 2, 16)):
        given = inputs(batch, past, new)
        right = run(growing, given)
        room = numbers(batch, bucket, 4, seed=9) * 3
        room[:, :past] = given["past_k"]
        mask = np.zeros((batch, bucket), np.int64)
        mask[:, : past + new] = given["attention_mask"]
        found = run(static, {**given, "past_k": room, "attention_mask": mask, "position": np.array(past)})
        written = found.pop("present_k")
        np.testing.assert_array_equal(written[:, : past + new], right.pop("present_k"))
        np.testing.assert_array_equal(written[:, past + new :], room[:, past + new :])
        for name, array in right.items():
            shared = tuple(slice(length) for length in array.shape)  # an axis of all tokens is now the bucket's
            np.testing.assert_allclose(found[name][shared], array, rtol=1e-5, atol=1e-6, err_msg=name)
    return static


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def test_attention() -> None:
    """Keys are written in place; a token sees those before it and nothing behind."""
    static = checked(ATTENTION, "float[batch, new, 4] attended")
    assert operators(static).count("TensorScatter") == 1
    assert [str(dim) for dim in static.graph.inputs[1].shape or ()] == ["batch", "bucket"]
    assert [value.name for value in static.graph.inputs][-1] == "position"


def test_positions_with_an_offset() -> None:
    """As BART's table of positions begins two rows late."""
    body = "first = Add (past, two)\n last = Add (total, two)\n places = Range (first, last, one)"
    checked(body, "int64[n] places")


def test_past_tokens_in_arithmetic() -> None:
    """A number that is added to data is where the new tokens begin."""
    body = """
        counted = CumSum (attention_mask, one)
        tail = ReduceMax <keepdims: int = 0> (attention_mask)
        shifted = Add (tail, past)"""
    checked(body, "int64 shifted")


def test_all_tokens_in_a_shape() -> None:
    """As wide as all tokens together becomes as wide as the bucket."""
    body = """
        wide = Add (past_length, new_length)
        flags = Expand (one, wide)"""
    static = checked(body, "int64[t] flags")
    assert "Expand" in operators(static)


@pytest.mark.parametrize(
    ("body", "outputs", "reason"),
    [
        ("half = Div (past, two)", "int64 half", r"\(Div\): it uses the number of past tokens"),
        ("odd = Range (one, past, one)", "int64[k] odd", r"\(Range\): it counts neither all tokens nor the new ones"),
        ("odd = Range (zero, total, two)", "int64[k] odd", r"\(Range\): it counts by what"),
        ("less = Sub (total, one)\n y = Range (zero, less, one)", "int64[k] y", r"\(Range\): it counts neither"),
        ("both = Shape <start: int = 0, end: int = 2> (past_k)", "int64[2] both", r"\(Shape\): .* together with other"),
    ],
    ids=["half of it", "from one", "in twos", "all but one", "with the batch"],
)
def test_what_a_fixed_length_cannot_answer(body: str, outputs: str, reason: str) -> None:
    """Refused by the node's name, instead of computed otherwise."""
    with pytest.raises(NotStaticError, match=reason):
        static_cache(decode(body, outputs), CACHE, NAMES)


def test_a_cache_that_does_not_simply_grow() -> None:
    """A window that slides, or a cache put together otherwise."""
    model = parse(
        f"g ({INPUTS}) => (float[batch, sum, 4] present_k) {{ present_k = Concat <axis: int = 1> (x, past_k) }}"
    )
    with pytest.raises(NotStaticError, match=r"\(Concat\): present_k is not past_k with new entries behind it"):
        static_cache(model, CACHE, NAMES)
