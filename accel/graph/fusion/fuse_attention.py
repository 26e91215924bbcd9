"""Fuse attention that is written as products, a softmax and transposed heads.

The fused node is ONNX Runtime's `MultiHeadAttention`, with kernels on CPU and CUDA:
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MultiHeadAttention
Scores and probabilities disappear inside it, so it comes after the audit and the conversion, and only where all of the
attention has one precision.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir import convenience
from onnx_ir.passes import PassResult

from accel.graph.build import CONTRIB, add_node
from accel.graph.passes import GraphPass, NoMatchError, remove_unused
from accel.graph.shapes import HEADS, KEYS, Dims, dims, integers, made_by, permutation, scalar, used_once


@dataclass
class Attention:
    """softmax(scale * query keyᵀ + bias) value, and the node whose output is the heads side by side, [B, S, H * K]."""

    query: ir.Value  # [B, H, S, K]
    key: ir.Value  # [B, H, T, K]
    value: ir.Value  # [B, H, T, K]
    bias: ir.Value | None  # [B or 1, H or 1, S or 1, T]
    scale: float
    last: ir.Node


@dataclass
class Scores:
    """scale * product + bias."""

    product: ir.Node
    bias: ir.Value | None
    scale: float


class FuseAttention(GraphPass):
    """Replace each attention by one `MultiHeadAttention` node.

    A dynamic cache is concatenated inside the node: the new caches become its other outputs.
    """

    name = "fuse_attention"
    description = "Fuse attention into one node a layer"

    def call(self, model: ir.Model) -> PassResult:
        """Fuse those of the main graph."""
        softmaxes = [node for node in model.graph if node.op_type == "Softmax" and node.domain == ""]
        modified = self.rewrite_each(softmaxes, lambda node: _rewrite(model.graph, node))
        return remove_unused(model, modified)


def _rewrite(graph: ir.Graph, softmax: ir.Node) -> None:
    """Replace the attention around a softmax; raise `NoMatchError`, with nothing changed, if there is none."""
    attention = _match(softmax)
    _check_one_precision(attention)
    _fuse(graph, attention)
    graph.opset_imports.setdefault(CONTRIB, 1)


def _match(softmax: ir.Node) -> Attention:
    """Match the attention around a softmax; raise `NoMatchError` if there is none that the kernel computes."""
    shape = dims(softmax.outputs[0])
    if shape is None or len(shape) != 4 or softmax.attributes.get_int("axis", -1) not in (-1, 3):
        raise NoMatchError(f"the softmax has shape {shape}, expected 4 axes and axis=-1")
    weighted = _only_reader(softmax.outputs[0], "MatMul")
    transpose = _only_reader(weighted.outputs[0], "Transpose")
    last = _only_reader(transpose.outputs[0], "Reshape")
    joined = dims(last.outputs[0])
    if weighted.inputs[0] is not softmax.outputs[0]:
        raise NoMatchError("the probabilities are the second factor")
    if permutation(transpose) != HEADS or joined is None or len(joined) != 3 or not isinstance(joined[2], int):
        raise NoMatchError(f"heads are joined by axes {permutation(transpose)} into shape {joined}")
    value = weighted.inputs[1]
    for scores in _scores(softmax.inputs[0], shape):
        transposed_key = made_by(scores.product.inputs[1], "Transpose")
        if transposed_key is None or permutation(transposed_key) != KEYS:
            continue
        query, key = scores.product.inputs[0], transposed_key.inputs[0]
        if query is not None and key is not None and value is not None and _heads_agree(query, key, value):
            return Attention(query, key, value, scores.bias, scores.scale, last)
    raise NoMatchError("its input is not a scaled product of queries and keys of equal heads, plus a bias")


def _scores(value: ir.Value | None, shape: Dims) -> Iterator[Scores]:
    """Yield the readings of `value` as scores of `shape`: with either addend as the bias, or without one."""
    add = made_by(value, "Add")
    readings = [(value, None)] if add is None else [tuple(add.inputs), tuple(reversed(add.inputs))]
    for scores, bias in readings:
        if bias is not None and not _is_bias(dims(bias), shape):
            continue
        scale = 1.0
        scaled = made_by(scores, "Mul", "Div")
        factor = scalar(scaled.inputs[1]) if scaled is not None else None
        if scaled is not None and factor:
            scores = scaled.inputs[0]
            scale = factor if scaled.op_type == "Mul" else 1 / factor
        product = made_by(scores, "MatMul")
        if product is not None and used_once(product.outputs[0]) and dims(scores) == shape:
            yield Scores(product, bias, scale)


def _is_bias(bias: Dims | None, shape: Dims) -> bool:
    """Return whether a bias has one number for each key, be it the same for several sequences, heads or queries."""
    if bias is None or len(bias) != 4 or bias[3] != shape[3]:
        return False
    return all(length in (1, scores) for length, scores in zip(bias[:3], shape[:3], strict=True))


def _heads_agree(query: ir.Value, key: ir.Value, value: ir.Value) -> bool:
    """Return whether all three, [B, H, S or T, K], have as many heads of one width."""
    shapes = [dims(each) for each in (query, key, value)]
    if any(shape is None or len(shape) != 4 for shape in shapes):
        return False
    return len({(shape[1], shape[3]) for shape in shapes if shape is not None}) == 1


def _check_one_precision(attention: Attention) -> None:
    """Raise `NoMatchError` if parts of the attention differ in their type."""
    values = [attention.query, attention.key, attention.value, attention.bias]
    values += [attention.last.inputs[0], attention.last.outputs[0]]
    dtypes = {value.dtype for value in values if value is not None}
    if len(dtypes) != 1:
        raise NoMatchError(f"its values have several types: {', '.join(sorted(map(str, dtypes)))}")


def _fuse(graph: ir.Graph, attention: Attention) -> None:
    """Replace the attention; raise `NoMatchError`, with nothing changed, unless its queries are cut from one value."""
    query, shape = _joined_heads(graph, attention.query), dims(attention.query)
    if query is None or shape is None:
        raise NoMatchError("the queries are not heads of one projection")
    bias = _expanded_over_queries(graph, attention.last, attention.bias, query)
    old_values = [attention.last.outputs[0]]
    caches = _dynamic_caches(graph, attention)
    if caches is None:
        inputs: list[ir.Value | None] = [query, attention.key, attention.value, None, None, bias]
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
        attributes={"num_heads": int(shape[1]), "scale": attention.scale},
        domain=CONTRIB,
        outputs=outputs,
        name=f"{old_values[0].name}.attention",
    )
    graph.insert_before(attention.last, node)
    convenience.replace_all_uses_with(old_values, outputs, replace_graph_outputs=True)


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
        rows = _joined_heads(graph, appended) if appended is not None else None
        if before is None or rows is None:
            return None
        new.append(rows)
        past.append(before)
    return [*new, *past]


def _joined_heads(graph: ir.Graph, value: ir.Value) -> ir.Value | None:
    """Return the [B, S, H * K] that `value` [B, H, S, K] was cut from; None if from none."""
    split = made_by(value, "Split")
    if split is None or split.attributes.get_int("axis", 0) != 1:
        return _before_cut(value)
    whole = _before_cut(split.inputs[0])
    return _part(graph, split, whole, value) if whole is not None else None


def _before_cut(value: ir.Value | None) -> ir.Value | None:
    """Return the [B, S, H * K] of which a `Reshape` and a `Transpose` make `value` [B, H, S, K]."""
    transpose = made_by(value, "Transpose")
    if transpose is None or permutation(transpose) != HEADS:
        return None
    reshape = made_by(transpose.inputs[0], "Reshape")
    if reshape is None:
        return None
    source, cut = dims(reshape.inputs[0]), dims(reshape.outputs[0])  # [B, S, H * K], [B, S, H, K]
    if source is None or cut is None or len(source) != 3 or source[:2] != cut[:2]:
        return None
    return reshape.inputs[0]


def _part(graph: ir.Graph, split: ir.Node, whole: ir.Value, value: ir.Value) -> ir.Value:
    """Return the part of `whole` that `value` is cut from, by a `Split` of the last axis that all parts share."""
    position = split.outputs.index(value)
    known = next((node for node in whole.consumers() if node.op_type == "Split"), None)
    if known is not None:
        return known.outputs[position]
    lead = whole.shape[:2] if whole.shape is not None else (None, None)
    widths, parts = [], []
    for output in split.outputs:
        shape = dims(output) or (0, 0, 0, 0)
        widths.append(int(shape[1]) * int(shape[3]))
        parts.append(ir.Value(name=f"{output.name}.flat", type=whole.type, shape=ir.Shape([*lead, widths[-1]])))
    node = ir.node(
        "Split",
        [whole, integers(graph, "split", widths)],
        attributes={"axis": -1},
        outputs=parts,
        name=f"{whole.name}.parts",
    )
    graph.insert_before(split, node)
    return parts[position]


def _only_reader(value: ir.Value, op_type: str) -> ir.Node:
    """Return the one node that reads `value`; raise `NoMatchError` unless it is an `op_type`."""
    readers = [f"{node.op_type}" for node in value.consumers()]
    node = next(iter(value.consumers())) if used_once(value) else None
    if node is None or node.op_type != op_type or node.domain != "":
        raise NoMatchError(f"{value.name} is read by {', '.join(readers) or 'no node'}, expected one {op_type}")
    return node
