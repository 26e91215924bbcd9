"""Products: what is fused with them, and what must not be."""

import logging
from pathlib import Path

import pytest
import torch

from accel.engine.operations.activations import Activation
from accel.engine.operations.normalize import Norm
from accel.engine.operations.product import Part, Product
from accel.engine.planning.planner import Plan
from tests.engine.one_node import normal
from tests.engine.planning.graphs import compared, operations, others, specs

WEIGHTS = {
    "w": normal(16, 24, scale=0.25),
    "u": normal(16, 24, scale=0.26),
    "back": normal(24, 16, scale=0.2),
    "square": normal(16, 16, scale=0.25),
    "turned": normal(24, 16, scale=0.25),
    "per_head": normal(4, 6, scale=0.5),
    "b16": normal(16),
    "b24": normal(24),
    "c24": normal(24, scale=0.5),
    "n16": normal(16) + 1.5,
    "n4": normal(4) + 1.5,
    "one_number": torch.tensor([0.7]),
    "half": torch.tensor(0.5),
    "two": torch.tensor(2.0),
    "six": torch.tensor(6.0),
    "rows16": torch.tensor([-1, 1, 16]),
    "heads": torch.tensor([-1, 4, 4]),
    "flat": torch.tensor([-1, 16]),
    "first": torch.tensor(0),
    "sizes": torch.tensor([10, 14]),
    "halves": torch.tensor([12, 12]),
    "only": torch.tensor([0]),
    "reversed": torch.arange(11, -1, -1),
}


def graph(nodes: str, outputs: str = "float[B,1,N] y", inputs: str = "float[B,1,16] x") -> str:
    """Return the text of a graph."""
    return f"agraph ({inputs}) => ({outputs}) {{ {nodes} }}"


# What is fused: nodes, operations, operators that are left to torch.
FUSED = {
    "a feed-forward layer": (
        """norm = LayerNormalization<epsilon = 0.1>(x, n16, b16) h = MatMul(norm, w) hb = Add(h, b24)
        a = Gelu(hb) p = MatMul(a, back) pb = Add(b16, p) y = Add(x, pb)""",
        ["product", "product"],
        [],
    ),
    "a gate": (
        """norm = SimplifiedLayerNormalization<epsilon = 0.1>(x, n16) g = MatMul(norm, w) s = Sigmoid(g)
        silu = Mul(g, s) v = MatMul(norm, u) both = Mul(silu, v) y = MatMul(both, back)""",
        ["product", "product"],
        [],
    ),
    "a gate whose activation is one node": (
        """g = MatMul(x, w) silu = com.microsoft.QuickGelu<alpha = 1.0>(g) v = MatMul(x, u) both = Mul(silu, v)
        y = MatMul(both, back)""",
        ["product", "product"],
        [],
    ),
    "a gate of one weight": (
        """g = MatMul(x, w) first_half, second_half = Split<axis = -1>(g, halves) a = Relu(second_half)
        y = Mul(first_half, a)""",
        ["product"],
        [],
    ),
    "a gate behind the selection of the only token": (
        """g = MatMul(x, w) a, b = Split<axis = -1>(g, halves) first_half = Gather<axis = 1>(a, only)
        second_half = Gather<axis = 1>(b, only) r = Relu(second_half) y = Mul(first_half, r)""",
        ["product"],
        [],
    ),
    "products that share a norm": (
        "norm = SimplifiedLayerNormalization(x, n16) y = MatMul(norm, w) z = MatMul(norm, u)",
        ["product"],
        [],
    ),
    "factors before and after": (
        "less = Mul(half, x) p = MatMul(less, w) r = Relu(p) y = Div(r, half)",
        ["product"],
        [],
    ),
    "a weight that is turned": ("t = Transpose(turned) p = MatMul(x, t) y = Relu(p)", ["product"], []),
    "a weight that is turned twice": (
        "t = Transpose<perm = [1, 0]>(w) y = com.microsoft.FusedMatMul<transB = 1>(x, t)",
        ["product"],
        [],
    ),
    "parallel blocks": ("p = MatMul(x, square) a = Add(p, x) q = MatMul(x, square) y = Add(q, a)", ["product"] * 2, []),
    "a sum that is normed": (
        """p = MatMul(x, square)
        y, "", "", total = com.microsoft.SkipSimplifiedLayerNormalization<epsilon = 0.2>(p, x, n16, b16)""",
        ["product", "normalize"],
        [],
    ),
    "rows of two axes": ("f = Reshape(x, flat) y = Gemm<transB = 1>(f, turned, b24)", ["product"], ["Reshape"]),
    "a soft cap after a bias": (
        "p = MatMul(x, w) pb = Add(p, b24) d = Div(pb, two) t = Tanh(d) y = Mul(t, two)",
        ["product"],
        [],
    ),
}

# What must not be: nodes, operations, operators that are left to torch.
MISSED = {
    "an activation of a product whose shape is read": (
        "p = MatMul(x, w) s = Shape(p) n = Gather(s, first) f = Cast<to = 1>(n) r = Relu(p) y = Mul(r, f)",
        ["product"],
        ["Relu", "Mul"],
    ),
    "a residual that depends on the product": (
        "p = MatMul(x, square) r = Relu(p) y = Add(p, r)",
        ["product"],
        ["Relu", "Add"],
    ),
    "a residual that depends on it through a product": (
        "p = MatMul(x, square) q = MatMul(p, square) y = Add(p, q)",
        ["product", "product"],
        [],
    ),
    "a factor after a residual": ("p = MatMul(x, square) s = Add(p, x) y = Mul(s, half)", ["product"], ["Mul"]),
    "a factor of each feature": ("p = MatMul(x, w) y = Mul(p, b24)", ["product"], ["Mul"]),
    "a factor that follows from the batch": (
        "s = Shape(x) n = Gather(s, first) f = Cast<to = 1>(n) p = MatMul(x, w) y = Mul(p, f)",
        ["product"],
        ["Mul"],
    ),
    "a quotient the other way round": ("p = MatMul(x, w) y = Div(two, p)", ["product"], ["Div"]),
    "a bias after the activation": ("p = MatMul(x, w) r = Relu(p) y = Add(r, b24)", ["product"], ["Add"]),
    "a bias after the soft cap": (
        "p = MatMul(x, w) d = Div(p, two) t = Tanh(d) m = Mul(t, two) y = Add(m, b24)",
        ["product"],
        ["Add"],
    ),
    "a bias of one number": ("p = MatMul(x, w) y = Add(p, one_number)", ["product"], ["Add"]),
    "a cast to integers": (
        "p = MatMul(x, w) i = Cast<to = 7>(p) y = Cast<to = 1>(i)",
        ["product"],
        ["Cast", "Cast"],
    ),
    "an integer cast within an activation": (
        "p = MatMul(x, w) i = Cast<to = 7>(p) f = Cast<to = 1>(i) y = Relu(f)",
        ["product"],
        ["Cast", "Cast", "Relu"],
    ),
    "rows that are rounded to integers": (
        "i = Cast<to = 7>(x) f = Cast<to = 1>(i) y = MatMul(f, w)",
        ["product"],
        ["Cast"],
    ),
    "a gate whose activation is read elsewhere": (
        "g = MatMul(x, w) r = Relu(g) v = MatMul(x, u) y = Mul(r, v) z = Neg(r)",
        ["product"],
        ["Mul", "Neg"],
    ),
    "a gate whose halves are in other orders": (
        """g = MatMul(x, w) a, b = Split<axis = -1>(g, halves) c = Gather<axis = -1>(b, reversed) r = Relu(c)
        y = Mul(a, r)""",
        ["product"],
        ["Split", "Gather", "Relu", "Mul"],
    ),
    "an activation with a limit": ("p = MatMul(x, w) r = Relu(p) y = Min(r, six)", ["product"], ["Min"]),
    "almost an activation": (
        "p = MatMul(x, w) h = Mul(p, half) s = Sigmoid(h) y = Mul(p, s)",
        ["product"],
        ["Mul", "Sigmoid", "Mul"],
    ),
    "a transposed Gemm": (
        "f = Reshape(x, flat) t = Transpose(f) y = Gemm<transA = 1>(t, w, b24)",
        [],
        ["Reshape", "Transpose", "Gemm"],
    ),
    "a bias with a factor": (
        "f = Reshape(x, flat) y = Gemm<beta = 0.5>(f, w, b24)",
        [],
        ["Reshape", "Gemm"],
    ),
    "a bias for all features": ("f = Reshape(x, flat) y = Gemm(f, w, one_number)", [], ["Reshape", "Gemm"]),
    "a bias that is computed": (
        "f = Reshape(x, flat) y = Gemm(f, square, f)",
        [],
        ["Reshape", "Gemm"],
    ),
    "a product of each head": ("h = Reshape(x, heads) y = MatMul(h, per_head)", [], ["Reshape", "MatMul"]),
    "features in another order": (
        "h = Reshape(x, heads) t = Transpose<perm = [0, 2, 1]>(h) r = Reshape(t, rows16) y = MatMul(r, w)",
        ["product"],
        ["Reshape", "Transpose", "Reshape"],
    ),
    "rows across the batch": ("t = Transpose<perm = [1, 0, 2]>(x) y = MatMul(t, w)", [], ["Transpose", "MatMul"]),
    "a norm of each head": (
        "h = Reshape(x, heads) n = SimplifiedLayerNormalization(h, n4) r = Reshape(n, rows16) y = MatMul(r, w)",
        ["product"],
        ["Reshape", "SimplifiedLayerNormalization"],
    ),
    "a norm of all axes": (
        "n = LayerNormalization<axis = 1>(x, n16) y = MatMul(n, w)",
        ["product"],
        ["LayerNormalization"],
    ),
    "a norm with one weight": (
        "n = LayerNormalization(x, one_number) y = MatMul(n, w)",
        ["product"],
        ["LayerNormalization"],
    ),
    "a gate of another row": (
        "n = SimplifiedLayerNormalization(x, n16) g = MatMul(n, w) r = Relu(g) v = MatMul(x, u) y = Mul(r, v)",
        ["product", "product"],
        ["Mul"],
    ),
    "a gate with a factor": (
        "g = MatMul(x, w) r = Relu(g) v = com.microsoft.FusedMatMul<alpha = 2.0>(x, u) y = Mul(r, v)",
        ["product"],
        ["Mul"],
    ),
    "a gate that is squared": ("g = MatMul(x, w) r = Relu(g) y = Mul(r, r)", ["product"], ["Mul"]),
    "unequal parts of one weight": (
        "g = MatMul(x, w) a, c = Split<axis = -1>(g, sizes) y = Relu(a) z = Relu(c)",
        ["product"],
        ["Split", "Relu", "Relu"],
    ),
}


def run(nodes: str, folder: Path) -> Plan:
    """Plan and compare a graph whose outputs are `y`, and `z` if there is one."""
    outputs = "float[B,1,N] y, float[B,1,M] z" if " z " in nodes else "float[B,1,N] y"
    return compared(graph(nodes, outputs), WEIGHTS, folder)


@pytest.mark.parametrize("name", FUSED)
def test_what_is_fused(name: str, tmp_path: Path) -> None:
    nodes, expected, left = FUSED[name]
    result = run(nodes, tmp_path)
    assert (operations(result), others(result)) == (expected, left)


@pytest.mark.parametrize("name", MISSED)
def test_what_is_not(name: str, tmp_path: Path) -> None:
    nodes, expected, left = MISSED[name]
    result = run(nodes, tmp_path)
    assert (operations(result), others(result)) == (expected, left)


def test_factors_and_norms_are_those_of_the_graph(tmp_path: Path) -> None:
    nodes = """norm = LayerNormalization(x, n16, b16)
    p = com.microsoft.FusedMatMul<alpha = 3.0, transB = 1>(norm, turned)
    pb = Add(p, b24) r = Relu(pb) y = Mul(r, half)"""
    (spec,) = specs(run(nodes, tmp_path))
    part = Part(3.0, Activation("relu"), 0.5, transposed=True, has_bias=True)
    assert spec == Product(Norm("layer", 1e-5), True, True, (part,), 0, torch.float32)


def test_values_that_the_graph_returns(tmp_path: Path) -> None:
    """A product ends at a value that is an output, and a norm of which one is an output is computed alone."""
    body = graph("p = MatMul(x, w) y = Relu(p)", "float[B,1,24] p, float[B,1,24] y")
    result = compared(body, WEIGHTS, tmp_path)
    assert (operations(result), others(result)) == (["product"], ["Relu"])
    body = graph("n = SimplifiedLayerNormalization(x, n16) y = MatMul(n, w)", "float[B,1,16] n, float[B,1,24] y")
    result = compared(body, WEIGHTS, tmp_path)
    assert operations(result) == ["normalize", "product"]
    body = graph("g = MatMul(x, w) r = Relu(g) v = MatMul(x, u) y = Mul(r, v)", "float[B,1,24] v, float[B,1,24] y")
    result = compared(body, WEIGHTS, tmp_path)
    assert (operations(result), others(result)) == (["product"], ["Mul"])


def test_inputs_that_are_no_rows(tmp_path: Path) -> None:
    """Several tokens of a row, and a batch that is not the first axis."""
    for axes in ("B,2,16", "1,B,16"):
        body = graph("p = MatMul(x, square) y = Add(p, x)", "float[B,N,16] y", f"float[{axes}] x")
        assert operations(compared(body, WEIGHTS, tmp_path)) == []


def test_a_residual_that_broadcasts(tmp_path: Path) -> None:
    inputs = "float[B,1,16] x, float[1,1,16] r"
    result = compared(graph("p = MatMul(x, square) y = Add(p, r)", inputs=inputs), WEIGHTS, tmp_path)
    assert (operations(result), others(result)) == (["product"], ["Add"])


def test_a_default_epsilon(tmp_path: Path) -> None:
    """ONNX Runtime's norms of a sum have another than ONNX's norms."""
    for norm in ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization"):
        body = graph(f"p = MatMul(x, square) y = com.microsoft.{norm}(p, x, n16)")
        result = compared(body, WEIGHTS, tmp_path, {"x": normal(4, 1, 16, scale=1e-4)})
        assert [spec.norm.epsilon for spec in specs(result)[1:]] == [1e-12]
        assert operations(result) == ["product", "normalize"]


HALF = {name: weight.half() if weight.is_floating_point() else weight for name, weight in WEIGHTS.items()}


def test_roundings_are_left_out(tmp_path: Path) -> None:
    """A product in FP16 to which a residual in FP32 is added: its output is in FP32 and not rounded before."""
    nodes = "h = Cast<to = 10>(x) p = MatMul(h, square) c = Cast<to = 1>(p) y = Add(c, x)"
    result = compared(graph(nodes), HALF, tmp_path, rtol=2e-3)
    (spec,) = specs(result)
    assert (spec.dtype, spec.residuals, others(result)) == (torch.float32, 1, [])


def test_outputs_of_different_dtypes(tmp_path: Path) -> None:
    """Products of one row are one operation only if their outputs have the same dtype."""
    nodes = "p = MatMul(x, w) y = Cast<to = 1>(p) z = MatMul(x, u)"
    body = graph(nodes, "float[B,1,24] y, float16[B,1,24] z", "float16[B,1,16] x")
    result = compared(body, HALF, tmp_path, rtol=2e-3)
    assert [spec.dtype for spec in specs(result)] == [torch.float32, torch.float16]


def test_weights_of_different_dtypes_are_no_gate(tmp_path: Path) -> None:
    nodes = "h = Cast<to = 10>(x) g = MatMul(h, w) c = Cast<to = 1>(g) r = Relu(c) v = MatMul(x, full) y = Mul(r, v)"
    result = compared(graph(nodes), HALF | {"full": WEIGHTS["u"]}, tmp_path, rtol=2e-3)
    assert (operations(result), others(result)[-1]) == (["product", "product"], "Mul")


def test_misses_are_explained(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "accel")
    result = run("f = Reshape(x, flat) y = Gemm<beta = 0.5>(f, w, b24)", tmp_path)
    assert list(result.misses.values()) == [" (Gemm) transposes its first factor or scales its bias"]
    run("p = MatMul(x, w) y = Mul(p, b24)", tmp_path)
    assert " (Gemm) transposes its first factor or scales its bias" in caplog.text
    assert " (Mul): is no factor, residual or rounding of the product p alone" in caplog.text
