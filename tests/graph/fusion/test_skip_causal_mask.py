"""Attention over a prompt reads its mask only where that hides more than later tokens."""

import numpy as np
import onnx_ir as ir
import pytest

from accel.graph.fusion.skip_causal_mask import SkipCausalMask
from tests.graph.text import numbers, parse, run

ATTENTION = """
    y = com.microsoft.MultiHeadAttention <num_heads: int = 3> (q, k, v, , , mask)
    n = com.microsoft.MultiHeadAttention <num_heads: int = 3> (y, k, v, , , mask)
"""
HIDDEN = np.float32(-3e38)


def graph(mask: str = "float[b, 1, s, s]", keys: str = "s") -> ir.Model:
    """Two attentions behind each other with one mask; queries [b, s, 12], heads of width 4."""
    inputs = f"float[b, s, 12] q, float[b, {keys}, 12] k, float[b, {keys}, 12] v, {mask} mask"
    model = parse(f"g ({inputs}) => (float[b, s, 12] n) {{ {ATTENTION} }}")
    for node in model.graph:
        node.outputs[0].shape = ir.Shape(["b", "s", 12])
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    return model


def causal(batch: int, length: int) -> np.ndarray:
    return np.where(np.tril(np.ones((batch, 1, length, length), bool)), np.float32(0), HIDDEN)


def padded(batch: int, length: int) -> np.ndarray:
    mask = causal(batch, length)
    mask[-1, :, 2:, :2] = HIDDEN
    return mask


def window(batch: int, length: int) -> np.ndarray:
    return np.where(np.triu(np.ones((length, length), bool), -2), causal(batch, length), HIDDEN)


def lookahead(batch: int, length: int) -> np.ndarray:
    mask = causal(batch, length)
    mask[0, :, 1, 2] = 0
    return mask


@pytest.mark.parametrize("make", [causal, padded, window, lookahead])
@pytest.mark.parametrize(("batch", "length"), [(1, 6), (3, 5)])
def test_numbers_stay(make: object, batch: int, length: int) -> None:
    """Whatever the mask hides, with one condition for both attentions."""
    model = graph()
    rows = {name: numbers(batch, length, 12, seed=seed) for seed, name in enumerate("qkv")}
    inputs = rows | {"mask": make(batch, length)}  # type: ignore[operator]
    before = run(model, inputs)["n"]
    SkipCausalMask()(model)
    found = [node.op_type for node in model.graph]
    assert found.count("If") == 2
    assert found.count("ReduceMin") == 1
    assert "MultiHeadAttention" not in found
    np.testing.assert_allclose(run(model, inputs)["n"], before, rtol=1e-5, atol=1e-6)


def test_the_branch_depends_on_the_mask() -> None:
    """With other weights in the branch that reads no mask, only a mask that hides later tokens alone shows them."""
    model = graph()
    rows = {name: numbers(2, 6, 12, seed=seed) for seed, name in enumerate("qkv")}
    before = {make: run(model, rows | {"mask": make(2, 6)})["n"] for make in (causal, padded, window, lookahead)}
    SkipCausalMask()(model)
    for node in model.graph:
        if node.op_type == "If":
            branch = node.attributes["then_branch"].as_graph()
            branch[0].attributes["scale"] = ir.AttrFloat32("scale", 9.0)
    changed = {make: not np.allclose(run(model, rows | {"mask": make(2, 6)})["n"], old) for make, old in before.items()}
    assert changed == {causal: True, padded: False, window: False, lookahead: False}


@pytest.mark.parametrize(
    ("mask", "keys", "reason"),
    [("float[b, 3, s, s]", "s", "differs between heads"), ("float[b, 1, s, t]", "t", "other keys than the queries")],
)
def test_left_alone(mask: str, keys: str, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    """A bias by head is no mask, and with a past the kernel would count from another token."""
    caplog.set_level("DEBUG", "accel.graph.passes")
    model = graph(mask, keys)
    assert not SkipCausalMask()(model).modified
    assert reason in caplog.text
