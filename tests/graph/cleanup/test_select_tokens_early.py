"""Kept tokens are selected before what treats each token alone, and at the end where something else reads it."""

import numpy as np
import pytest

from accel.graph.cleanup.select_tokens_early import SelectTokensEarly
from tests.graph.text import numbers, parse, rewritten

FEATURES = 8
SELECT = """
    turned = Transpose <perm = [1, 0, 2]> (h)
    largest = Max (indices)
    size = Shape (largest)
    wide = Expand (indices, size)
    places = Unsqueeze (wide, last)
    chosen = GatherND (turned, places)
    kept_states = Transpose <perm = [1, 0, 2]> (chosen)
    y = MatMul (kept_states, w)
"""
WEIGHTS = {
    "w": numbers(FEATURES, FEATURES),
    "v": numbers(FEATURES, FEATURES, seed=1),
    "scale": numbers(FEATURES, seed=2),
    "bias": numbers(FEATURES, seed=3),
    "one": np.array(1, np.float32),
    "first": np.array([0]),
    "last": np.array([-1]),
}
SHAPE = f"float[b, t, {FEATURES}]"
BLOCK = """
    p = MatMul (x, w)
    n, , , s = com.microsoft.SkipLayerNormalization <epsilon: float = 0.001> (r, p, scale, bias)
    g = MatMul (n, v)
    a = Sigmoid (g)
    one_less = Sub (one, a)
    m = Mul (g, one_less)
    k = Add (m, bias)
    h = Add (s, k)
"""


def inputs(batch: int, tokens: int, *indices: int) -> dict[str, np.ndarray]:
    x, r = numbers(batch, tokens, FEATURES), numbers(batch, tokens, FEATURES, seed=5)
    return {"x": x, "r": r, "indices": np.array(indices)}


FEEDS = [inputs(2, 5, 4), inputs(1, 5, 0, 1, 2, 3, 4), inputs(3, 5, 3, 1), inputs(1, 5, -1)]


def graph(block: str = BLOCK, select: str = SELECT, outputs: str = "") -> str:
    return f"""g ({SHAPE} x, {SHAPE} r, int64[kept] indices) => (float[b, kept, {FEATURES}] y {outputs})
        <int64[kept] wide, {SHAPE} n, {SHAPE} s, {SHAPE} h> {{ {block} {select} }}"""


def test_block_runs_over_kept_tokens() -> None:
    """One `Gather` for the attention's output and one for the residual; every other node has fewer tokens."""
    model = parse(graph(), WEIGHTS)
    expected = ["MatMul", "SkipLayerNormalization", "MatMul", "Sigmoid", "Sub", "Mul", "Add", "Add", "MatMul"]
    (left,) = rewritten(SelectTokensEarly(), [model], FEEDS)
    assert sorted(left) == sorted(["Gather", "Gather", *expected])
    assert {str(node.outputs[0].shape) for node in model.graph} == {f"[b,kept,{FEATURES}]"}


@pytest.mark.parametrize(
    ("block", "gathered"),
    [
        (BLOCK.replace("p = MatMul (x, w)", "p = MatMul (x, w)\n other = ReduceSum (p)"), {"p", "r"}),
        (BLOCK.replace("a = Sigmoid (g)", "a = Softmax <axis: int = 1> (g)"), {"a", "g", "s"}),
        (BLOCK.replace("k = Add (m, bias)", "mean = ReduceMean (x, first)\n k = Add (m, mean)"), {"k", "s"}),
        (
            BLOCK.replace("g = MatMul (n, v)", "turned_n = Transpose <perm = [0, 2, 1]> (n)\n g = MatMul (n, v)"),
            {"n", "s"},
        ),
    ],
    ids=["read elsewhere", "softmax over tokens", "a sum over sequences", "transposed elsewhere"],
)
def test_selection_stays_behind_what_others_read(block: str, gathered: set[str]) -> None:
    """A value that other nodes read too, or that depends on other tokens, is computed for all of them."""
    outputs = (
        ", float other" if "other" in block else f", float[b, {FEATURES}, t] turned_n" if "turned_n" in block else ""
    )
    text = graph(block + "\n h_product = MatMul (h, w)", SELECT.replace("(h)", "(h_product)"), outputs)
    model = parse(text.replace(f"{SHAPE} h>", f"{SHAPE} h, {SHAPE} h_product>"), WEIGHTS)
    rewritten(SelectTokensEarly(), [model], FEEDS)
    assert {node.inputs[0].name for node in model.graph if node.op_type == "Gather" and node.inputs[0]} == gathered


@pytest.mark.parametrize(
    "text",
    [
        graph(outputs=f", {SHAPE} h"),
        graph(
            select=SELECT.replace(
                "Transpose <perm = [1, 0, 2]> (h)", "Transpose <perm = [2, 0, 1]> (h_turned)"
            ).replace("turned =", "h_turned = Transpose <perm = [0, 2, 1]> (h)\n turned =")
        ),
        graph("p = MatMul (x, w)\n n = Softmax <axis: int = 1> (p)\n s = Add (n, r)\n h = Sigmoid (s)"),
        graph(
            select=SELECT.replace("(chosen)", "(positive)").replace(
                "kept_states =", "positive = Abs (chosen)\n kept_states ="
            )
        ),
    ],
    ids=["hidden states returned", "another transpose", "no product", "something between"],
)
def test_other_graphs_stay(text: str) -> None:
    """They keep their nodes."""
    model = parse(text, WEIGHTS)
    before = [node.op_type for node in model.graph]
    assert rewritten(SelectTokensEarly(), [model], FEEDS) == [before]
