"""A sum and the norm behind it become one node that gives both, where the kernel takes what it is given."""

import numpy as np
import onnx_ir as ir
import pytest

from accel.graph.fusion.fuse_skip_norm import FuseSkipNorm
from tests.graph.text import numbers, parse, rewritten, run

RMS, LAYER = "SkipSimplifiedLayerNormalization", "SkipLayerNormalization"
SIMPLE = "SimplifiedLayerNormalization <axis: int = -1, epsilon: float = 0.001, stash_type: int = 1>"
NORM = "LayerNormalization <axis: int = -1, epsilon: float = 0.001>"
WEIGHTS = {"w": numbers(8), "c": numbers(8, seed=1), "bias": numbers(8, seed=2)}
INPUTS = [{"x": numbers(b, t, 8), "h": numbers(b, t, 8, seed=5)} for b, t in ((2, 3), (1, 1), (4, 5))]
SHAPE = "float[b, t, 8]"


def graph(*lines: str, outputs: str = f"{SHAPE} y", h: str = SHAPE, extra: str = "") -> str:
    return f"""g ({SHAPE} x, {h} h) => ({outputs}) <{SHAPE} s, {SHAPE} p {extra}> {{ {chr(10).join(lines)} }}"""


@pytest.mark.parametrize(
    ("norm", "fused", "inputs"),
    [
        (f"{SIMPLE} (s, w)", RMS, ["x", "h", "w"]),
        (f"{NORM} (s, w, c)", LAYER, ["x", "h", "w", "c"]),
        (f"{NORM} (s, w)", LAYER, ["x", "h", "w"]),
    ],
)
def test_sum_and_norm(norm: str, fused: str, inputs: list[str]) -> None:
    """One node with one output, where only the norm reads the sum."""
    model = parse(graph("s = Add (x, h)", f"y = {norm}"), WEIGHTS)
    assert rewritten(FuseSkipNorm(), [model], INPUTS) == [[fused]]
    assert [value.name for value in model.graph[0].inputs if value] == inputs
    assert model.graph[0].attributes.get_float("epsilon", 0.0) == pytest.approx(1e-3)
    assert len(model.graph[0].outputs) == 1


@pytest.mark.parametrize("norm", [f"{SIMPLE} (s, w)", f"{NORM} (s, w, c)"])
def test_sum_that_others_read_comes_from_the_node(norm: str) -> None:
    """The next residual reads the sum, and so may the caller: names and numbers stay."""
    lines = ("s = Add (x, h)", f"n = {norm}", "a = Neg (n)", "y = Add (s, a)")
    model = parse(graph(*lines, outputs=f"{SHAPE} y, {SHAPE} s"), WEIGHTS)
    left = rewritten(FuseSkipNorm(), [model], INPUTS)[0]
    assert left[1:] == ["Neg", "Add"]
    outputs = model.graph[0].outputs
    assert [value.name for value in outputs] == ["n", "", "", "s"]
    assert {str(value.shape) for value in (outputs[0], outputs[3])} == {"[b,t,8]"}
    assert {value.dtype for value in (outputs[0], outputs[3])} == {ir.DataType.FLOAT}


@pytest.mark.parametrize(
    ("lines", "inputs"),
    [
        (("p = Add (x, bias)", "s = Add (h, p)", f"y = {SIMPLE} (s, w)"), ["x", "h", "w", "bias"]),
        (("p = Add (bias, x)", "s = Add (p, h)", f"y = {NORM} (s, w, c)"), ["x", "h", "w", "c", "bias"]),
        (("p = Add (x, bias)", "s = Add (p, h)", f"y = {NORM} (s, w)"), ["x", "h", "w", None, "bias"]),
    ],
)
def test_bias_before_the_sum(lines: tuple[str, ...], inputs: list[str | None]) -> None:
    """The bias of a product goes into the same node, behind the place of a beta that may be absent."""
    model = parse(graph(*lines), WEIGHTS)
    assert len(rewritten(FuseSkipNorm(), [model], INPUTS)[0]) == 1
    assert [value.name if value else None for value in model.graph[0].inputs] == inputs


def test_three_layers() -> None:
    """Each sum is the next one's skip, and all stay in order."""
    lines, value = [], "x"
    for layer in range(3):
        lines += [f"s{layer} = Add ({value}, h)", f"n{layer} = {SIMPLE} (s{layer}, w)", f"a{layer} = Tanh (n{layer})"]
        value = f"s{layer}" if layer % 2 else f"a{layer}"
    notes = "".join(f", {SHAPE} {kind}{layer}" for layer in range(3) for kind in "sna")
    model = parse(graph(*lines, "y = Add (a2, s1)", extra=notes), WEIGHTS)
    assert rewritten(FuseSkipNorm(), [model], INPUTS)[0] == [RMS, "Tanh", RMS, RMS, "Tanh", "Add"]


@pytest.mark.parametrize(
    ("lines", "h"),
    [
        (("s = Add (x, h)", f"y = {SIMPLE} (s, w)"), "float[1, t, 8]"),
        (("s = Add (x, h)", f"y = {SIMPLE} (s, w)"), "float[8]"),
        (("s = Sub (x, h)", f"y = {SIMPLE} (s, w)"), SHAPE),
        (("s = Add (x, h)", "y = LayerNormalization <axis: int = 1> (s, wide)"), SHAPE),
        (("s = Add (x, h)", "v = Neg (w)", f"y = {SIMPLE} (s, v)"), SHAPE),
    ],
    ids=["broadcast batch", "broadcast vector", "difference", "another axis", "computed weight"],
)
def test_left_alone(lines: tuple[str, ...], h: str) -> None:
    """A sum that broadcasts, another operator, a norm over more than the last axis, a weight made on the way."""
    model = parse(graph(*lines, h=h), WEIGHTS | {"wide": numbers(3, 8)})
    inputs = [
        {"x": INPUTS[0]["x"], "h": INPUTS[0]["h"] if h == SHAPE else INPUTS[0]["h"][:1] if "1" in h else numbers(8)}
    ]
    assert not {RMS, LAYER} & set(rewritten(FuseSkipNorm(), [model], inputs)[0])


def test_deviation_that_is_read(caplog: pytest.LogCaptureFixture) -> None:
    """LayerNormalization's mean has no counterpart in the fused node, and the log says so."""
    caplog.set_level("DEBUG", "accel.graph.passes")
    text = f"""g ({SHAPE} x, {SHAPE} h) => ({SHAPE} y, float[b, t, 1] mean) <{SHAPE} s> {{
        s = Add (x, h)
        y, mean = {NORM} (s, w, c) }}"""
    assert rewritten(FuseSkipNorm(), [parse(text, WEIGHTS)], INPUTS) == [["Add", "LayerNormalization"]]
    assert "the mean or the deviation is read" in caplog.text


def test_other_ranks_and_unknown_lengths() -> None:
    """The kernels want three axes; and lengths that nobody noted may differ."""
    flat = parse(
        f"g (float[b, 8] x, float[b, 8] h) => (float[b, 8] y) <float[b, 8] s> {{ s = Add (x, h)\n"
        f" y = {SIMPLE} (s, w) }}",
        WEIGHTS,
    )
    assert rewritten(FuseSkipNorm(), [flat], [{"x": numbers(2, 8), "h": numbers(2, 8, seed=1)}])[0][0] == "Add"
    model = parse(graph("s = Add (x, h)", f"y = {SIMPLE} (s, w)"), WEIGHTS)
    for value in (*model.graph.inputs, model.graph[0].outputs[0]):
        value.shape = ir.Shape([None, None, 8])
    FuseSkipNorm()(model)
    assert model.graph[0].op_type == "Add"
    narrow = {"x": numbers(2, 3, 8), "h": numbers(1, 3, 8)}
    assert np.isfinite(run(model, narrow)["y"]).all()
