"""Give a `Reshape` its target as a constant, where the exporter computes it from the lengths of its inputs."""

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from accel.graph.shapes import integers, reshape_target


def static_reshapes(models: Sequence[ir.Model]) -> None:
    """In place: a shape vector put together at run time becomes a constant, and what computed it goes.

    An axis that keeps its place and length is written 0, which copies it; a fixed one as it is. One axis may be -1,
    and only where all others are fixed: next to a copied axis of length 0, -1 could not be told.
    ONNX specification: https://onnx.ai/onnx/operators/onnx__Reshape.html
    """
    for model in models:
        for node in list(model.graph):
            if node.op_type == "Reshape" and node.domain == "" and node.inputs[1] is not None:
                target = reshape_target(node.inputs[0], node.outputs[0])
                if node.inputs[1].const_value is None and target is not None:
                    node.replace_input_with(1, integers(model.graph, "shape", target))
                    node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)
        RemoveUnusedNodesPass()(model)
