"""Casts between equal types are removed, in every graph."""

import numpy as np

from accel.graph.cleanup.eliminate_noop_cast import EliminateNoopCast
from tests.graph.text import numbers, parse, rewritten


def test_a_cast_to_the_same_type() -> None:
    """One in the middle is removed; casts to another type, and those that make an output of the model, stay."""
    model = parse(
        """g (float[n] x) => (float[n] y, float[n] z) {
            a = Neg (x)
            b = Cast <to: int = 1> (a)
            c = Cast <to: int = 11> (b)
            d = Cast <to: int = 1> (c)
            y = Abs (d)
            z = Cast <to: int = 1> (a)
        }"""
    )
    assert rewritten(EliminateNoopCast(), [model], [{"x": numbers(5)}]) == [["Neg", "Cast", "Cast", "Abs", "Cast"]]


def test_inside_a_branch() -> None:
    """A cast in a subgraph is removed as well."""
    model = parse(
        """g (float[n] x, bool c) => (float[n] y) {
            y = If (c) <
                then_branch = t () => (float[n] z) { a = Cast <to: int = 1> (x)\n z = Neg (a) },
                else_branch = e () => (float[n] z) { z = Abs (x) }
            >
        }"""
    )
    inputs = [{"x": numbers(5), "c": np.array(value)} for value in (True, False)]
    rewritten(EliminateNoopCast(), [model], inputs)
    assert "Cast" not in {node.op_type for graph in model.graphs() for node in graph}
