"""Precision plans as other tools make them, from a list of operators, for comparison."""

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from accel.graph.precision.formats import Format
from accel.graph.precision.plan import Plan, Reason, has_float, least_plan, node_key
from accel.graph.weights import tensor_content

EXACT = 1e-6  # largest change by rounding of a weight that counts as stored in 16 bits by its authors
LISTED, LAST = "listed operator", "last product"


def by_operators(model: ir.Model, operators: Collection[str], format: Format) -> Plan:
    """Keep nodes of some operators in FP32, and the product that computes the logits if rounding changes its weight.

    `auto_mixed_precision` in ONNX Runtime's tools for transformers (1.31) chooses in the same way.

    Args:
        model: FP32 graph with known types; not changed.
        operators: Operator types to keep in FP32, such as "Softmax".
        format: Format that the other nodes are lowered to.
    """
    plan = least_plan(model, format)
    for node in model.graph:
        if node.op_type in operators and has_float(node):
            plan.nodes.setdefault(node_key(node), Reason(LISTED, node.op_type))
    product = _logits_product(model.graph)
    weight = product.inputs[1] if product is not None else None
    if product is None or weight is None or weight.const_value is None:
        return plan
    elements = tensor_content(weight.const_value)
    rounded = elements.astype(format.dtype.numpy()).astype(np.float32)
    if float(np.abs(elements - rounded).max()) >= EXACT:
        reason = Reason(LAST, "logits")
        plan.nodes[node_key(product)] = reason
        plan.weights[weight.name or ""] = reason
        plan.specs["logits"] = reason
    return plan


def _logits_product(graph: ir.Graph) -> ir.Node | None:
    """Return the `MatMul` that computes the output "logits"; None if there is none."""
    for value in graph.outputs:
        if value.name == "logits":
            producer = value.producer()
            return producer if producer is not None and producer.op_type == "MatMul" else None
    return None
