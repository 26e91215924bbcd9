"""Take a tensor as it is, instead of looking up each of its elements at its own place."""

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir import convenience
from onnx_ir.passes.common import RemoveUnusedNodesPass

from accel.graph.cleanup.shift_ranges import views_of_range
from accel.graph.shapes import Dims, dims, integers, made_by, scalar


def eliminate_identity_gather_nd(models: Sequence[ir.Model]) -> None:
    """In place: `GatherND` of `data` at (0, 1, ...) along each axis is `data` with axes of length 1 between its own.

    So come masks out of the exporter where the model's code says `mask[rows, columns]` with two ranges: a dozen nodes.
    ONNX specification: https://onnx.ai/onnx/operators/onnx__GatherND.html
    """
    for model in models:
        for node in list(model.graph):
            places = _places(node) if node.op_type == "GatherND" and node.domain == "" else None
            if places is not None:
                _view(model.graph, node, places)
        RemoveUnusedNodesPass()(model)


def _places(lookup: ir.Node) -> list[int] | None:
    """The axis of the output that each axis of the data becomes; None if the lookup is another."""
    shape, made = dims(lookup.inputs[0]), dims(lookup.outputs[0])
    columns = made_by(lookup.inputs[1], "Concat")
    if shape is None or made is None or columns is None or len(columns.inputs) != len(shape):
        return None
    if lookup.attributes.get_int("batch_dims", 0) != 0 or columns.attributes.get_int("axis", 0) not in (-1, len(made)):
        return None
    places = [_place(column, length, made) for column, length in zip(columns.inputs, shape, strict=True)]
    found = [place for place in places if place is not None]
    if len(found) < len(places) or found != sorted(set(found)):
        return None
    rest = [dim for axis, dim in enumerate(made) if axis not in found]
    return found if all(dim == 1 for dim in rest) else None


def _place(column: ir.Value | None, length: int | str, made: Dims) -> int | None:
    """The axis of `made` along which `column` counts from 0 to `length`, whatever the others."""
    last = made_by(column, "Unsqueeze")
    if last is None or scalar(last.inputs[1]) not in (-1, len(made)):
        return None
    value = last.inputs[0]
    stretched = made_by(value, "Expand")
    if stretched is not None:
        value = stretched.inputs[0]
    views, shape = views_of_range(value), dims(value)
    if not views or shape is None or len(shape) != len(made) or dims(views[0].outputs[0]) != (length,):
        return None
    start, _, decode = views[0].inputs
    axes = [axis for axis, dim in enumerate(shape) if dim != 1]
    if scalar(start) != 0 or scalar(decode) != 1 or len(axes) != 1:
        return None
    return axes[0] if shape[axes[0]] == length == made[axes[0]] else None


def _view(graph: ir.Graph, lookup: ir.Node, places: Sequence[int]) -> None:
    old, data = lookup.outputs[0], lookup.inputs[0]
    axes = [axis for axis in range(len(dims(old) or ())) if axis not in places]
    made = ir.Value(name=old.name, type=old.type, shape=old.shape)
    graph.insert_before(
        lookup, ir.node("Unsqueeze", [data, integers(graph, "axes", axes)], outputs=[made], name=lookup.name)
    )
    convenience.replace_all_uses_with(old, made, replace_graph_outputs=True)
    graph.remove(lookup, safe=True)
