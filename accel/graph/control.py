"""Control-flow operators."""

import onnx_ir as ir


def has_subgraph(node: ir.Node) -> bool:
    """Whether the node is a control-flow operator, such as `If`, `Loop` or `Scan`."""
    kinds = (attribute.type for attribute in node.attributes.values())
    return any(kind in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for kind in kinds)
