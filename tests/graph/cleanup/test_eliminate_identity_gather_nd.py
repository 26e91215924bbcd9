"""A GatherND of every element by its own index is removed; any other stays."""

import numpy as np
import onnx_ir as ir
import pytest

from accel.graph.cleanup.eliminate_identity_gather_nd import EliminateIdentityGatherNd
from tests.graph.text import numbers, parse, rewritten, run

# mask[rows, columns] as the exporter writes it, with rows [n, 1, 1, 1] and columns [1, 1, 1, m].
LOOKUP = """
    shape = Shape(mask)
    n_vector = Slice(shape, zeros, ones)
    m_vector = Slice(shape, ones, twos)
    n = Squeeze(n_vector)
    m = Squeeze(m_vector)
    zero = Constant <value = int64 {0}> ()
    one = Constant <value = int64 {1}> ()
    row_range = Range(zero, n, one)
    column_range = Range(zero, m, one)
    rows = Unsqueeze(row_range, behind)
    columns = Unsqueeze(column_range, before)
    size = Max(rows, columns)
    wanted = Shape(size)
    rows_wide = Expand(rows, wanted)
    columns_wide = Expand(columns, wanted)
    row_column = Unsqueeze(rows_wide, last)
    column_column = Unsqueeze(columns_wide, last)
    places = Concat <axis: int = -1> (row_column, column_column)
    y = GatherND(mask, places)
"""
CONSTANTS = {
    "zeros": np.array([0]),
    "ones": np.array([1]),
    "twos": np.array([2]),
    "behind": np.array([1, 2, 3]),
    "before": np.array([0, 1, 2]),
    "last": np.array([-1]),
}
SHAPES: dict[str, tuple[int | str, ...]] = {
    "row_range": ("n",),
    "column_range": ("m",),
    "rows": ("n", 1, 1, 1),
    "columns": (1, 1, 1, "m"),
    "y": ("n", 1, 1, "m"),
}


def graph(body: str = LOOKUP, **shapes: tuple[int | str, ...]) -> ir.Model:
    """The lookup, with the shapes that the exporter notes."""
    model = parse(f"g (float[n, m] mask) => (float[n, a, b, m] y) {{ {body} }}", CONSTANTS)
    for node in model.graph:
        for value in node.outputs:
            if value.name in SHAPES:
                value.shape = ir.Shape((SHAPES | shapes)[value.name])
    return model


def operators(model: ir.Model) -> list[str]:
    """Operators in order."""
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 2)])
def test_identity_becomes_unsqueeze(shape: tuple[int, int]) -> None:
    """`Unsqueeze` returns the same tensor, with two axes inserted, at several lengths."""
    model = graph()
    assert rewritten(EliminateIdentityGatherNd(), [model], [{"mask": numbers(*shape)}]) == [["Unsqueeze"]]
    assert run(model, {"mask": numbers(*shape)})["y"].shape == (shape[0], 1, 1, shape[1])


@pytest.mark.parametrize(
    "body",
    [
        LOOKUP.replace("Range(zero, m, one)", "Range(one, m, one)"),
        LOOKUP.replace("row_range = Range(zero, n, one)", "two = Add(one, one)\n row_range = Range(zero, n, two)"),
        LOOKUP.replace("(row_column, column_column)", "(column_column, row_column)"),
        LOOKUP.replace("GatherND(mask", "GatherND <batch_dims: int = 1> (mask"),
    ],
    ids=["from one", "in steps", "transposed", "by batch"],
)
def test_other_lookups_stay(body: str) -> None:
    """A range from one, in steps, with axes exchanged, or along a batch axis."""
    model = graph(body)
    assert not EliminateIdentityGatherNd()(model).modified
    assert "GatherND" in operators(model)


def test_a_range_of_another_length_stays() -> None:
    """Fewer rows than the data has: a part of the tensor."""
    model = graph(row_range=("k",), rows=("k", 1, 1, 1), y=("k", 1, 1, "m"))
    assert not EliminateIdentityGatherNd()(model).modified
    assert "GatherND" in operators(model)
