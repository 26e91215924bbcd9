"""Add nothing where zero is added."""

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir import convenience
from onnx_ir.passes.common import RemoveUnusedNodesPass

from accel.graph.shapes import dims, made_by, scalar


def eliminate_noop_add(models: Sequence[ir.Model]) -> None:
    """In place: `x + 0` is `x`, such as the position bias of an attention that has none.

    Only where the sum has the shape of `x`, and the zero didn't stretch it.
    """
    for model in models:
        for node in list(model.graph):
            if node.op_type != "Add" or node.domain != "" or node.outputs[0].is_graph_output():
                continue
            for value, other in (node.inputs, reversed(node.inputs)):
                if value is not None and _is_zero(other) and dims(value) == dims(node.outputs[0]) is not None:
                    convenience.replace_all_uses_with(node.outputs[0], value)
                    model.graph.remove(node, safe=True)
                    break
        RemoveUnusedNodesPass()(model)


def _is_zero(value: ir.Value | None) -> bool:
    if (filled := made_by(value, "ConstantOfShape")) is not None:
        content = filled.attributes.get("value")
        return content is None or not content.as_tensor().numpy().any()
    while (stretched := made_by(value, "Expand", "Reshape", "Unsqueeze")) is not None:
        value = stretched.inputs[0]
    return scalar(value) == 0.0
