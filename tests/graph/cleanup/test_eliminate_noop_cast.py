"""Casts to the type that a value has."""

from accel.graph.cleanup.eliminate_noop_cast import eliminate_noop_cast
from tests.graph.text import numbers, parse, rewritten


def test_what_changes_nothing_goes() -> None:
    """One to its own type in the middle; one that does change the type, and one whose name the caller knows, stay."""
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
    assert rewritten(eliminate_noop_cast, [model], [{"x": numbers(5)}]) == [["Neg", "Cast", "Cast", "Abs", "Cast"]]


def test_inside_a_branch() -> None:
    model = parse(
        """g (float[n] x, bool c) => (float[n] y) {
            y = If (c) <
                then_branch = t () => (float[n] z) { a = Cast <to: int = 1> (x)\n z = Neg (a) },
                else_branch = e () => (float[n] z) { z = Abs (x) }
            >
        }"""
    )
    eliminate_noop_cast([model])
    assert "Cast" not in {node.op_type for graph in model.graphs() for node in graph}
