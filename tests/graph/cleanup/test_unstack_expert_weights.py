"""Stacked weights that are read one by one are stored one by one; any other use keeps the stack."""

import numpy as np
import pytest

from accel.graph.cleanup.unstack_expert_weights import UnstackExpertWeights
from tests.graph.text import numbers, parse, rewritten

STACK = {"w": numbers(3, 4, 5)}
INPUTS = [{"x": numbers(2, 4)}, {"x": numbers(1, 4)}]


def graph(body: str, out: str = "5") -> str:
    constants = "\n".join(f"{name} = Constant <value = int64 {{{number}}}> ()" for name, number in NUMBERS.items())
    return f"g (float[n, 4] x) => (float[n, {out}] y) {{ {constants}\n {body} }}"


NUMBERS = {"zero": 0, "two": 2, "last": -1}


def test_layers_become_weights() -> None:
    """Each layer is stored once, however often it is read; a negative index counts from the end."""
    body = (
        "a = Gather (w, zero)\n b = Gather (w, two)\n c = Gather (w, last)\n p = MatMul (x, a)\n q = MatMul (x, b)\n"
        "r = MatMul (x, c)\n s = Add (p, q)\n y = Sub (s, r)"
    )
    model = parse(graph(body), STACK)
    left = rewritten(UnstackExpertWeights(), [model], INPUTS)[0]
    assert "Gather" not in left
    assert set(model.graph.initializers) >= {"w.0", "w.2"}
    assert "w" not in model.graph.initializers
    tensor = model.graph.initializers["w.2"].const_value
    assert tensor is not None
    assert np.array_equal(tensor.numpy(), STACK["w"][2])


@pytest.mark.parametrize(
    "body",
    [
        "a = Gather (w, zero)\n s = ReduceSum <keepdims = 0> (w)\n p = MatMul (x, a)\n y = Mul (p, s)",
        "i = Shape <start = 0, end = 1> (x)\n o = Squeeze (i)\n a = Gather (w, o)\n y = MatMul (x, a)",
        "a = Gather <axis = 2> (w, zero)\n t = Transpose (a)\n y = MatMul (x, t)",
    ],
    ids=["read completely", "computed index", "another axis"],
)
def test_other_uses_keep_the_stack(body: str) -> None:
    """A second consumer, an index that isn't constant, or another axis."""
    model = parse(graph(body, "k"), STACK)
    assert "Gather" in rewritten(UnstackExpertWeights(), [model], INPUTS)[0]
    assert "w" in model.graph.initializers


def test_both_graphs_or_neither() -> None:
    """A stack that one graph reads completely stays in the other, so that they keep sharing it."""
    taken = parse(graph("a = Gather (w, zero)\n y = MatMul (x, a)"), STACK)
    read = parse(graph("s = ReduceSum <keepdims = 0> (w)\n y = Mul (x, s)", "4"), STACK)
    rewritten(UnstackExpertWeights(), [taken, read], INPUTS)
    assert "w" in taken.graph.initializers
    assert "w" in read.graph.initializers
