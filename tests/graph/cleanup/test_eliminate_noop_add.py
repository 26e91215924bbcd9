"""Additions of zero are removed, unless the zero broadcasts the other term."""

import pytest

from accel.graph.cleanup.eliminate_noop_add import EliminateNoopAdd
from tests.graph.text import numbers, parse, rewritten

INPUTS = [{"x": numbers(2, 3, 4)}, {"x": numbers(1, 1, 4)}]


def graph(body: str, shape: str = "b, t, 4") -> str:
    """A graph in which the sum p, like the output, is annotated with the shape `shape`."""
    specs = f"(float[b, t, 4] x) => (float[{shape}] y)"
    return f"g {specs} <float[{shape}] p> {{ zero = Constant <value = float {{0.0}}> ()\n {body} }}"


@pytest.mark.parametrize(
    "body",
    [
        "s = Shape (x)\n z = Expand (zero, s)\n p = Add (x, z)\n y = Neg (p)",
        "s = Shape (x)\n z = ConstantOfShape (s)\n p = Add (z, x)\n y = Neg (p)",
        "p = Add (zero, x)\n y = Neg (p)",
    ],
)
def test_zero_is_not_added(body: str) -> None:
    """A zero from `Expand`, `ConstantOfShape` or a scalar, on either side, is removed with what computes it."""
    left = rewritten(EliminateNoopAdd(), [parse(graph(body))], INPUTS)[0]
    assert [op for op in left if op != "Constant"] == ["Neg"]


@pytest.mark.parametrize(
    ("body", "shape"),
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
    ids=["broadcasts", "not zero", "one", "graph output", "subtraction"],
)
def test_left_alone(body: str, shape: str) -> None:
    """A zero that broadcasts, another number, an output of the model, another operator."""
    model = parse(graph(body, shape))
    before = [node.op_type for node in model.graph]
    left = rewritten(EliminateNoopAdd(), [model], INPUTS)[0]
    assert [op for op in left if op != "Constant"] == [op for op in before if op != "Constant"]
