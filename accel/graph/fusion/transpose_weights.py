"""Store the weights of matrix products as [out, in], as PyTorch and the fused engine's kernel do."""

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir import convenience
from onnx_ir.passes import PassResult

from accel.graph.build import CONTRIB
from accel.graph.fusion.fuse_transposed_matmul import DTYPES, FUSED
from accel.graph.passes import GraphPass
from accel.graph.weights import transpose


class TransposeWeights(GraphPass):
    """Store a weight [in, out] that every graph reads only as the second factor of products as [out, in].

    `MatMul(x, weight)` becomes `FusedMatMul(x, weight, transB=1)`, and `Gemm` gets the same attribute. So prefill,
    branches, static decode graph and the kernel of the fused engine read the same bytes. A weight that any graph also
    reads otherwise, as `Gather` reads an embedding, stays in all of them, and so do stacked weights of three axes.
    https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.FusedMatMul
    """

    name = "transpose_weights"
    description = "Store the weights of products as [out, in]"

    def prepare(self, models: Sequence[ir.Model]) -> None:
        """Collect the weights that all graphs read only as the second factors of products."""
        weights = [value for model in models for graph in model.graphs() for value in graph.initializers.values()]
        others = {weight.name for weight in weights if not _products(weight)}
        self._names = {weight.name for weight in weights} - others

    def call(self, model: ir.Model) -> PassResult:
        """Transpose the weights on which all graphs agree."""
        modified = False
        for weight in [value for graph in model.graphs() for value in graph.initializers.values()]:
            products = _products(weight) if weight.name in self._names else []
            if products:
                transpose(weight, (1, 0))
                modified = True
            for product in products:
                _turn(product)
        if modified:
            model.graph.opset_imports.setdefault(CONTRIB, 1)
        return PassResult(model, modified)


def _products(weight: ir.Value) -> list[ir.Node]:
    """Return the products that read a matrix, through casts too; none if it is read otherwise, or is no matrix."""
    tensor = weight.const_value
    if tensor is None or weight.dtype not in DTYPES or len(tensor.shape) != 2:
        return []
    products: list[ir.Node] = []
    values = [weight]
    while values:
        value = values.pop()
        if value.is_graph_output() or value.is_graph_input():
            return []
        for node, index in value.uses():
            if node.op_type == "Cast" and node.domain == "" and node.outputs[0].dtype in DTYPES:
                values.append(node.outputs[0])
            elif _is_second_factor(node, index):
                products.append(node)
            else:
                return []
    return products


def _is_second_factor(node: ir.Node, index: int) -> bool:
    """Return whether a node multiplies with its input `index` as it is."""
    if index != 1 or node.domain != "":
        return False
    return node.op_type == "MatMul" or (node.op_type == "Gemm" and not node.attributes.get_int("transB", 0))


def _turn(product: ir.Node) -> None:
    """Let a product transpose its second factor; its name stays."""
    if product.op_type == "Gemm":
        product.attributes["transB"] = ir.AttrInt64("transB", 1)
        return
    fused = ir.node(FUSED, product.inputs, attributes={"transB": 1}, domain=CONTRIB, name=product.name)
    graph = product.graph
    if graph is not None:
        convenience.replace_nodes_and_values(graph, product, [product], [fused], product.outputs, fused.outputs)
