"""Attention becomes one node where the operator means the same, and stays where it does not."""

import numpy as np
import onnx_ir as ir
import pytest

from accel.graph.fusion.fuse_attention import FuseAttention
from tests.graph.text import numbers, parse, run

INPUTS = "float[b, s, 12] x, float[b, 3, p, 4] past_key, float[b, 3, p, 4] past_value, float[b, 1, s, t] mask"
SELF = """
    q = MatMul(x, wq)
    k = MatMul(x, wk)
    v = MatMul(x, wv)
    q_cut = Reshape(q, heads)
    k_cut = Reshape(k, heads)
    v_cut = Reshape(v, heads)
    query = Transpose <perm: ints = [0, 2, 1, 3]> (q_cut)
    new_key = Transpose <perm: ints = [0, 2, 1, 3]> (k_cut)
    new_value = Transpose <perm: ints = [0, 2, 1, 3]> (v_cut)
"""
JOINED = """
    qkv = MatMul(x, wqkv)
    cut = Reshape(qkv, all_heads)
    turned = Transpose <perm: ints = [0, 2, 1, 3]> (cut)
    query, new_key, new_value = Split <axis: int = 1> (turned, three)
"""
GROW = """
    key = Concat <axis: int = -2> (past_key, new_key)
    value = Concat <axis: int = 2> (past_value, new_value)
"""
SCORES = """
    keys = Transpose <perm: ints = [0, 1, 3, 2]> (key)
    scores = MatMul(query, keys)
    biased = Add(scores, mask)
"""
REST = """
    shares = Softmax <axis: int = -1> (biased)
    mixed = MatMul(shares, value)
    back = Transpose <perm: ints = [0, 2, 1, 3]> (mixed)
    y = Reshape(back, flat)
"""
WEIGHTS = {
    "wq": numbers(12, 12),
    "wk": numbers(12, 12, seed=1),
    "wv": numbers(12, 12, seed=2),
    "wqkv": np.concatenate([numbers(12, 12, seed=seed) for seed in range(3)], axis=1),
    "heads": np.array([0, 0, 3, 4]),
    "all_heads": np.array([0, 0, 9, 4]),
    "three": np.array([3, 3, 3]),
    "flat": np.array([0, 0, 12]),
    "half": np.array(0.5, np.float32),
    "columns": numbers(3, 1, 1),
}
GROWN = "float[b, s, 12] y, float[b, 3, t, 4] key, float[b, 3, t, 4] value"


def graph(*parts: str, inputs: str = INPUTS, outputs: str = GROWN) -> ir.Model:
    """The parts in order; lengths that inference can't follow through a `Concat` are written in."""
    body = "\n".join(parts)
    used = {name: array for name, array in WEIGHTS.items() if f"{name})" in body or f"{name}," in body}
    model = parse(f"g ({inputs}) => ({outputs}) {{ {body} }}", used)
    for node in model.graph:
        for value in node.outputs:
            if value.name in ("scores", "biased", "shares", "halved"):
                value.shape = ir.Shape(["b", 3, "s", "t"])
    return model


def arrays(batch: int, new: int, past: int) -> dict[str, np.ndarray]:
    bias = numbers(batch, 1, new, past + new)
    mask = np.where(bias > 1, np.float32(-1e9), bias)
    cache = {"past_key": numbers(batch, 3, past, 4), "past_value": numbers(batch, 3, past, 4, seed=4)}
    return {"x": numbers(batch, new, 12), "mask": mask, **cache}


def checked(model: ir.Model, nodes: int) -> ir.Model:
    """The graph after the pass with `nodes` attentions in it, every output what it was at several lengths."""
    given = [arrays(*lengths) for lengths in ((1, 1, 5), (2, 1, 3), (3, 4, 2), (2, 3, 1))]
    before = [run(model, each) for each in given]
    FuseAttention()(model)
    assert [node.op_type for node in model.graph].count("MultiHeadAttention") == nodes
    for each, expected in zip(given, before, strict=True):
        found = run(model, each)
        for name, array in expected.items():
            np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-5, err_msg=name)
    return model


@pytest.mark.parametrize("start", [SELF, JOINED], ids=["three products", "one product"])
def test_caches_grow_inside_the_node(start: str) -> None:
    """The past goes in, what the next step needs comes out; nothing turns heads around any more."""
    model = checked(graph(start, GROW, SCORES, REST), 1)
    left = {node.op_type for node in model.graph}
    assert left <= {"MatMul", "MultiHeadAttention", "Split", "Constant"}
    node = next(node for node in model.graph if node.op_type == "MultiHeadAttention")
    assert (node.attributes["num_heads"].as_int(), node.attributes["scale"].as_float()) == (3, 1.0)
    assert [value.name for value in node.outputs] == ["y", "key", "value"]


def test_fixed_caches_are_read_as_they_are() -> None:
    """Cross-attention: keys and values were made once and do not grow."""
    inputs = INPUTS.replace("float[b, 1, s, t] mask", "float[b, 1, s, p] mask")
    model = parse(
        f"g ({inputs}) => (float[b, s, 12] y) {{ {SELF} {SCORES} {REST} }}".replace("(key)", "(past_key)").replace(
            "(shares, value)", "(shares, past_value)"
        ),
        {name: WEIGHTS[name] for name in ("wq", "wk", "wv", "heads", "flat")},
    )
    given = arrays(2, 1, 6) | {"mask": numbers(2, 1, 1, 6)}
    before = run(model, given)
    FuseAttention()(model)
    node = next(node for node in model.graph if node.op_type == "MultiHeadAttention")
    names = [value.name if value else None for value in node.inputs]
    assert names == ["q", "past_key", "past_value", None, None, "mask"]
    np.testing.assert_allclose(run(model, given)["y"], before["y"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("scaling", "factor"), [("halved = Mul(scores, half)", 0.5), ("halved = Div(scores, half)", 2.0)]
)
def test_scores_may_be_scaled(scaling: str, factor: float) -> None:
    """By a constant, before the mask is added."""
    scores = SCORES.replace("biased = Add(scores, mask)", f"{scaling}\n biased = Add(mask, halved)")
    model = checked(graph(SELF, GROW, scores, REST), 1)
    node = next(node for node in model.graph if node.op_type == "MultiHeadAttention")
    assert node.attributes["scale"].as_float() == factor


def test_without_a_mask() -> None:
    """Nothing is added."""
    scores = SCORES.replace("biased = Add(scores, mask)", "")
    checked(graph(SELF, GROW, scores, REST.replace("(biased)", "(scores)")), 1)


ENCODER = SELF.replace("new_value", "value").replace("new_key = Transpose <perm: ints = [0, 2, 1, 3]> (k_cut)", "")
TURNED = SCORES.replace("Transpose <perm: ints = [0, 1, 3, 2]> (key)", "Transpose <perm: ints = [0, 2, 3, 1]> (k_cut)")


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_an_encoder_has_rows_alone(factor: float) -> None:
    """No cache is returned: one `Transpose` cuts and turns the keys, no heads are left; queries may be multiples."""
    start = ENCODER if factor == 1 else ENCODER.replace("Reshape(q, heads)", "Reshape(q_half, heads)")
    scaling = "" if factor == 1 else "q_half = Mul(q, half)"
    start = start.replace("k = MatMul", f"{scaling}\n k = MatMul", 1)
    model = graph(start, TURNED, REST, inputs="float[b, s, 12] x, float[b, 1, s, t] mask", outputs="float[b, s, 12] y")
    given = [{"x": numbers(b, s, 12), "mask": numbers(b, 1, s, s, seed=s)} for b, s in ((1, 5), (3, 2))]
    before = [run(model, each)["y"] for each in given]
    FuseAttention()(model)
    node = next(node for node in model.graph if node.op_type == "MultiHeadAttention")
    assert [value.name if value else None for value in node.inputs] == ["q", "k", "v", None, None, "mask"]
    assert node.attributes["scale"].as_float() == factor
    assert {node.op_type for node in model.graph} <= {"MatMul", "MultiHeadAttention", "Constant"}
    for each, expected in zip(given, before, strict=True):
        np.testing.assert_allclose(run(model, each)["y"], expected, rtol=1e-5, atol=1e-5)


def test_keys_that_turn_otherwise_leave_nothing_behind() -> None:
    """Where the attention around keys cut and turned in one node isn't fused, the graph is as it was."""
    rest = REST.replace("<axis: int = -1>", "<axis: int = 2>")
    inputs = "float[b, s, 12] x, float[b, 1, s, t] mask"
    model = graph(ENCODER, TURNED.replace("mask)", "columns)"), rest, inputs=inputs, outputs="float[b, s, 12] y")
    before = [node.op_type for node in model.graph]
    FuseAttention()(model)
    assert [node.op_type for node in model.graph] == before


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ((SELF, GROW, SCORES.replace("mask)", "columns)"), REST), "not a scaled product"),
        ((SELF, GROW, SCORES, REST.replace("<axis: int = -1>", "<axis: int = 2>")), "expected 4 axes and axis=-1"),
        ((SELF, GROW, SCORES, REST, "z = Neg(shares)"), "shares is read by MatMul, Neg, expected one MatMul"),
        ((SELF, GROW, SCORES, REST, "z = Neg(mixed)"), "mixed is read by Transpose, Neg, expected one Transpose"),
        (
            (SELF, GROW, SCORES.replace("Transpose <perm: ints = [0, 1, 3, 2]> (key)", "Identity(key)"), REST),
            "not a scaled product",
        ),
        (
            (SELF, GROW, SCORES, REST.replace("(back, flat)", "(mixed, flat)")),
            "mixed is read by Transpose, Reshape, expected one Transpose",
        ),
    ],
    ids=["bias by head alone", "over queries", "shares are read", "mix is read", "keys unturned", "heads unturned"],
)
def test_left_alone(parts: tuple[str, ...], reason: str, caplog: pytest.LogCaptureFixture) -> None:
    """Near misses, which the operator would compute differently or whose inside another node reads, say why."""
    caplog.set_level("DEBUG", "accel.graph.passes")
    outputs = GROWN + (", float[b, 3, s, u] z" if len(parts) > 4 else "")
    model = graph(*parts, outputs=outputs)
    FuseAttention()(model)
    assert not any(node.op_type == "MultiHeadAttention" for node in model.graph)
    assert "fuse_attention: no match at Softmax" in caplog.text
    assert reason in caplog.text


def test_two_precisions_stay_apart(caplog: pytest.LogCaptureFixture) -> None:
    """Where the plan keeps a part of an attention in FP32, there are casts in it, and it is not one node."""
    model = graph(SELF, GROW, SCORES, REST)
    next(value for node in model.graph for value in node.outputs if value.name == "query").type = ir.TensorType(
        ir.DataType.FLOAT16
    )
    caplog.set_level("DEBUG", "accel.graph.passes")
    FuseAttention()(model)
    assert not any(node.op_type == "MultiHeadAttention" for node in model.graph)
    assert "several types: FLOAT, FLOAT16" in caplog.text
