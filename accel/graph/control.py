"""Control-flow operators."""

import onnx_ir as ir


def has_subgraph(node: ir.Node) -> bool:
    """Return whether the node is a control-flow operator, such as `If`, `Loop` or `Scan`."""
    graph_types = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return any(attribute.type in graph_types for attribute in node.attributes.values())
