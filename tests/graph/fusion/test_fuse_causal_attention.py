"""Causal attention over growing caches becomes one node, and attention that may look ahead stays."""

import numpy as np
import onnx_ir as ir
import pytest

from accel.graph.fusion.fuse_causal_attention import FuseCausalAttention
from tests.graph.text import Arrays, numbers, parse, rewritten

HEADS, GROUPS, WIDTH = 6, 2, 8
SHAPES = {  # what the exporter notes and inference doesn't follow
    "key": ("b", GROUPS, "t", WIDTH),
    "value": ("b", GROUPS, "t", WIDTH),
    "keys": ("b", HEADS, "t", WIDTH),
    "values": ("b", HEADS, "t", WIDTH),
    "turned": ("b", HEADS, WIDTH, "t"),
    "scores": ("b", HEADS, "s", "t"),
    "scaled": ("b", HEADS, "s", "t"),
    "biased": ("b", HEADS, "s", "t"),
    "shares": ("b", HEADS, "s", "t"),
    "mixed": ("b", HEADS, "s", WIDTH),
    "back": ("b", "s", HEADS, WIDTH),
    "y": ("b", "s", HEADS * WIDTH),
}
WEIGHTS = {
    "apart": np.array([2]),
    "third": np.array(1 / 3, np.float32),
    "repeats": np.array([1, 1, HEADS // GROUPS, 1, 1]),
    "together": np.array([0, HEADS, -1, WIDTH]),
    "flat": np.array([0, 0, HEADS * WIDTH]),
}
INPUTS = (
    f"float[b, {HEADS}, s, {WIDTH}] query, float[b, {GROUPS}, s, {WIDTH}] new_key, "
    f"float[b, {GROUPS}, s, {WIDTH}] new_value, float[b, {GROUPS}, p, {WIDTH}] past_key, "
    f"float[b, {GROUPS}, p, {WIDTH}] past_value, float[MASK] mask"
)
OUTPUTS = f"float[b, s, {HEADS * WIDTH}] y, float[b, {GROUPS}, t, {WIDTH}] key, float[b, {GROUPS}, t, {WIDTH}] value"
BODY = """
    key = Concat <axis: int = -2> (past_key, new_key)
    value = Concat <axis: int = 2> (past_value, new_value)
    keys_apart = Unsqueeze (key, apart)
    keys_each = Expand (keys_apart, repeats)
    keys = Reshape (keys_each, together)
    values_apart = Unsqueeze (value, apart)
    values_each = Expand (values_apart, repeats)
    values = Reshape (values_each, together)
    turned = Transpose <perm: ints = [0, 1, 3, 2]> (keys)
    scores = MatMul (query, turned)
    scaled = Mul (scores, third)
    biased = Add (scaled, mask)
    shares = Softmax <axis: int = -1> (biased)
    mixed = MatMul (shares, values)
    back = Transpose <perm: ints = [0, 2, 1, 3]> (mixed)
    y = Reshape (back, flat)
"""
UNMASKED = BODY.replace("biased = Add (scaled, mask)", "").replace("(biased)", "(scaled)")
# One sequence: a prompt, a prompt of several blocks, a continued prompt. Several: prompts, and one token each.
LENGTHS = ((1, 5, 0), (1, 70, 0), (1, 4, 3), (3, 5, 0), (2, 1, 6), (1, 1, 9))


def arrays(batch: int, new: int, past: int, window: int | None = None) -> Arrays:
    """Inputs with a causal mask that hides the first token of the first of several sequences from the others."""
    query, token = np.arange(past, past + new)[:, None], np.arange(past + new)[None, :]
    hidden = token > query
    if window is not None:
        hidden |= token <= query - window
    mask = np.where(hidden, np.float32(-1e9), np.float32(0))[None, None].repeat(batch, axis=0)
    if batch > 1:
        mask[0, :, 1 - past if past < 1 else 0 :, 0] = -1e9
    shapes = {"query": (HEADS, new), "new_key": (GROUPS, new), "new_value": (GROUPS, new)}
    shapes |= {"past_key": (GROUPS, past), "past_value": (GROUPS, past)}
    return {"mask": mask} | {
        name: numbers(batch, heads, length, WIDTH, seed=seed)
        for seed, (name, (heads, length)) in enumerate(shapes.items())
    }


def graph(body: str = BODY, mask: str = "b, 1, s, t", inputs: str = INPUTS, outputs: str = OUTPUTS) -> ir.Model:
    used = {name: array for name, array in WEIGHTS.items() if f"{name})" in body}
    model = parse(f"g ({inputs.replace('MASK', mask)}) => ({outputs}) {{ {body} }}", used)
    for node in model.graph:
        for value in node.outputs:
            if value.name in SHAPES:
                value.shape = ir.Shape(SHAPES[value.name])
    return model


@pytest.mark.parametrize("window", [None, 3])
def test_groups_share_keys_and_values(window: int | None) -> None:
    """Nothing is repeated, the caches grow inside the node, and the mask may hide more than later tokens."""
    given = [arrays(*lengths, window=window) for lengths in LENGTHS]
    (found,) = rewritten(FuseCausalAttention(), [graph()], given)
    assert found.count("GroupQueryAttention") == 1
    assert not {"Softmax", "MatMul"} & set(found)


def test_every_head_with_its_own_keys() -> None:
    """Plain multi-head attention is the case of one query a group."""
    body = BODY.replace("(keys)", "(key)").replace("(shares, values)", "(shares, value)")
    for line in body.splitlines():
        if "_apart" in line or "_each" in line:
            body = body.replace(line + "\n", "")
    inputs = INPUTS.replace(f"[b, {GROUPS},", f"[b, {HEADS},")
    outputs = OUTPUTS.replace(f"[b, {GROUPS},", f"[b, {HEADS},")
    model = graph(body, inputs=inputs, outputs=outputs)
    for node in model.graph:
        for value in node.outputs:
            if value.name in ("key", "value"):
                value.shape = ir.Shape(["b", HEADS, "t", WIDTH])
    given = []
    for lengths in LENGTHS:
        each = dict(arrays(*lengths))
        for name in ("new_key", "new_value", "past_key", "past_value"):
            each[name] = each[name].repeat(HEADS // GROUPS, axis=1) + numbers(HEADS, 1, 1)
        given.append(each)
    (found,) = rewritten(FuseCausalAttention(), [model], given)
    assert found.count("GroupQueryAttention") == 1


def test_lengths_are_computed_once() -> None:
    """Two layers with one mask share the lengths."""
    second = BODY
    for name in (*SHAPES, "keys_apart", "keys_each", "values_apart", "values_each", "query", "new_key", "new_value"):
        second = second.replace(f"{name} =", f"{name}_2 =").replace(f"({name})", f"({name}_2)")
        second = second.replace(f"({name},", f"({name}_2,").replace(f", {name})", f", {name}_2)")
    second = second.replace("past_key,", "past_key_2,").replace("past_value,", "past_value_2,")
    inputs = INPUTS + "".join(
        f", float[b, {heads}, {length}, {WIDTH}] {name}_2"
        for name, heads, length in (
            ("query", HEADS, "s"),
            ("new_key", GROUPS, "s"),
            ("new_value", GROUPS, "s"),
            ("past_key", GROUPS, "p"),
            ("past_value", GROUPS, "p"),
        )
    )
    model = graph(BODY + second, inputs=inputs, outputs=OUTPUTS + f", float[b, s, {HEADS * WIDTH}] y_2")
    for node in model.graph:
        for value in node.outputs:
            if value.name and value.name.removesuffix("_2") in SHAPES:
                value.shape = ir.Shape(SHAPES[value.name.removesuffix("_2")])
    given = []
    for lengths in LENGTHS:
        each = arrays(*lengths)
        given.append({**each, **{f"{name}_2": 2 * array for name, array in each.items() if name != "mask"}})
    (found,) = rewritten(FuseCausalAttention(), [model], given)
    assert found.count("GroupQueryAttention") == 2
    assert found.count("Expand") == 1


@pytest.mark.parametrize(
    ("body", "mask", "reason"),
    [
        (BODY, "b, 1, 1, t", "is the same for all queries"),
        (
            BODY.replace("biased = Add (scaled, mask)", "").replace("(biased)", "(scaled)"),
            "b, 1, s, t",
            "it has no mask",
        ),
        (BODY.replace("Concat <axis: int = -2> (past_key, new_key)", "Identity (past_key)"), "b, 1, s, t", "past ones"),
    ],
    ids=["mask without queries", "no mask", "cache that doesn't grow"],
)
def test_what_may_look_ahead_stays(body: str, mask: str, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    """The operator would hide later tokens."""
    caplog.set_level("DEBUG", "accel.graph.passes")
    model = graph(body, mask)
    assert not FuseCausalAttention()(model).modified
    assert [node.op_type for node in model.graph].count("Softmax") == 1
    assert reason in caplog.text


def test_narrow_heads_stay(caplog: pytest.LogCaptureFixture) -> None:
    """The kernel takes heads whose width is a multiple of 8."""
    caplog.set_level("DEBUG", "accel.graph.passes")
    model = graph()
    for value in (*model.graph.inputs, *(value for node in model.graph for value in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape([12 if dim == WIDTH else dim for dim in value.shape])
    assert not FuseCausalAttention()(model).modified
    assert "heads of width 12" in caplog.text
