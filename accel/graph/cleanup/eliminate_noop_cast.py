"""Remove casts to the type that a value has."""

import onnx_ir as ir
from onnx_ir import convenience
from onnx_ir.passes import PassResult

from accel.graph.passes import GraphPass


class EliminateNoopCast(GraphPass):
    """Remove `Cast` between equal types, such as is left where the conversion lowered both sides of one."""

    name = "eliminate_noop_cast"
    description = "Remove casts between equal types"

    def call(self, model: ir.Model) -> PassResult:
        """Remove them from all graphs. A cast that makes an output of a graph stays, with the output's name."""
        modified = False
        for graph in model.graphs():
            for node in list(graph):
                source = node.inputs[0] if node.op_type == "Cast" and node.domain == "" else None
                if source is None or source.dtype is None or node.outputs[0].is_graph_output():
                    continue
                if node.attributes.get_int("to", 0) == source.dtype:
                    convenience.replace_all_uses_with(node.outputs[0], source)
                    graph.remove(node, safe=True)
                    modified = True
        return PassResult(model, modified)
