"""Keys and values that several queries share are not repeated for each of them."""

import numpy as np
import pytest

from accel.graph.fusion.fuse_gqa import FuseGqa
from tests.graph.text import numbers, parse, rewritten

INPUTS = "float[batch, 6, 1, 4] query, float[batch, 2, t, 4] key, float[batch, 2, t, 4] value, float[BIAS] bias"
WEIGHTS = {
    "apart": np.array([2]),
    "half": np.array(0.5, np.float32),
    "repeats": np.array([1, 1, 3, 1, 1]),
    "together": np.array([0, 6, -1, 4]),
}
BODY = """
    keys_apart = Unsqueeze (key, apart)
    keys_each = Expand (keys_apart, repeats)
    keys = Reshape (keys_each, together)
    values_apart = Unsqueeze (value, apart)
    values_each = Expand (values_apart, repeats)
    values = Reshape (values_each, together)
    turned = Transpose <perm: ints = [0, 1, 3, 2]> (keys)
    scores = MatMul (query, turned)
    scaled = Mul (scores, half)
    biased = Add (scaled, bias)
    shares = Softmax <axis: int = -1> (biased)
    mixed = MatMul (shares, values)
    y = Neg (mixed)
"""


def left(body: str = BODY, bias: str = "batch, 1, 1, t", heads: int = 1) -> list[str]:
    """The operators left; the numbers are the same for several batches and lengths."""
    text = f"g ({INPUTS.replace('BIAS', bias)}) => (float[batch, 6, 1, 4] y) {{ {body} }}"
    model = parse(text, WEIGHTS)
    for node in model.graph:  # as the exporter notes what inference doesn't follow
        if node.outputs[0].name in ("keys", "values"):
            key = model.graph.inputs[1]
            node.outputs[0].shape = type(key.shape)([key.shape[0], 6, key.shape[2], 4])  # type: ignore[index, call-arg, misc]
    inputs = [
        {
            "query": numbers(batch, 6, 1, 4),
            "key": numbers(batch, 2, length, 4, seed=1),
            "value": numbers(batch, 2, length, 4, seed=2),
            "bias": numbers(batch, heads, 1, length, seed=3),
        }
        for batch, length in ((1, 5), (3, 2))
    ]
    (found,) = rewritten(FuseGqa(), [model], inputs)
    return found


def test_nothing_is_repeated() -> None:
    """Three queries a group: two reshapes in place of two copies of the cache, and each query finds its own keys."""
    found = left()
    assert "Expand" not in found
    assert found.count("Reshape") == 2
    assert found.count("MatMul") == 2


@pytest.mark.parametrize(
    ("body", "bias", "heads", "reason"),
    [
        (BODY, "batch, 6, 1, t", 6, "the bias of the scores differs between heads"),
        (
            BODY.replace("scaled = Mul (scores, half)", "scaled = Tanh (scores)"),
            "batch, 1, 1, t",
            1,
            "not the product of",
        ),
        (
            BODY.replace(
                "y = Neg (mixed)", "doubled = ReduceMax <keepdims: int = 1> (shares)\n y = Add (mixed, doubled)"
            ),
            "batch, 1, 1, t",
            1,
            "not read by one product alone",
        ),
        (BODY.replace("axis: int = -1", "axis: int = 1"), "batch, 1, 1, t", 1, "the softmax is over axis 1"),
    ],
    ids=["a bias for each head", "something else between", "shares that are read twice", "shares among heads"],
)
def test_what_needs_all_heads(body: str, bias: str, heads: int, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    """Stays, and the log says why."""
    caplog.set_level("DEBUG", "accel.graph.passes")
    assert left(body, bias, heads).count("Expand") == 2
    assert "fuse_gqa: no match at Softmax" in caplog.text
    assert reason in caplog.text
