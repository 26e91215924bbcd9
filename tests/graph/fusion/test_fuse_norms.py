"""Every spelling of an RMS norm becomes one node with its numbers, and nothing else does."""

import numpy as np
import pytest

from accel.graph.fusion.fuse_norms import FuseNorms
from tests.graph.text import numbers, parse, rewritten

NORM = "SimplifiedLayerNormalization"
WEIGHTS = {"w": numbers(8), "table": numbers(3, 8)}
INPUTS = [{"x": numbers(2, 3, 8)}, {"x": 1e-3 * numbers(1, 3, 8, seed=4)}, {"x": numbers(4, 3, 8, seed=1) * 50}]

CONSTANTS = """float two = {2.0}, float half = {0.5}, float minus = {-0.5}, float one = {1.0}, float three = {3.0},
    float eps = {1e-5}, float[1] eps1 = {1e-5}, int64[1] last = {-1}, int64[1] second = {2}, int64[1] middle = {1}"""
SQUARE = "s = Pow (x, two)"
MEAN = "m = ReduceMean <keepdims: int = 1> (s, last)"
SUM = "v = Add (m, eps)"
ROOT = "r = Sqrt (v)"
INVERSE = "i = Reciprocal (r)"
NORMED = "n = Mul (x, i)"
LAST = "y = Mul (w, n)"
CHAIN = (SQUARE, MEAN, SUM, ROOT, INVERSE, NORMED, LAST)


def graph(lines: tuple[str, ...], outputs: str = "float[b, t, 8] y") -> str:
    return f"g (float[b, t, 8] x) => ({outputs}) <{CONSTANTS}> {{ {chr(10).join(lines)} }}"


def changed(*lines: str) -> tuple[str, ...]:
    """The chain, with the lines that make the same value replaced."""
    new = {line.split(" = ")[0]: line for line in lines}
    return tuple(new.get(line.split(" = ")[0], line) for line in CHAIN)


@pytest.mark.parametrize(
    "lines",
    [
        CHAIN,
        changed("s = Mul (x, x)"),
        changed("m = ReduceMean (s, second)"),
        changed("v = Add (eps1, m)"),
        changed("r = Pow (v, half)"),
        changed("i = Div (one, r)"),
        changed("n = Mul (i, x)"),
        changed("y = Mul (n, w)"),
        (SQUARE, MEAN, SUM, ROOT, "n = Div (x, r)", LAST),
        (SQUARE, MEAN, SUM, "i = Pow (v, minus)", NORMED, LAST),
        ("s = Mul (x, x)", MEAN, "v = Add (eps, m)", "r = Pow (v, half)", "n = Div (x, r)", "y = Mul (n, w)"),
    ],
    ids=lambda lines: "; ".join(sorted(set(lines) - set(CHAIN))) or "as exported",
)
def test_spellings(lines: tuple[str, ...]) -> None:
    """One node, with the chain's epsilon and its numbers, and a shape and type that are known."""
    model = parse(graph(lines), WEIGHTS)
    assert rewritten(FuseNorms(), [model], INPUTS) == [[NORM]]
    node = model.graph[0]
    assert node.attributes.get_float("epsilon", 0.0) == pytest.approx(1e-5)
    assert [value.name for value in node.inputs if value] == ["x", "w"]
    assert str(node.outputs[0].shape) == "[b,t,8]"


def test_weight_may_be_computed() -> None:
    """A weight of 1 + w is as good as one that is stored."""
    model = parse(graph(("u = Add (one, w)", *changed("y = Mul (n, u)"))), WEIGHTS)
    assert rewritten(FuseNorms(), [model], INPUTS) == [["Add", NORM]]


@pytest.mark.parametrize(
    ("lines", "outputs"),
    [
        (changed("s = Pow (x, three)", "s3 = Abs (s)"), "float[b, t, 8] y"),
        (changed("m = ReduceMean <keepdims: int = 1> (s, middle)"), "float[b, t, 8] y"),
        (changed("s = Mul (x, w)"), "float[b, t, 8] y"),
        (("k = Neg (x)", *changed("s = Pow (k, two)")), "float[b, t, 8] y"),
        (changed("v = Mul (m, eps)"), "float[b, t, 8] y"),
        (changed("r = Sqrt (m)", "i = Reciprocal (v)"), "float[b, t, 8] y"),
        ((SQUARE, MEAN, "r = Sqrt (m)", "v = Add (r, eps)", "i = Reciprocal (v)", NORMED, LAST), "float[b, t, 8] y"),
        (changed("y = Mul (n, table)"), "float[b, 3, 8] y"),
        (changed("y = Mul (n, three)"), "float[b, t, 8] y"),
        (CHAIN, "float[b, t, 8] y, float[b, t, 8] n"),
        ((*CHAIN, "z = Neg (n)"), "float[b, t, 8] y, float[b, t, 8] z"),
        ((*CHAIN, "z = Neg (m)"), "float[b, t, 8] y, float[b, t, 1] z"),
    ],
    ids=[
        "cube", "another axis", "x times w", "another x", "epsilon multiplied", "epsilon not under the root",
        "epsilon after the root", "weight for each position", "scalar weight", "part is an output", "part is used",
        "mean is used",
    ],
)  # fmt: skip
def test_left_alone(lines: tuple[str, ...], outputs: str) -> None:
    """What is not the norm, or is needed in parts."""
    inputs = [{"x": np.abs(each["x"]) + 0.1} for each in INPUTS]
    assert NORM not in rewritten(FuseNorms(), [parse(graph(lines, outputs), WEIGHTS)], inputs)[0]


def test_a_near_miss_says_why(caplog: pytest.LogCaptureFixture) -> None:
    """In the log, at level DEBUG: the factor's shape, or the value that another node reads."""
    caplog.set_level("DEBUG", "accel.graph.passes")
    FuseNorms()(parse(graph(changed("y = Mul (n, three)"), "float[b, t, 8] y"), WEIGHTS))
    FuseNorms()(parse(graph((*CHAIN, "z = Neg (n)"), "float[b, t, 8] y, float[b, t, 8] z"), WEIGHTS))
    assert "the factor has shape (), expected (8,)" in caplog.text
    assert "n is read outside the norm" in caplog.text
