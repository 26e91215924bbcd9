"""Multiply with the transpose of a tied embedding without storing a transposed copy."""

from functools import partial

import onnx_ir as ir
from onnx_ir import convenience
from onnx_ir.passes import PassResult

from accel.graph.build import CONTRIB
from accel.graph.passes import GraphPass, NoMatchError, remove_unused
from accel.graph.shapes import made_by, permutation

FUSED = "FusedMatMul"
DTYPES = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}


class FuseTransposedMatmul(GraphPass):
    """Replace `MatMul(x, Transpose(weight))` by `FusedMatMul(x, weight, transB=1)`.

    ONNX Runtime would transpose the weight when a session opens, and hold that copy beside it, in each branch of an
    `If` another one. A weight that is only used transposed is stored so by `fold_transposes`.
    https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.FusedMatMul
    """

    name = "fuse_transposed_matmul"
    description = "Multiply with tied embeddings without a transposed copy"

    def call(self, model: ir.Model) -> PassResult:
        """Fuse those of all graphs, subgraphs included."""
        modified = False
        for graph in list(model.graphs()):
            products = [node for node in graph if node.op_type == "MatMul" and node.domain == ""]
            transposed = [node for node in products if made_by(node.inputs[1], "Transpose") is not None]
            modified |= self.rewrite_each(transposed, partial(_fuse, graph))
        if modified:
            model.graph.opset_imports.setdefault(CONTRIB, 1)
        return remove_unused(model, modified)


def _weight(product: ir.Node) -> ir.Value:
    """Return the weight [rows, columns] whose transpose is the second factor; raise `NoMatchError` if it is none."""
    transpose = made_by(product.inputs[1], "Transpose")
    weight = transpose.inputs[0] if transpose is not None else None
    if transpose is None or weight is None or not weight.is_initializer():
        raise NoMatchError("the transposed factor is not a weight")
    if weight.dtype not in DTYPES:
        raise NoMatchError(f"the weight is {weight.dtype}, for which there is no kernel")
    if weight.shape is None or len(weight.shape) != 2 or permutation(transpose) not in ((), (1, 0)):
        raise NoMatchError(f"axes {permutation(transpose)} of a weight of shape {weight.shape} are transposed")
    return weight


def _fuse(graph: ir.Graph | ir.Function, node: ir.Node) -> None:
    """Replace the product; raise `NoMatchError` if its second factor is no transposed weight."""
    fused = ir.node(FUSED, [node.inputs[0], _weight(node)], attributes={"transB": 1}, domain=CONTRIB, name=node.name)
    convenience.replace_nodes_and_values(graph, node, [node], [fused], node.outputs, fused.outputs)
