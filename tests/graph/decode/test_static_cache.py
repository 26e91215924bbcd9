"""Decode graphs with static caches give the outputs of dynamic ones, and write entries where they belong."""

import numpy as np
import onnx_ir as ir
import pytest

from accel.graph.decode.static_cache import Names, NotStaticError, StaticCache
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
# Causal attention over the cache, with the attention mask.
ATTENTION = """
    keys = Range (zero, total, one)
    places = Range (past, total, one)
    column = Unsqueeze (places, ones)
    seen = LessOrEqual (keys, column)
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
    """The static graph, after checking it against the dynamic one at several lengths.

    The static cache holds noise behind the tokens, which stays as it was.
    """
    dynamic, static = decode(body, outputs), decode(body, outputs)
    assert StaticCache(CACHE, NAMES)(static).modified
    for batch, past, new, bucket in ((1, 3, 1, 4), (2, 5, 1, 9), (3, 4, 3, 8), (2, 1, 2, 16)):
        given = inputs(batch, past, new)
        right = run(dynamic, given)
        buffer = numbers(batch, bucket, 4, seed=9) * 3
        buffer[:, :past] = given["past_k"]
        mask = np.zeros((batch, bucket), np.int64)
        mask[:, : past + new] = given["attention_mask"]
        found = run(static, {**given, "past_k": buffer, "attention_mask": mask, "position": np.array(past)})
        written = found.pop("present_k")
        np.testing.assert_array_equal(written[:, : past + new], right.pop("present_k"))
        np.testing.assert_array_equal(written[:, past + new :], buffer[:, past + new :])
        for name, array in right.items():
            shared = tuple(slice(length) for length in array.shape)  # an axis of all tokens is now the bucket's
            np.testing.assert_allclose(found[name][shared], array, rtol=1e-5, atol=1e-6, err_msg=name)
    return static


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def test_attention() -> None:
    """Keys are written in place, and a token attends to those before it alone."""
    static = checked(ATTENTION, "float[batch, new, 4] attended")
    assert operators(static).count("TensorScatter") == 1
    assert [str(dim) for dim in static.graph.inputs[1].shape or ()] == ["batch", "bucket"]
    assert [value.name for value in static.graph.inputs][-1] == "position"


def test_positions_with_an_offset() -> None:
    """Positions plus two, as in BART."""
    body = "first = Add (past, two)\n last = Add (total, two)\n places = Range (first, last, one)"
    checked(body, "int64[n] places")


def test_past_tokens_in_arithmetic() -> None:
    """A number of past tokens that is added to data becomes the position of the new tokens."""
    body = """
        counted = CumSum (attention_mask, one)
        tail = ReduceMax <keepdims: int = 0> (attention_mask)
        shifted = Add (tail, past)"""
    checked(body, "int64 shifted")


def test_all_tokens_in_a_shape() -> None:
    """A shape of all tokens becomes one of the bucket."""
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
        ("odd = Range (zero, total, two)", "int64[k] odd", r"\(Range\): its limits are no sums"),
        ("less = Sub (total, one)\n y = Range (zero, less, one)", "int64[k] y", r"\(Range\): it counts neither"),
        ("both = Shape <start: int = 0, end: int = 2> (past_k)", "int64[2] both", r"\(Shape\): .* together with other"),
    ],
    ids=["half of it", "from one", "in twos", "all but one", "with the batch"],
)
def test_unsupported_uses_of_past_tokens(body: str, outputs: str, reason: str) -> None:
    """The error names the node; nothing is computed otherwise."""
    with pytest.raises(NotStaticError, match=reason):
        StaticCache(CACHE, NAMES)(decode(body, outputs))


def test_a_cache_that_is_not_appended_to() -> None:
    """Such as a sliding window, or entries in front of the past."""
    model = parse(
        f"g ({INPUTS}) => (float[batch, sum, 4] present_k) {{ present_k = Concat <axis: int = 1> (x, past_k) }}"
    )
    with pytest.raises(NotStaticError, match=r"\(Concat\): present_k is not past_k with new entries appended"):
        StaticCache(CACHE, NAMES)(model)
