"""Remove additions of zero."""

import onnx_ir as ir
from onnx_ir import convenience
from onnx_ir.passes import PassResult

from accel.graph.passes import GraphPass, remove_unused
from accel.graph.shapes import dims, made_by, scalar


class EliminateNoopAdd(GraphPass):
    """Replace `x + 0` by `x`, such as the position bias of an attention that has none.

    Only where the sum has the shape of `x`: a larger zero broadcasts `x`.
    """

    name = "eliminate_noop_add"
    description = "Remove additions of zero"

    def call(self, model: ir.Model) -> PassResult:
        """Remove them from the main graph."""
        modified = False
        for node in list(model.graph):
            if node.op_type != "Add" or node.domain != "" or node.outputs[0].is_graph_output():
                continue
            term = _nonzero_term(node)
            if term is not None:
                convenience.replace_all_uses_with(node.outputs[0], term)
                model.graph.remove(node, safe=True)
                modified = True
        return remove_unused(model, modified)


def _nonzero_term(add: ir.Node) -> ir.Value | None:
    """Return the term that an `Add` returns unchanged, if the other is zero."""
    shape = dims(add.outputs[0])
    for term, other in (add.inputs, reversed(add.inputs)):
        if _is_zero(other) and shape is not None and dims(term) == shape:
            return term
    return None


def _is_zero(value: ir.Value | None) -> bool:
    """Return whether every element is known to be 0."""
    if (filled := made_by(value, "ConstantOfShape")) is not None:
        content = filled.attributes.get("value")
        return content is None or not content.as_tensor().numpy().any()
    while (reshaped := made_by(value, "Expand", "Reshape", "Unsqueeze")) is not None:
        value = reshaped.inputs[0]
    return scalar(value) == 0.0
