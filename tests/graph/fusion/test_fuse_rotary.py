"""Rotary positions become one node where that is what they are."""

import numpy as np
import pytest

from accel.graph.fusion.fuse_rotary import FuseRotary
from tests.graph.text import numbers, parse, rewritten

ANGLES = """
    angle = Mul (places, frequencies)
    both = Concat <axis: int = -1> (angle, SECOND)
    cosine = Cos (both)
    sine = Sin (both)
    one = Constant <value = int64[1] {1}> ()
    cosines = Unsqueeze (cosine, one)
    sines = Unsqueeze (sine, one)
"""
TURN = """
    zero = Constant <value = int64[1] {0}> ()
    middle = Constant <value = int64[1] {3}> ()
    end = Constant <value = int64[1] {9223372036854775807}> ()
    last = Constant <value = int64[1] {3}> ()
    first_half = Slice (x, zero, middle, last, one)
    second_half = Slice (x, middle, end, last, one)
    negative = Neg (SLICED)
    swapped = Concat <axis: int = -1> (negative, OTHER)
    straight = Mul (x, cosines)
    crossed = Mul (swapped, sines)
    y = Add (straight, crossed)
"""
WEIGHTS = {"frequencies": np.array([1.0, 0.3, 0.05], np.float32)}


def left(batch: str, tokens: str = "1", second: str = "angle", sliced: str = "second_half") -> list[str]:
    """The operators left of a rotation of x; its numbers stay, whatever the batch and the place."""
    other = "first_half" if sliced == "second_half" else "second_half"
    body = (ANGLES + TURN).replace("SECOND", second).replace("SLICED", sliced).replace("OTHER", other)
    inputs = f"float[batch, 2, {tokens}, 6] x, float[{batch}, {tokens}, 1] places"
    model = parse(f"g ({inputs}) => (float[batch, 2, {tokens}, 6] y) {{ {body} }}", WEIGHTS)
    inputs = []
    for rows in (1, 3):
        new = 1 if tokens == "1" else 4
        places = 7.0 + np.arange((rows if batch == "batch" else 1) * new, dtype=np.float32)
        inputs.append({"x": numbers(rows, 2, new, 6), "places": places.reshape(-1, new, 1)})
    (found,) = rewritten(FuseRotary(), [model], inputs)
    return found


@pytest.mark.parametrize("tokens", ["1", "new"], ids=["one token", "several tokens"])
@pytest.mark.parametrize("batch", ["batch", "1"], ids=["places of each", "places of all"])
def test_a_rotation(batch: str, tokens: str) -> None:
    """Every sequence at a place of its own, or all at one: the same numbers from one node."""
    found = left(batch, tokens)
    assert found.count("RotaryEmbedding") == 1
    assert not {"Neg", "Add"} & set(found)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"second": "twice"}, "the halves of the angles may differ"),
        ({"sliced": "first_half"}, ""),
    ],
    ids=["halves of other angles", "turned the other way"],
)
def test_what_is_no_rotation(
    other: dict[str, str], reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Stays, and the log says why where it is a rotation."""
    caplog.set_level("DEBUG", "accel.graph.passes")
    monkeypatch.setattr(f"{__name__}.ANGLES", ANGLES.replace("both =", "twice = Add (angle, angle)\n both =", 1))
    found = left("batch", **other)
    assert "RotaryEmbedding" not in found
    assert {"Neg", "Add"} <= set(found)
    assert reason in caplog.text


def test_rows_are_rotated_before_they_are_cut_into_heads() -> None:
    """Queries and keys of one product: the rows of each are rotated, and no split of heads is left."""
    heads = """
        cut = Reshape (rows, shape)
        turned = Transpose <perm: ints = [0, 2, 1, 3]> (cut)
        x, z = Split <axis: int = 1> (turned, sizes)
    """
    body = heads + (ANGLES + TURN).replace("SECOND", "angle").replace("SLICED", "second_half").replace(
        "OTHER", "first_half"
    )
    weights = WEIGHTS | {"shape": np.array([0, 0, 3, 6]), "sizes": np.array([2, 1])}
    signature = "float[batch, new, 18] rows, float[batch, new, 1] places"
    model = parse(f"g ({signature}) => (float[batch, 2, new, 6] y, float[batch, 1, new, 6] z) {{ {body} }}", weights)
    inputs = [
        {"rows": numbers(rows, new, 18), "places": np.arange(rows * new, dtype=np.float32).reshape(rows, new, 1)}
        for rows, new in ((1, 5), (3, 2), (2, 1))
    ]
    rewritten(FuseRotary(), [model], inputs)
    node = next(node for node in model.graph if node.op_type == "RotaryEmbedding")
    split = next(node for node in model.graph if node.op_type == "Split")
    assert node.inputs[0] is split.outputs[0]
    assert split.inputs[0] is not None
    assert split.inputs[0].name == "rows"
