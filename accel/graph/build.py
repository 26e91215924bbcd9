"""Functions that create initializers and insert nodes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

CONTRIB = "com.microsoft"  # ONNX Runtime's own operators


def add_initializer(graph: ir.Graph, name: str, content: np.ndarray) -> ir.Value:
    """Register `content` as an initializer of `graph`. The name must be free."""
    value = ir.val(name, const_value=ir.tensor(content, name=name))
    graph.register_initializer(value)
    return value


def add_node(
    graph: ir.Graph,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    name: str | None = None,
    *,
    attributes: Mapping[str, Any] | None = None,
    domain: str = "",
    dtype: ir.DataType | None = None,
    shape: ir.Shape | None = None,
    before: ir.Node | None = None,
    behind: ir.Value | None = None,
) -> ir.Value:
    """Insert a node that has one output.

    Args:
        graph: Graph that the node becomes part of.
        op_type: Operator, such as "MatMul".
        inputs: Inputs in the operator's order; None for an optional one that is left out.
        name: Name of the node and of its output; chosen by onnx_ir if None.
        attributes: Attributes of the node.
        domain: Operator set that defines the operator; "" is ONNX's own.
        dtype: Element type of the output, if known.
        shape: Shape of the output, if known.
        before: Node to insert the new one in front of.
        behind: Value behind whose producer to insert the node; at the start of the graph if no node computes it.
            Without `before` and `behind` the node becomes the last of the graph.

    Returns:
        The node's output.
    """
    output = ir.Value(name=name, type=None if dtype is None else ir.TensorType(dtype), shape=shape)
    node = ir.node(op_type, inputs, attributes=attributes, domain=domain, outputs=[output], name=name)
    producer = behind.producer() if behind is not None else None
    if before is not None:
        graph.insert_before(before, node)
    elif producer is not None:
        graph.insert_after(producer, node)
    elif behind is not None:
        graph.insert_before(graph[0], node)
    else:
        graph.append(node)
    return output


def add_cast(
    graph: ir.Graph,
    value: ir.Value,
    dtype: ir.DataType,
    name: str,
    *,
    before: ir.Node | None = None,
    behind: ir.Value | None = None,
) -> ir.Value:
    """Insert a `Cast` of `value` to `dtype` and return its output: see `add_node`."""
    return add_node(
        graph,
        "Cast",
        [value],
        name,
        attributes={"to": int(dtype)},
        dtype=dtype,
        shape=value.shape,
        before=before,
        behind=behind,
    )
