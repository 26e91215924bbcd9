"""Fuse the SiLU activation, `x * Sigmoid(x)`, which the feed-forward networks of Llama and its relatives have.

The fused node is ONNX Runtime's `QuickGelu` with a factor of 1: one pass over the activations instead of two. Its
kernels compute the sigmoid as those of `Sigmoid` do, so the numbers stay the same.
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.QuickGelu
SiLU: https://arxiv.org/abs/1702.03118
"""

from functools import partial

import onnx_ir as ir
from onnx_ir import convenience
from onnx_ir.passes import PassResult

from accel.graph.build import CONTRIB
from accel.graph.passes import GraphPass, NoMatchError, remove_unused
from accel.graph.shapes import made_by, used_once

FUSED = "QuickGelu"
DTYPES = {ir.DataType.FLOAT, ir.DataType.FLOAT16}  # of the CUDA kernel


class FuseSilu(GraphPass):
    """Replace `Mul(x, Sigmoid(x))` by `QuickGelu(x, alpha=1)`, in FP32 and FP16.

    A sigmoid that another node reads too stays.
    """

    name = "fuse_silu"
    description = "Fuse SiLU activations into one node each"

    def call(self, model: ir.Model) -> PassResult:
        """Fuse those of the main graph."""
        graph = model.graph
        products = [node for node in graph if node.op_type == "Mul" and node.domain == ""]
        activations = [node for node in products if _sigmoid(node) is not None]
        modified = self.rewrite_each(activations, partial(_fuse, graph))
        if modified:
            graph.opset_imports.setdefault(CONTRIB, 1)
        return remove_unused(model, modified)


def _sigmoid(product: ir.Node) -> ir.Node | None:
    """Return the node that computes the sigmoid of the other factor of a `Mul`; None if none does."""
    for x, factor in (tuple(product.inputs), tuple(reversed(product.inputs))):
        sigmoid = made_by(factor, "Sigmoid")
        if sigmoid is not None and sigmoid.inputs[0] is x:
            return sigmoid
    return None


def _fuse(graph: ir.Graph, node: ir.Node) -> None:
    """Replace the product; raise `NoMatchError` if there is no kernel, or the sigmoid is read elsewhere."""
    sigmoid = _sigmoid(node)
    if sigmoid is None:
        raise NoMatchError("no factor is the sigmoid of the other")
    x = sigmoid.inputs[0]
    if x is None or x.dtype not in DTYPES:
        raise NoMatchError(f"x is {x.dtype if x is not None else None}, for which there is no kernel")
    if not used_once(sigmoid.outputs[0]):
        raise NoMatchError("the sigmoid is read elsewhere")
    fused = ir.node(FUSED, [x], attributes={"alpha": 1.0}, domain=CONTRIB, name=node.name)
    convenience.replace_nodes_and_values(graph, node, [node], [fused], node.outputs, fused.outputs)
