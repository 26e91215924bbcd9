"""Fuse causal self-attention over dynamic caches into one node, which can extend the caches in place.

The fused node is ONNX Runtime's `GroupQueryAttention`, whose CPU kernel reads keys and values once for all query heads
that share them:
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GroupQueryAttention
"""

from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from onnx_ir import convenience
from onnx_ir.passes import PassResult

from accel.graph.build import CONTRIB, add_cast, add_initializer, add_node
from accel.graph.fusion.attention import Attention, check_one_precision, joined_heads, match, split_rows, unrepeated
from accel.graph.passes import GraphPass, NoMatchError, remove_unused
from accel.graph.shapes import HEADS, dims, integers, made_by

ONE = "one_int32"  # initializer
WIDTH_MULTIPLE = 8  # of a head's width, which the kernel checks


class Cache(NamedTuple):
    """Keys or values of one layer: the past ones, those of the new tokens, and both together."""

    past: ir.Value  # [B, G, P, K]
    new: ir.Value  # [B, G, S, K]
    whole: ir.Value  # [B, G, P + S, K]


class FuseCausalAttention(GraphPass):
    """Replace each self-attention over a dynamic cache by one `GroupQueryAttention` node, which extends the cache.

    The operator hides later tokens from each query by itself. The mask stays its bias, because it also hides padding
    and tokens outside a sliding window. An attention whose mask is the same for all queries may look ahead: it is kept.
    For several new tokens behind cached ones, the operator takes one sequence at a time.
    """

    name = "fuse_causal_attention"
    description = "Fuse causal attention into one node a layer"

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
    query, bias = dims(attention.query), dims(attention.bias)
    if query is None or bias is None or attention.bias is None:
        raise NoMatchError("it has no mask, so it may look ahead")
    if query[2] == 1 or bias[2] != query[2]:
        raise NoMatchError(f"the mask {bias} is the same for all queries {query}, so it may look ahead")
    if not isinstance(query[3], int) or query[3] % WIDTH_MULTIPLE:
        raise NoMatchError(f"the kernel takes no heads of width {query[3]}: it must be a multiple of {WIDTH_MULTIPLE}")
    keys, values = _cache(attention.key, "keys"), _cache(attention.value, "values")
    groups = (dims(keys.new) or (0, 0))[1]
    before = attention.last
    rows = [_rows(graph, value, before) for value in (attention.query, keys.new, values.new)]
    lengths = _lengths(graph, attention, rows[0])
    results = [attention.last.outputs[0], keys.whole, values.whole]
    outputs = [ir.Value(name=old.name, type=old.type, shape=old.shape) for old in results]
    node = ir.node(
        "GroupQueryAttention",
        [*rows, keys.past, values.past, *lengths, None, None, None, attention.bias],
        attributes={"num_heads": int(query[1]), "kv_num_heads": int(groups), "scale": attention.scale},
        domain=CONTRIB,
        outputs=outputs,
        name=f"{results[0].name}.attention",
    )
    graph.insert_before(before, node)
    convenience.replace_all_uses_with(results, outputs, replace_graph_outputs=True)
    graph.opset_imports.setdefault(CONTRIB, 1)


def _cache(value: ir.Value, what: str) -> Cache:
    """Return the cache that `value` [B, H, T, K] is, or repeats for the query heads; else raise `NoMatchError`."""
    whole = unrepeated(value, what) if made_by(value, "Reshape") is not None else value
    concat = made_by(whole, "Concat")
    if concat is None or len(concat.inputs) != 2 or concat.attributes.get_int("axis", 0) not in (-2, 2):
        raise NoMatchError(f"the {what} don't extend past ones")
    past, new = concat.inputs
    shapes = [dims(past), dims(new)]
    if past is None or new is None or any(shape is None or len(shape) != 4 for shape in shapes):
        raise NoMatchError(f"the {what} have shapes {shapes}, expected 4 axes")
    return Cache(past, new, whole)


def _rows(graph: ir.Graph, value: ir.Value, before: ir.Node) -> ir.Value:
    """Return `value` [B, H, S, K] as [B, S, H * K]: what it was cut from, if it was cut without further change."""
    joined, shape = joined_heads(value), dims(value)
    if joined is not None or shape is None:
        return joined or value
    batch, heads, length, width = shape
    turned = ir.Shape([batch, length, heads, width])
    transposed = add_node(
        graph, "Transpose", [value], attributes={"perm": HEADS}, dtype=value.dtype, shape=turned, before=before
    )
    size = int(heads) * int(width)
    target, flat = integers(graph, "shape", [0, 0, size]), ir.Shape([batch, length, size])
    return add_node(graph, "Reshape", [transposed, target], dtype=value.dtype, shape=flat, before=before)


def _lengths(graph: ir.Graph, attention: Attention, rows: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Return the index of each sequence's last token, int32 [B], and the number of tokens, int32 [1].

    Both are computed once for all attentions with the same mask: padding is hidden by the mask, so all sequences are as
    long as the cache.
    """
    names = [f"{attention.bias.name}.{what}" for what in ("last_token", "tokens")] if attention.bias else []
    known = {output.name: output for node in graph for output in node.outputs if output.name in names}
    if len(known) == len(names):
        last, total = (known[name] for name in names)
        return last, total
    before = attention.last
    int64, int32 = ir.DataType.INT64, ir.DataType.INT32
    if ONE not in graph.initializers:
        add_initializer(graph, ONE, np.array([1], np.int32))
    length = add_node(graph, "Shape", [attention.bias], attributes={"start": 3, "end": 4}, dtype=int64, before=before)
    total = add_cast(graph, length, int32, names[1], before=before)
    total.shape = ir.Shape([1])
    last = add_node(graph, "Sub", [total, graph.initializers[ONE]], dtype=int32, shape=ir.Shape([1]), before=before)
    batch = add_node(graph, "Shape", [rows], attributes={"start": 0, "end": 1}, dtype=int64, before=before)
    size = ir.Shape([rows.shape[0]]) if rows.shape is not None else None
    return add_node(graph, "Expand", [last, batch], names[0], dtype=int32, shape=size, before=before), total
