"""Make the targets of `Reshape` constants, where the exporter computes them from the lengths of inputs."""

import onnx_ir as ir
from onnx_ir.passes import PassResult

from accel.graph.passes import GraphPass, remove_unused
from accel.graph.shapes import integers, reshape_target


class StaticReshapes(GraphPass):
    """Replace a `Reshape`'s computed target by a constant, and remove what computed it.

    An axis that keeps its index and length is written as 0, which copies it, and an axis of fixed length as that
    length. One axis may be -1, but only where all others are fixed: beside a copied axis of length 0, its length
    would be undefined.
    ONNX specification: https://onnx.ai/onnx/operators/onnx__Reshape.html
    """

    name = "static_reshapes"
    description = "Make the targets of reshapes constants"

    def call(self, model: ir.Model) -> PassResult:
        """Replace the targets in the main graph."""
        modified = False
        for node in list(model.graph):
            if node.op_type != "Reshape" or node.domain != "" or node.inputs[1] is None:
                continue
            target = reshape_target(node.inputs[0], node.outputs[0])
            if node.inputs[1].const_value is None and target is not None:
                node.replace_input_with(1, integers(model.graph, "shape", target))
                node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)
                modified = True
        return remove_unused(model, modified)
