"""A shape that the exporter computes from lengths becomes a constant, where a constant can say it."""

import numpy as np
import pytest

from accel.graph.cleanup.static_reshapes import static_reshapes
from tests.graph.text import numbers, parse, rewritten, weight

LENGTHS = """
    b = Shape <start: int = 0, end: int = 1> (x)
    t = Shape <start: int = 1, end: int = 2> (x)
    rest = Constant <value_ints = [{rest}]> ()
    target = Concat <axis: int = 0> ({parts}, rest)
"""
INPUTS = [{"x": numbers(2, 3, 8)}, {"x": numbers(1, 1, 8)}, {"x": numbers(4, 0, 8)}]


def graph(given: str, made: str, rest: str, parts: str = "b, t", allowzero: int = 1) -> str:
    """A Reshape of x, whose target is put together from x's lengths; the value it makes is annotated `made`."""
    return f"""g (float[{given}] x) => (float[{made}] y) {{
        {LENGTHS.format(rest=rest, parts=parts)}
        y = Reshape <allowzero: int = {allowzero}> (x, target)
    }}"""


@pytest.mark.parametrize(
    ("given", "made", "rest", "target"),
    [
        ("batch, new, 8", "batch, new, 2, 4", "-1, 4", [0, 0, 2, 4]),
        ("batch, new, 8", "batch, new, 8", "8", [0, 0, 8]),
        ("batch, new, 8", "batch, new, 4, 2", "4, 2", [0, 0, 4, 2]),
    ],
)
def test_axes_that_keep_their_place_are_copied(given: str, made: str, rest: str, target: list[int]) -> None:
    """One Reshape is left, with 0 for what stays, also for a length of 0, which -1 could not tell."""
    inputs = INPUTS if "-1" not in rest else INPUTS[:2]  # as exported, -1 beside a length of 0 is refused
    model = parse(graph(given, made, rest))
    assert rewritten(static_reshapes, [model], inputs) == [["Reshape"]]
    (name,) = model.graph.initializers
    assert weight(model, name).tolist() == target
    assert next(iter(model.graph)).attributes.get_int("allowzero", 0) == 0


def test_all_graphs_name_a_target_alike() -> None:
    """Equal targets are one initializer in a graph, and have one name in all."""
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
    rewritten(static_reshapes, models, INPUTS[:2])
    assert list(models[0].graph.initializers) == list(models[1].graph.initializers) == ["shape_0_0_2_4"]


def test_one_axis_may_be_left_open_where_all_others_are_fixed() -> None:
    """Batch and length joined into one axis: -1 is the only way to say it, and clear."""
    model = parse("""g (float[batch, new, 8] x) => (float[both, 8] y) {
        n = Size (x)
        eight = Constant <value_ints = [8]> ()
        rows = Div (n, eight)
        target = Concat <axis: int = 0> (rows, eight)
        y = Reshape (x, target)
    }""")
    assert rewritten(static_reshapes, [model], INPUTS) == [["Reshape"]]
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
def test_left_alone_where_a_constant_cannot_say_it(body: str) -> None:
    """Another order of symbols, or a new length beside a copied one."""
    model = parse(body)
    left = rewritten(static_reshapes, [model], INPUTS[:2])[0]
    assert "Concat" in left


def test_unknown_lengths_are_not_taken_for_equal() -> None:
    """Two axes of which nothing is known are not the same axis."""
    model = parse(graph("batch, new, 8", "batch, new, 2, 4", "2, 4"))
    for node in model.graph:
        if node.op_type == "Reshape":
            node.outputs[0].shape = type(node.outputs[0].shape)([None, None, 2, 4])
    model.graph.inputs[0].shape = type(model.graph.inputs[0].shape)([None, None, 8])
    assert "Concat" in rewritten(static_reshapes, [model], INPUTS[:2])[0]


def test_a_fixed_length_of_zero_is_not_written() -> None:
    """With allowzero=0 a 0 copies; here the axis is empty for good."""
    model = parse("""g (float[n, 8] x, int64[2] target) => (float[0, 5] y) {
        none = Constant <value_ints = [0]> ()
        empty = Gather <axis: int = 0> (x, none)
        zero = Constant <value_ints = [0]> ()
        start = Slice (empty, zero, zero)
        y = Reshape <allowzero: int = 1> (start, target)
    }""")
    inputs = [{"x": numbers(3, 8), "target": np.array([0, 5])}]
    rewritten(static_reshapes, [model], inputs)
    assert not model.graph.initializers
