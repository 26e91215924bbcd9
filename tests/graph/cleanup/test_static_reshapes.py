"""Targets of reshapes that the exporter computes from lengths become constants, where a constant can express them."""

import numpy as np
import pytest

from accel.graph.cleanup.static_reshapes import StaticReshapes
from tests.graph.text import numbers, parse, rewritten, weight

LENGTHS = """
    b = Shape <start: int = 0, end: int = 1> (x)
    t = Shape <start: int = 1, end: int = 2> (x)
    rest = Constant <value_ints = [{rest}]> ()
    target = Concat <axis: int = 0> ({parts}, rest)
"""
INPUTS = [{"x": numbers(2, 3, 8)}, {"x": numbers(1, 1, 8)}, {"x": numbers(4, 0, 8)}]


def graph(given: str, output: str, rest: str, parts: str = "b, t", allowzero: int = 1) -> str:
    """A `Reshape` of x, whose target is computed from x's lengths, and whose output is annotated with `output`."""
    return f"""g (float[{given}] x) => (float[{output}] y) {{
        {LENGTHS.format(rest=rest, parts=parts)}
        y = Reshape <allowzero: int = {allowzero}> (x, target)
    }}"""


@pytest.mark.parametrize(
    ("given", "output", "rest", "target"),
    [
        ("batch, new, 8", "batch, new, 2, 4", "-1, 4", [0, 0, 2, 4]),
        ("batch, new, 8", "batch, new, 8", "8", [0, 0, 8]),
        ("batch, new, 8", "batch, new, 4, 2", "4, 2", [0, 0, 4, 2]),
    ],
)
def test_axes_that_keep_their_index_are_copied(given: str, output: str, rest: str, target: list[int]) -> None:
    """Only the `Reshape` is left, with 0 for copied axes, also those of length 0, which -1 doesn't allow."""
    inputs = INPUTS if "-1" not in rest else INPUTS[:2]  # as exported, -1 beside a length of 0 is refused
    model = parse(graph(given, output, rest))
    assert rewritten(StaticReshapes(), [model], inputs) == [["Reshape"]]
    (name,) = model.graph.initializers
    assert weight(model, name).tolist() == target
    assert next(iter(model.graph)).attributes.get_int("allowzero", 0) == 0


def test_equal_targets_have_one_name() -> None:
    """Equal targets are one initializer in a graph, of the same name in all graphs."""
    twice = """g (float[b, t, 8] x) => (float[b, t, 2, 4] y, float[b, t, 2, 4] z) {
        s = Shape <start: int = 0, end: int = 2> (x)
        rest = Constant <value_ints = [2, 4]> ()
        first = Concat <axis: int = 0> (s, rest)
        second = Concat <axis: int = -1> (s, rest)
        y = Reshape (x, first)
        n = Neg (x)
        z = Reshape (n, second)
    }"""
    models = [parse(twice), parse(graph("batch, new, 8", "batch, new, 2, 4", "2, 4", allowzero=0))]
    rewritten(StaticReshapes(), models, INPUTS[:2])
    assert list(models[0].graph.initializers) == list(models[1].graph.initializers) == ["shape_0_0_2_4"]


def test_one_axis_is_inferred_where_all_others_are_fixed() -> None:
    """Batch and length merged into one axis: -1 expresses it, without ambiguity."""
    model = parse("""g (float[batch, new, 8] x) => (float[both, 8] y) {
        n = Size (x)
        eight = Constant <value_ints = [8]> ()
        rows = Div (n, eight)
        target = Concat <axis: int = 0> (rows, eight)
        y = Reshape (x, target)
    }""")
    assert rewritten(StaticReshapes(), [model], INPUTS) == [["Reshape"]]
    assert weight(model, "shape_-1_8").tolist() == [-1, 8]


@pytest.mark.parametrize(
    "body",
    [
        # the symbols have changed places: copying by position would be wrong
        """g (float[a, b, 8] x) => (float[b, a, 8] y) { s = Shape <start: int = 0, end: int = 1> (x)
         t = Shape <start: int = 1, end: int = 2> (x)
         e = Constant <value_ints = [8]> ()
         target = Concat <axis: int = 0> (t, s, e)
         y = Reshape (x, target) }""",
        # a length that no axis of x has, beside one that is copied
        """g (float[a, b, 8] x) => (float[a, c, 4] y) { s = Shape <start: int = 0, end: int = 1> (x)
         t = Shape <start: int = 1, end: int = 2> (x)
         two = Constant <value_ints = [2]> ()
         twice = Mul (t, two)
         e = Constant <value_ints = [4]> ()
         target = Concat <axis: int = 0> (s, twice, e)
         y = Reshape (x, target) }""",
    ],
)
def test_left_alone_where_no_constant_exists(body: str) -> None:
    """Another order of symbols, or a new length beside a copied one."""
    model = parse(body)
    left = rewritten(StaticReshapes(), [model], INPUTS[:2])[0]
    assert "Concat" in left


def test_unknown_lengths_are_not_taken_for_equal() -> None:
    """Two axes of unknown length are not copies of each other."""
    model = parse(graph("batch, new, 8", "batch, new, 2, 4", "2, 4"))
    for node in model.graph:
        if node.op_type == "Reshape":
            node.outputs[0].shape = type(node.outputs[0].shape)([None, None, 2, 4])
    model.graph.inputs[0].shape = type(model.graph.inputs[0].shape)([None, None, 8])
    assert "Concat" in rewritten(StaticReshapes(), [model], INPUTS[:2])[0]


def test_a_fixed_length_of_zero_is_not_written() -> None:
    """With allowzero=0 a 0 copies; here the axis is always empty."""
    model = parse("""g (float[n, 8] x, int64[2] target) => (float[0, 5] y) {
        none = Constant <value_ints = [0]> ()
        empty = Gather <axis: int = 0> (x, none)
        zero = Constant <value_ints = [0]> ()
        start = Slice (empty, zero, zero)
        y = Reshape <allowzero: int = 1> (start, target)
    }""")
    inputs = [{"x": numbers(3, 8), "target": np.array([0, 5])}]
    rewritten(StaticReshapes(), [model], inputs)
    assert not model.graph.initializers
