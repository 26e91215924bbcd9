"""Use a tensor directly instead of gathering each of its elements from the element's own index."""

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir import convenience
from onnx_ir.passes import PassResult

from accel.graph.cleanup.shift_ranges import range_and_views
from accel.graph.passes import GraphPass, remove_unused
from accel.graph.shapes import Dims, dims, integers, made_by, scalar


class EliminateIdentityGatherNd(GraphPass):
    """Replace `GatherND` of `data` at (0, 1, ...) along each axis by `data` with axes of length 1 inserted.

    The exporter writes a dozen nodes for masks whose code indexes `mask[rows, columns]` with two ranges.
    ONNX specification: https://onnx.ai/onnx/operators/onnx__GatherND.html
    """

    name = "eliminate_identity_gather_nd"
    description = "Replace GatherND of every element by Unsqueeze"

    def call(self, model: ir.Model) -> PassResult:
        """Replace them in the main graph."""
        modified = False
        for node in list(model.graph):
            axes = _output_axes(node) if node.op_type == "GatherND" and node.domain == "" else None
            if axes is not None:
                _unsqueeze(model.graph, node, axes)
                modified = True
        return remove_unused(model, modified)


def _output_axes(gather: ir.Node) -> list[int] | None:
    """Return the axis of the output that each axis of the data becomes; None if elements are moved or left out."""
    data_shape, output_shape = dims(gather.inputs[0]), dims(gather.outputs[0])
    indices = made_by(gather.inputs[1], "Concat")
    if data_shape is None or output_shape is None or indices is None or len(indices.inputs) != len(data_shape):
        return None
    if gather.attributes.get_int("batch_dims", 0) != 0:
        return None
    if indices.attributes.get_int("axis", 0) not in (-1, len(output_shape)):
        return None
    axes = []
    for index, length in zip(indices.inputs, data_shape, strict=True):
        axis = _counted_axis(index, length, output_shape)
        if axis is None:
            return None
        axes.append(axis)
    if axes != sorted(set(axes)):
        return None
    others = [dim for axis, dim in enumerate(output_shape) if axis not in axes]
    return axes if all(dim == 1 for dim in others) else None


def _counted_axis(index: ir.Value | None, length: int | str, output_shape: Dims) -> int | None:
    """Return the axis of `output_shape` along which `index` counts from 0 to `length`, alike on all other axes."""
    unsqueeze = made_by(index, "Unsqueeze")  # [*output_shape] -> [*output_shape, 1]
    if unsqueeze is None or scalar(unsqueeze.inputs[1]) not in (-1, len(output_shape)):
        return None
    value = unsqueeze.inputs[0]
    expand = made_by(value, "Expand")
    if expand is not None:
        value = expand.inputs[0]
    nodes, shape = range_and_views(value), dims(value)
    if not nodes or shape is None or len(shape) != len(output_shape) or dims(nodes[0].outputs[0]) != (length,):
        return None
    start, _, delta = nodes[0].inputs
    axes = [axis for axis, dim in enumerate(shape) if dim != 1]
    if scalar(start) != 0 or scalar(delta) != 1 or len(axes) != 1:
        return None
    return axes[0] if shape[axes[0]] == length == output_shape[axes[0]] else None


def _unsqueeze(graph: ir.Graph, gather: ir.Node, data_axes: Sequence[int]) -> None:
    """Replace a `GatherND` by its data, which becomes the axes `data_axes` of the output."""
    output = gather.outputs[0]
    axes = [axis for axis in range(len(dims(output) or ())) if axis not in data_axes]
    unsqueeze = ir.node("Unsqueeze", [gather.inputs[0], integers(graph, "axes", axes)], name=gather.name)
    convenience.replace_nodes_and_values(graph, gather, [gather], [unsqueeze], [output], unsqueeze.outputs)
