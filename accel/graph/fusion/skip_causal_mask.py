"""Compute attention over a prompt without its mask, where the mask hides nothing but later tokens.

Kernels that hide later tokens by themselves skip them, which halves the work, and read no mask. Whether the mask hides
more (padding, tokens outside a sliding window) depends on the input, so an `If` around each attention decides at run
time, on a condition that is computed once for all attentions with the same mask.
"""

import numpy as np
import onnx_ir as ir
from onnx_ir import convenience
from onnx_ir.passes import PassResult

from accel.graph.build import CONTRIB, add_cast, add_initializer, add_node
from accel.graph.passes import GraphPass, NoMatchError, remove_unused
from accel.graph.shapes import dims, integer

BIAS = 5  # input of `MultiHeadAttention`
VISIBLE = -1.0  # a mask's entries are 0, or far below this


class SkipCausalMask(GraphPass):
    """Put each `MultiHeadAttention` over as many keys as queries into an `If`, beside one that hides later tokens."""

    name = "skip_causal_mask"
    description = "Read no mask where it only hides later tokens"

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite those of the main graph."""
        nodes = [node for node in model.graph if node.op_type == "MultiHeadAttention"]
        modified = self.rewrite_each(nodes, lambda node: _rewrite(model.graph, node))
        return remove_unused(model, modified)


def _rewrite(graph: ir.Graph, node: ir.Node) -> None:
    """Replace the attention by an `If`; raise `NoMatchError`, with nothing changed, if its mask can't be skipped."""
    bias = node.inputs[BIAS] if len(node.inputs) > BIAS else None
    shape, query = dims(bias), dims(node.inputs[0])
    if bias is None or shape is None or query is None or len(node.outputs) > 1:
        raise NoMatchError("it has no mask of known shape, or extends a cache")
    if shape[1:] != (1, query[1], query[1]):
        raise NoMatchError(f"the mask {shape} differs between heads, or there are other keys than the queries {query}")
    condition = _is_causal(graph, bias)
    old = node.outputs[0]
    branches = {}
    for name, inputs, unidirectional in (
        ("then_branch", node.inputs[:3], 1),
        ("else_branch", node.inputs, node.attributes.get_int("unidirectional", 0)),
    ):
        output = ir.Value(name=f"{old.name}.{name}", type=old.type, shape=old.shape)
        attributes = {**node.attributes, "unidirectional": ir.AttrInt64("unidirectional", unidirectional)}
        attention = ir.Node(CONTRIB, node.op_type, inputs, attributes.values(), outputs=[output], name=output.name)
        branches[name] = ir.Graph([], [output], nodes=[attention], name=output.name)
    result = ir.Value(name=old.name, type=old.type, shape=old.shape)
    choice = ir.node("If", [condition], attributes=branches, outputs=[result], name=f"{old.name}.if")
    convenience.replace_nodes_and_values(graph, node, [node], [choice], [old], [result])


def _is_causal(graph: ir.Graph, bias: ir.Value) -> ir.Value:
    """Return whether a mask [B or 1, 1, S, S] shows each query itself, the tokens before it and no others: bool []."""
    name = f"{bias.name}.is_causal"
    for node in bias.graph or ():
        if node.outputs[0].name == name:
            return node.outputs[0]
    dtype, boolean, int64 = bias.dtype or ir.DataType.FLOAT, ir.DataType.BOOL, ir.DataType.INT64
    limit = f"visible_{dtype.name.lower()}"
    if limit not in graph.initializers:
        add_initializer(graph, limit, np.array(VISIBLE, dtype.numpy()))
    last: ir.Value = bias

    def append(op_type: str, inputs: list[ir.Value], dtype: ir.DataType, **attributes: int) -> ir.Value:
        nonlocal last
        last = add_node(graph, op_type, inputs, attributes=attributes, dtype=dtype, behind=last)
        return last

    shape = append("Shape", [bias], int64)
    length = append("Gather", [shape, integer(graph, 3)], int64)
    columns = append("Range", [integer(graph, 0), length, integer(graph, 1)], int64)  # [S]
    rows = append("Unsqueeze", [columns, integer(graph, 1)], int64)  # [S, 1]
    causal = append("LessOrEqual", [columns, rows], boolean)
    visible = append("Greater", [bias, graph.initializers[limit]], boolean)
    same = append("Equal", [visible, causal], boolean)
    last = add_cast(graph, same, dtype, f"{bias.name}.same", behind=last)
    all_same = append("ReduceMin", [last], dtype, keepdims=0)
    return add_cast(graph, all_same, boolean, name, behind=all_same)
