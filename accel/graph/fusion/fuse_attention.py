"""Fuse attention that is written as products, a softmax and transposed heads.

The fused node is ONNX Runtime's `MultiHeadAttention`, with kernels on CPU and CUDA:
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MultiHeadAttention
Scores and probabilities disappear inside it, so it comes after the audit and the conversion, and only where all of the
attention has one precision.
"""

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir import convenience
from onnx_ir.passes import PassResult

from accel.graph.build import CONTRIB, add_node
from accel.graph.fusion.attention import Attention, check_one_precision, joined_heads, match, split_rows
from accel.graph.passes import GraphPass, NoMatchError, remove_unused
from accel.graph.shapes import dims, integers, made_by, scalar


class FuseAttention(GraphPass):
    """Replace each attention by one `MultiHeadAttention` node.

    A dynamic cache is concatenated inside the node: the new caches become its other outputs.
    """

    name = "fuse_attention"
    description = "Fuse attention into one node a layer"

    def call(self, model: ir.Model) -> PassResult:
        """Fuse those of the main graph."""
        modified = split_rows(model.graph)
        softmaxes = [node for node in model.graph if node.op_type == "Softmax" and node.domain == ""]
        modified |= self.rewrite_each(softmaxes, lambda node: _rewrite(model.graph, node))
        return remove_unused(model, modified)


def _rewrite(graph: ir.Graph, softmax: ir.Node) -> None:
    """Replace the attention around a softmax; raise `NoMatchError`, with nothing changed, if there is none."""
    attention = match(softmax)
    check_one_precision(attention)
    _fuse(graph, attention)
    graph.opset_imports.setdefault(CONTRIB, 1)


def _fuse(graph: ir.Graph, attention: Attention) -> None:
    """Replace the attention; raise `NoMatchError`, with nothing changed, unless its queries are cut from one value."""
    query, shape = joined_heads(attention.query), dims(attention.query)
    if query is None or shape is None:
        raise NoMatchError("the queries are not heads of one projection")
    bias = _expanded_over_queries(graph, attention.last, attention.bias, query)
    query, scale = _unscaled(query, attention.scale)
    old_values = [attention.last.outputs[0]]
    caches = _dynamic_caches(graph, attention)
    if caches is None:
        inputs: list[ir.Value | None] = [query, *_rows_or_heads(attention), None, None, bias]
    else:
        new_key, new_value, past_key, past_value = caches
        inputs = [query, new_key, new_value, None, None, bias, past_key, past_value]
        old_values += [attention.key, attention.value]
    while inputs[-1] is None:
        inputs.pop()
    outputs = [ir.Value(name=old.name, type=old.type, shape=old.shape) for old in old_values]
    node = ir.node(
        "MultiHeadAttention",
        inputs,
        attributes={"num_heads": int(shape[1]), "scale": scale},
        domain=CONTRIB,
        outputs=outputs,
        name=f"{old_values[0].name}.attention",
    )
    graph.insert_before(attention.last, node)
    convenience.replace_all_uses_with(old_values, outputs, replace_graph_outputs=True)


def _unscaled(rows: ir.Value, scale: float) -> tuple[ir.Value, float]:
    """Return what queries [B, S, H * K] are a constant multiple of, and the factor of their scores."""
    scaled = made_by(rows, "Mul")
    factor = scalar(scaled.inputs[1]) if scaled is not None else None
    if scaled is None or not factor or scaled.inputs[0] is None or dims(scaled.inputs[0]) != dims(rows):
        return rows, scale
    return scaled.inputs[0], scale * factor


def _rows_or_heads(attention: Attention) -> tuple[ir.Value, ir.Value]:
    """Return keys and values, as rows [B, T, H * K] if both were cut from some, which saves two transposes."""
    key, value = joined_heads(attention.key), joined_heads(attention.value)
    return (attention.key, attention.value) if key is None or value is None else (key, value)


def _expanded_over_queries(graph: ir.Graph, before: ir.Node, bias: ir.Value | None, query: ir.Value) -> ir.Value | None:
    """Return the bias as [B or 1, H or 1, S, T], which the operator needs; expanded once for all layers."""
    shape, queries = dims(bias), (dims(query) or (0, 0))[1]
    if bias is None or shape is None or shape[2] == queries:
        return bias
    expanded = next((node for node in bias.consumers() if node.op_type == "Expand"), None)
    if expanded is not None:
        return expanded.outputs[0]
    int64, one = ir.DataType.INT64, integers(graph, "lengths", [1])
    length = add_node(graph, "Shape", [query], attributes={"start": 1, "end": 2}, dtype=int64, before=before)
    target = add_node(graph, "Concat", [one, one, length, one], attributes={"axis": 0}, dtype=int64, before=before)
    wide = ir.Shape([*shape[:2], queries, shape[3]])
    return add_node(
        graph, "Expand", [bias, target], f"{bias.name}.queries", dtype=bias.dtype, shape=wide, before=before
    )


def _dynamic_caches(graph: ir.Graph, attention: Attention) -> Sequence[ir.Value] | None:
    """Return new keys and values [B, S, H * K] and past ones [B, H, P, K], if both caches are concatenated of them."""
    new, past = [], []
    for cache in (attention.key, attention.value):
        concat = made_by(cache, "Concat")
        if concat is None or len(concat.inputs) != 2 or concat.attributes.get_int("axis", 0) not in (-2, 2):
            return None
        before, appended = concat.inputs
        rows = joined_heads(appended) if appended is not None else None
        if before is None or rows is None:
            return None
        new.append(rows)
        past.append(before)
    return [*new, *past]
