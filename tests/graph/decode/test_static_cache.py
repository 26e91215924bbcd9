"""Decode graphs with static caches give the outputs of dynamic ones, and write entries where they belong."""

import numpy as np
import onnx_ir as ir
import pytest

from accel.graph.decode.per_sequence import NotStaticError
from accel.graph.decode.static_cache import Names, StaticCache
from accel.graph.shapes import dims
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


def inputs(row: int, past: int, new: int) -> Arrays:
    """Inputs of one sequence; its first tokens are padding in every second."""
    mask = np.ones((1, past + new), np.int64)
    mask[:, : min(2, past) * (row % 2)] = 0
    return {"x": numbers(1, new, 4, seed=row), "past_k": numbers(1, past, 4, seed=5 + row), "attention_mask": mask}


def checked(body: str, outputs: str) -> ir.Model:
    """The static graph, after checking it against the dynamic one at several lengths, each sequence at its own.

    The static cache holds noise behind the tokens, which stays as it was.
    """
    dynamic, static = decode(body, outputs), decode(body, outputs)
    assert StaticCache(CACHE, NAMES)(static).modified
    for lengths, new, bucket in (((3,), 1, 4), ((5, 5), 1, 9), ((4, 1, 2), 3, 8), ((1, 7), 2, 16)):
        batch = len(lengths)
        buffer, x = numbers(batch, bucket, 4, seed=9) * 3, numbers(batch, new, 4)
        mask = np.zeros((batch, bucket), np.int64)
        alone = [inputs(row, past, new) for row, past in enumerate(lengths)]
        for row, (past, given) in enumerate(zip(lengths, alone, strict=True)):
            buffer[row, :past], x[row] = given["past_k"][0], given["x"][0]
            mask[row, : past + new] = given["attention_mask"][0]
        given = {"x": x, "past_k": buffer, "attention_mask": mask, "position": np.array(lengths)}
        found = run(static, given)
        written = found.pop("present_k")
        for row, past in enumerate(lengths):
            right = run(dynamic, alone[row])
            np.testing.assert_array_equal(written[row, : past + new], right.pop("present_k")[0])
            np.testing.assert_array_equal(written[row, past + new :], buffer[row, past + new :])
            for name, array in right.items():
                if found[name].ndim and len(found[name]) == batch:
                    array, of_row = array[0], found[name][row]
                else:
                    of_row = found[name]
                shared = tuple(slice(length) for length in array.shape)  # an axis of all tokens is now the bucket's
                np.testing.assert_allclose(of_row[shared], array, rtol=1e-5, atol=1e-6, err_msg=name)
    return static


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def test_attention() -> None:
    """Keys are written in place, and a token attends to those before it in its sequence alone."""
    static = checked(ATTENTION, "float[batch, new, 4] attended")
    assert operators(static).count("TensorScatter") == 1
    assert [str(dim) for dim in static.graph.inputs[1].shape or ()] == ["batch", "bucket"]
    position = static.graph.inputs[-1]
    assert position.name == "position"
    assert dims(position) == ("batch",)


def test_positions_with_an_offset() -> None:
    """Positions plus two, as in BART."""
    body = """
        first = Add (past, two)
        last = Add (total, two)
        places = Range (first, last, one)
        column = Unsqueeze (places, ones)
        numbered = Cast <to: int = 1> (column)
        embedded = Add (x, numbered)"""
    checked(body, "float[batch, new, 4] embedded")


def test_past_tokens_in_arithmetic() -> None:
    """A number of past tokens that is added to data becomes the position of the new tokens."""
    body = """
        shown = ReduceSum <keepdims: int = 0> (attention_mask, ones)
        shifted = Add (shown, past)"""
    checked(body, "int64[batch] shifted")


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
        ("y = Range (past, total, one)", "int64[n] y", r"\(Add\): its output depends on positions and has no axis of"),
        ("both = Shape <start: int = 0, end: int = 2> (past_k)", "int64[2] both", r"\(Shape\): .* together with other"),
    ],
    ids=["half of it", "from one", "in twos", "all but one", "as an output", "with the batch"],
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
