"""Arithmetic in bfloat16 that ONNX Runtime's CPU provider has no kernels for, done in FP32 and rounded after each step.

Some models compute a position bias in bfloat16 whatever their weights are. Rounding an FP32 result to bfloat16 gives
what bfloat16 arithmetic gives: FP32 holds the product or sum of two such numbers exactly enough to be rounded once
(S. Figueroa, When is double rounding innocuous?, 1995).
"""

import onnx_ir as ir

from accel.graph.precision.formats import BF16, FLOAT

BRAIN = BF16.dtype
OPERATORS = {"Add", "Sub", "Mul", "Div", "Neg", "Sqrt", "Reciprocal"}  # rounded correctly, one by one


def widen_bfloat16(model: ir.Model) -> None:
    """In place, in the graph and the graphs inside it. Other operators in bfloat16 are left as they are."""
    for node in list(model.graph.all_nodes()):
        if (
            node.domain == ""
            and node.op_type in OPERATORS
            and node.outputs[0].dtype == BRAIN
            and node.graph is not None
        ):
            for position, value in enumerate(node.inputs):
                if value is not None:
                    node.replace_input_with(position, _cast(node, value, FLOAT, f"in.{position}"))
            result = node.outputs[0]
            result.type = ir.TensorType(FLOAT)
            users = list(result.uses())
            rounded = _cast(node, result, BRAIN, "out")
            for user, position in users:
                user.replace_input_with(position, rounded)
            if result.is_graph_output():
                outputs = node.graph.outputs
                outputs[outputs.index(result)] = rounded


def _cast(node: ir.Node, value: ir.Value, dtype: ir.DataType, place: str) -> ir.Value:
    name = f"{node.outputs[0].name}.{dtype.name.lower()}.{place}"
    made = ir.Value(name=name, type=ir.TensorType(dtype), shape=value.shape)
    cast = ir.node("Cast", [value], attributes={"to": dtype}, outputs=[made], name=name)
    graph = node.graph
    if graph is not None:
        (graph.insert_after if place == "out" else graph.insert_before)(node, cast)
    return made
