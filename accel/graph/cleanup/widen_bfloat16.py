"""Compute bfloat16 arithmetic, for which ONNX Runtime's CPU provider has no kernels, in FP32 with rounding.

Some models compute a position bias in bfloat16 whatever their weights are. Rounding an FP32 result to bfloat16 gives
what bfloat16 arithmetic gives: FP32 holds the product or sum of two such numbers exactly enough to be rounded once
(S. Figueroa, When is double rounding innocuous?, 1995).
"""

import onnx_ir as ir
from onnx_ir.passes import PassResult

from accel.graph.build import add_cast
from accel.graph.passes import GraphPass
from accel.graph.precision.formats import BF16, FLOAT

OPERATORS = {"Add", "Sub", "Mul", "Div", "Neg", "Sqrt", "Reciprocal"}  # IEEE 754 rounds each of them correctly


class WidenBfloat16(GraphPass):
    """Compute arithmetic operators in FP32, and round their results to bfloat16.

    Other operators in bfloat16 stay as they are.
    """

    name = "widen_bfloat16"
    description = "Compute bfloat16 arithmetic in FP32 and round"

    def call(self, model: ir.Model) -> PassResult:
        """Widen the operators of the main graph and its subgraphs."""
        modified = False
        for node in list(model.graph.all_nodes()):
            is_bfloat16 = node.outputs[0].dtype == BF16.dtype
            if is_bfloat16 and node.domain == "" and node.op_type in OPERATORS and isinstance(node.graph, ir.Graph):
                _widen(node.graph, node)
                modified = True
        return PassResult(model, modified)


def _widen(graph: ir.Graph, node: ir.Node) -> None:
    """Cast the inputs of `node` to FP32, and its output back."""
    output = node.outputs[0]
    for index, value in enumerate(node.inputs):
        if value is not None:
            name = f"{output.name}.{FLOAT.name.lower()}.in.{index}"
            node.replace_input_with(index, add_cast(graph, value, FLOAT, name, before=node))
    output.type = ir.TensorType(FLOAT)
    uses = list(output.uses())
    rounded = add_cast(graph, output, BF16.dtype, f"{output.name}.{BF16.dtype.name.lower()}.out", behind=output)
    for consumer, index in uses:
        consumer.replace_input_with(index, rounded)
    if output.is_graph_output():
        graph.outputs[graph.outputs.index(output)] = rounded
