"""Prefill derived from a decode graph: the same outputs as decoding with caches of length 0."""

import numpy as np
import onnx_ir as ir
import pytest

from accel.graph.decode.without_past import without_past
from accel.graph.passes import NoMatchError
from tests.graph.text import numbers, parse, run

INPUTS = "float[batch, 2, new, 4] x, float[batch, 2, past, 4] cache"
OUTPUTS = "float[batch, 2, all, 4] present, float[batch, 2, new, all] y, int64[count] lengths"
BODY = """
    copy = Identity (cache)
    present = Concat <axis: int = -2> (copy, x)
    keys = Transpose <perm: ints = [0, 1, 3, 2]> (present)
    scores = MatMul (x, keys)
    bias = Cast <to = 1> (past)
    y = Add (scores, bias)
    batch = Shape <start = 0, end = 1> (cache)
    heads = Shape <start = 1, end = 2> (cache)
    past = Shape <start = 2, end = 3> (cache)
    lengths = Concat <axis = 0> (batch, heads, past)
"""


def decode(body: str = BODY) -> ir.Model:
    """Parse a decode graph with one cache."""
    lines = [line for line in body.strip().splitlines() if "= Shape" in line]
    rest = [line for line in body.strip().splitlines() if "= Shape" not in line]
    return parse(f"g ({INPUTS}) => ({OUTPUTS}) {{ {' '.join([*lines, *rest])} }}")


def test_same_outputs_as_with_an_empty_past() -> None:
    """Lengths, the cache itself and what is computed from it; the decode graph keeps its input."""
    model = decode()
    derived = without_past(model, ["cache"], "past")
    assert [value.name for value in derived.graph.inputs] == ["x"]
    assert [value.name for value in model.graph.inputs] == ["x", "cache"]
    derived = ir.from_proto(ir.to_proto(derived))
    for batch, new in ((1, 1), (3, 5)):
        x = numbers(batch, 2, new, 4)
        expected = run(model, {"x": x, "cache": np.zeros((batch, 2, 0, 4), np.float32)})
        found = run(derived, {"x": x})
        assert list(found) == list(expected)
        for name, values in expected.items():
            np.testing.assert_array_equal(found[name], values)


@pytest.mark.parametrize(
    "change",
    [
        ("Identity (cache)", "Relu (cache)"),
        ("axis: int = -2", "axis: int = 0"),
        ("start = 0, end = 1> (cache)", "start = 0, end = 2> (cache)"),
    ],
)
def test_other_uses_are_refused(change: tuple[str, str]) -> None:
    """A cache that is computed with, joined along another axis, or asked for several lengths."""
    with pytest.raises(NoMatchError, match="cache"):
        without_past(decode(BODY.replace(*change)), ["cache"], "past")
