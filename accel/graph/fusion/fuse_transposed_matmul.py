"""Read a weight that is used both ways as it lies, instead of a transposed copy of it."""

import onnx_ir as ir
from onnx_ir import convenience
from onnx_ir.passes.common import RemoveUnusedNodesPass

from accel.graph.fusion.fuse_skip_norm import DOMAIN
from accel.graph.shapes import made_by

FUSED = "FusedMatMul"
KINDS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}


def fuse_transposed_matmul(model: ir.Model) -> None:
    """In place: the product with a transposed weight that is looked up as well, as tied embeddings are, is one node.

    ONNX Runtime would transpose the weight when a session opens, and hold that copy beside it, in each branch of an
    `If` another one. What is only used transposed `fold_transposes` has stored so.
    https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.FusedMatMul
    """
    for graph in list(model.graphs()):
        for node in list(graph):
            weight = _transposed(node)
            if weight is not None:
                _fuse(graph, node, weight)
                model.graph.opset_imports.setdefault(DOMAIN, 1)
    RemoveUnusedNodesPass()(model)


def _transposed(node: ir.Node) -> ir.Value | None:
    """The weight, rows by columns, whose transpose is the second factor of a product."""
    if node.op_type != "MatMul" or node.domain != "":
        return None
    turn = made_by(node.inputs[1], "Transpose")
    weight = turn.inputs[0] if turn is not None else None
    if turn is None or weight is None or not weight.is_initializer() or weight.dtype not in KINDS:
        return None
    if weight.shape is None or len(weight.shape) != 2 or list(turn.attributes.get_ints("perm", (1, 0))) != [1, 0]:
        return None
    return weight


def _fuse(graph: ir.Graph | ir.Function, node: ir.Node, weight: ir.Value) -> None:
    old = node.outputs[0]
    made = ir.Value(name=old.name, type=old.type, shape=old.shape)
    fused = ir.node(
        FUSED, [node.inputs[0], weight], attributes={"transB": 1}, domain=DOMAIN, outputs=[made], name=node.name
    )
    graph.insert_before(node, fused)
    convenience.replace_all_uses_with(old, made, replace_graph_outputs=True)
    graph.remove(node, safe=True)
