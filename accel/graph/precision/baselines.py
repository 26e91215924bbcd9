"""How others choose what stays in FP32, to compare with: by a list of operators."""

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from accel.graph.precision.formats import Format
from accel.graph.precision.plan import Plan, Reason, has_float, least_plan

EXACT = 1e-6  # weights that 16 bits change by less count as stored in them
LISTED, LAST = "listed operator", "last product"


def by_operators(model: ir.Model, operators: Collection[str], format: Format) -> Plan:
    """Nodes of the listed operators; and the product that makes the logits, if its weight was not made in 16 bits.

    So chooses `auto_mixed_precision` in ONNX Runtime's tools for transformers (1.31).
    """
    plan = least_plan(model, format)
    for node in model.graph:
        if node.op_type in operators and has_float(node):
            plan.nodes.setdefault(node.outputs[0].name or "", Reason(LISTED, node.op_type))
    logits = next((value for value in model.graph.outputs if value.name == "logits"), None)
    last = logits.producer() if logits is not None else None
    weight = last.inputs[1] if last is not None and last.op_type == "MatMul" else None
    if last is not None and weight is not None and weight.const_value is not None:
        content = weight.const_value.numpy()
        if float(np.abs(content - content.astype(format.dtype.numpy()).astype(np.float32)).max()) >= EXACT:
            reason = Reason(LAST, "logits")
            plan.nodes[last.outputs[0].name or ""] = plan.weights[weight.name or ""] = plan.specs["logits"] = reason
    return plan
