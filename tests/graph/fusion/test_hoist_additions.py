"""What several layers add is added up once."""

import pytest

from accel.graph.fusion.hoist_additions import HoistAdditions
from tests.graph.text import numbers, parse, rewritten

# scores [B, H, T, T], position bias [1, H, T, T], mask [B, 1, T, T]
HEAD = "g (float[b, 4, t, t] x, float[1, 4, t, t] bias, float[b, 1, t, t] mask) => (float[b, 4, t, t] y)"
INPUTS = [
    {"x": numbers(b, 4, t, t), "bias": numbers(1, 4, t, t, seed=1), "mask": numbers(b, 1, t, t, seed=2)}
    for b, t in ((2, 3), (1, 1), (3, 5))
]


def layers(*lines: str) -> str:
    return f"{HEAD} {{ {chr(10).join(lines)} }}"


def test_bias_and_mask_are_added_once() -> None:
    """Three layers, with the addends in any order: one sum before them, one addition in each."""
    model = parse(
        layers(
            "a1 = Add (x, bias)",
            "a2 = Add (a1, mask)",
            "s1 = Softmax (a2)",
            "b1 = Add (bias, s1)",
            "b2 = Add (mask, b1)",
            "s2 = Softmax (b2)",
            "c1 = Add (s2, mask)",
            "c2 = Add (c1, bias)",
            "y = Softmax (c2)",
        )
    )
    left = rewritten(HoistAdditions(), [model], INPUTS)[0]
    assert left == ["Add", "Add", "Softmax", "Add", "Softmax", "Add", "Softmax"]
    first = model.graph[0]
    assert {value.name for value in first.inputs if value} == {"bias", "mask"}
    assert str(first.outputs[0].shape) == "[b,4,t,t]"


def test_three_addends() -> None:
    """A chain of three that every layer adds shrinks to one."""
    lines = []
    value = "x"
    for layer in range(2):
        lines += [
            f"p{layer} = Add ({value}, bias)",
            f"q{layer} = Add (p{layer}, mask)",
            f"r{layer} = Add (q{layer}, m)",
        ]
        lines.append(f"{'y' if layer else 's0'} = Softmax (r{layer})")
        value = "s0"
    left = rewritten(HoistAdditions(), [parse(layers("m = Neg (mask)", *lines))], INPUTS)[0]
    assert left.count("Add") == 4  # two before, one in each layer


@pytest.mark.parametrize(
    "lines",
    [
        ("a1 = Add (x, bias)", "a2 = Add (a1, mask)", "y = Softmax (a2)"),
        (
            "a1 = Add (x, bias)",
            "a2 = Add (a1, mask)",
            "n = Neg (a1)",
            "b1 = Add (n, bias)",
            "b2 = Add (b1, mask)",
            "y = Add (a2, b2)",
        ),
        ("n = Neg (mask)", "a1 = Add (x, bias)", "a2 = Add (a1, mask)", "b1 = Add (a2, bias)", "y = Add (b1, n)"),
        ("a1 = Sub (x, bias)", "a2 = Add (a1, mask)", "b1 = Sub (a2, bias)", "y = Add (b1, mask)"),
    ],
    ids=["once", "inner sum used twice", "other pair", "subtraction"],
)
def test_left_alone(lines: tuple[str, ...]) -> None:
    """One place only, an inner sum that somebody else reads, pairs that differ, another operator."""
    model = parse(layers(*lines))
    before = [node.op_type for node in model.graph]
    left = rewritten(HoistAdditions(), [model], INPUTS)[0]
    assert sorted(left) == sorted(before)


def test_residuals_stay() -> None:
    """x + attention + each-forward: every layer adds values of its own."""
    model = parse(
        layers("a = Neg (x)", "r1 = Add (x, a)", "c = Abs (r1)", "r2 = Add (r1, c)", "d = Neg (r2)", "y = Add (r2, d)")
    )
    assert rewritten(HoistAdditions(), [model], INPUTS)[0] == ["Neg", "Add", "Abs", "Add", "Neg", "Add"]


def test_the_sum_may_be_an_output() -> None:
    """A graph output keeps its name and number."""
    model = parse(layers("a1 = Add (x, bias)", "a2 = Add (a1, mask)", "b1 = Add (a2, bias)", "y = Add (b1, mask)"))
    assert rewritten(HoistAdditions(), [model], INPUTS)[0] == ["Add", "Add", "Add"]
