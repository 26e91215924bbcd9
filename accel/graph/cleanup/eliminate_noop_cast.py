"""A value is not cast to the type it has."""

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir import convenience


def eliminate_noop_cast(models: Sequence[ir.Model]) -> None:
    """In place: a `Cast` between equal types goes, such as is left where the conversion lowered both sides of one."""
    for model in models:
        for graph in model.graphs():
            for node in list(graph):
                given = node.inputs[0] if node.op_type == "Cast" and node.domain == "" else None
                if given is None or given.dtype is None or node.outputs[0].is_graph_output():
                    continue
                if node.attributes.get_int("to", 0) == given.dtype:
                    convenience.replace_all_uses_with(node.outputs[0], given)
                    graph.remove(node, safe=True)
