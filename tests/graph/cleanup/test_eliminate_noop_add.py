"""Adding zero disappears, unless it stretches what it is added to."""

import pytest

from accel.graph.cleanup.eliminate_noop_add import eliminate_noop_add
from tests.graph.text import numbers, parse, rewritten

INPUTS = [{"x": numbers(2, 3, 4)}, {"x": numbers(1, 1, 4)}]


def graph(body: str, made: str = "b, t, 4") -> str:
    """A graph in which the sum p, like the output, is annotated with the shape `made`."""
    specs = f"(float[b, t, 4] x) => (float[{made}] y)"
    return f"g {specs} <float[{made}] p> {{ zero = Constant <value = float {{0.0}}> ()\n {body} }}"


@pytest.mark.parametrize(
    "body",
    [
        "s = Shape (x)\n z = Expand (zero, s)\n p = Add (x, z)\n y = Neg (p)",
        "s = Shape (x)\n z = ConstantOfShape (s)\n p = Add (z, x)\n y = Neg (p)",
        "p = Add (zero, x)\n y = Neg (p)",
    ],
)
def test_zero_is_not_added(body: str) -> None:
    """Stretched by Expand, made by ConstantOfShape, a scalar; on either side. What made the zero goes too."""
    left = rewritten(eliminate_noop_add, [parse(graph(body))], INPUTS)[0]
    assert [op for op in left if op != "Constant"] == ["Neg"]


@pytest.mark.parametrize(
    ("body", "made"),
    [
        (
            "two = Constant <value_ints = [2, 1, 1, 1]> ()\n z = Expand (zero, two)\n p = Add (x, z)\n y = Neg (p)",
            "2, b, t, 4",
        ),
        (
            "s = Shape (x)\n z = ConstantOfShape <value: tensor = float[1] {0.5}> (s)\n p = Add (x, z)\n y = Neg (p)",
            "b, t, 4",
        ),
        ("one = Constant <value = float {1.0}> ()\n p = Add (x, one)\n y = Neg (p)", "b, t, 4"),
        ("p = Neg (x)\n y = Add (p, zero)", "b, t, 4"),
        ("p = Sub (zero, x)\n y = Neg (p)", "b, t, 4"),
    ],
    ids=["stretches", "not zero", "one", "graph output", "subtraction"],
)
def test_left_alone(body: str, made: str) -> None:
    """A zero that widens the sum, another number, a sum that the caller reads, another operator."""
    model = parse(graph(body, made))
    before = [node.op_type for node in model.graph]
    left = rewritten(eliminate_noop_add, [model], INPUTS)[0]
    assert [op for op in left if op != "Constant"] == [op for op in before if op != "Constant"]
