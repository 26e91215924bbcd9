"""Prefill and decode derived from a graph that appends cross-attention keys to an empty cache."""

import numpy as np
import onnx_ir as ir
import pytest

from accel.graph.decode.cross_caches import with_cross_inputs, with_cross_outputs
from accel.graph.passes import NoMatchError
from tests.graph.text import numbers, parse, run

INPUTS = "float[batch, 2, new, 4] x, float[batch, source, 8] encoded, float[batch, 2, 0, 4] cache"
BODY = """
    batch = Shape <start = 0, end = 1> (cache)
    split = Concat <axis = 0> (batch, rest)
    projected = MatMul (encoded, weight)
    heads = Reshape (projected, split)
    keys = Transpose <perm = [0, 2, 1, 3]> (heads)
    all = Concat <axis = 2> (cache, keys)
    turned = Transpose <perm = [0, 1, 3, 2]> (all)
    y = MatMul (x, turned)
"""
SHAPES = {"cache": ["batch", 2, "source", 4]}
WEIGHTS = {"weight": numbers(8, 8), "rest": np.array([-1, 2, 4], np.int64)}


def joint(body: str = BODY) -> ir.Model:
    """Parse a decoder with one cross-attention cache, of length 0, and one output."""
    return parse(f"g ({INPUTS}) => (float[batch, 2, new, source] y) {{ {body} }}", WEIGHTS)


def test_prefill_returns_what_decode_takes() -> None:
    """Both compute the joint graph's output; decode neither projects nor holds the weight; the joint graph stays."""
    model = joint()
    prefill = with_cross_outputs(model, {"cache": "present"}, SHAPES)
    decode = with_cross_inputs(model, SHAPES)
    assert [value.name for value in model.graph.inputs] == ["x", "encoded", "cache"]
    assert [value.name for value in prefill.graph.inputs] == ["x", "encoded"]
    assert [value.name for value in prefill.graph.outputs] == ["y", "present"]
    assert str(prefill.graph.outputs[1].shape) == "[batch,2,source,4]"
    assert [value.name for value in decode.graph.inputs] == ["x", "encoded", "cache"]
    assert str(decode.graph.inputs[2].shape) == "[batch,2,source,4]"
    assert "weight" in prefill.graph.initializers
    assert "weight" not in decode.graph.initializers
    for batch, new, source in ((1, 1, 1), (3, 2, 5)):
        inputs = {"x": numbers(batch, 2, new, 4), "encoded": numbers(batch, source, 8)}
        expected = run(model, inputs | {"cache": np.zeros((batch, 2, 0, 4), np.float32)})["y"]
        found = run(prefill, inputs)
        np.testing.assert_array_equal(found["y"], expected)
        projected = (inputs["encoded"] @ WEIGHTS["weight"]).reshape(batch, source, 2, 4).transpose(0, 2, 1, 3)
        np.testing.assert_allclose(found["present"], projected, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(run(decode, inputs | {"cache": found["present"]})["y"], expected)


@pytest.mark.parametrize(
    "change",
    [
        ("all = Concat <axis = 2> (cache, keys)", "all = Concat <axis = 2> (keys, cache)"),
        ("all = Concat <axis = 2> (cache, keys)", "all = Add (cache, keys)"),
        ("y = MatMul (x, turned)", "more = Relu (cache) y = MatMul (x, turned)"),
    ],
)
def test_other_uses_are_refused(change: tuple[str, str]) -> None:
    """A cache that is joined behind what is computed, computed with, or read by a further node."""
    with pytest.raises(NoMatchError, match="reads cache"):
        with_cross_outputs(joint(BODY.replace(*change)), {"cache": "present"}, SHAPES)
    with pytest.raises(NoMatchError, match="reads cache"):
        with_cross_inputs(joint(BODY.replace(*change)), SHAPES)


def test_a_cache_that_is_not_computed_is_refused() -> None:
    """The encoder's output itself, without a projection, can't become an output of prefill."""
    body = "all = Concat <axis = 2> (cache, x) turned = Transpose <perm = [0, 1, 3, 2]> (all) y = MatMul (x, turned)"
    with pytest.raises(NoMatchError, match="cache is not computed"):
        with_cross_outputs(joint(body), {"cache": "present"}, SHAPES)
