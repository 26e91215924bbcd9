"""Attention written as products, a softmax and what turns heads around becomes one node.

The node is ONNX Runtime's `MultiHeadAttention`, with kernels on CPU and CUDA:
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MultiHeadAttention
Scores and probabilities disappear inside it, so it comes after the audit and the conversion, and only where all of the
attention has one precision.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir import convenience
from onnx_ir.passes.common import RemoveUnusedNodesPass

from accel.graph.shapes import HEADS, dims, integers, made_by, order, scalar, used_once

DOMAIN = "com.microsoft"
KEYS = (0, 1, 3, 2)  # [B, H, T, K] -> [B, H, K, T]


@dataclass
class Attention:
    """softmax(scale * query keyᵀ + bias) value, and the node whose output is the heads side by side, [B, S, H * K]."""

    query: ir.Value  # [B, H, S, K]
    key: ir.Value  # [B, H, T, K]
    value: ir.Value  # [B, H, T, K]
    bias: ir.Value | None  # [B or 1, H or 1, S or 1, T]
    scale: float
    last: ir.Node


def fuse_attention(models: Sequence[ir.Model]) -> None:
    """In place. Caches that grow do so inside the node, whose other outputs they become."""
    for model in models:
        graph = model.graph
        for node in list(graph):
            found = _attention(node) if node.op_type == "Softmax" and node.domain == "" else None
            if found is not None and _one_precision(found):
                _fuse(graph, found)
                graph.opset_imports.setdefault(DOMAIN, 1)
        RemoveUnusedNodesPass()(model)


def _attention(softmax: ir.Node) -> Attention | None:
    shape = dims(softmax.outputs[0])
    if shape is None or len(shape) != 4 or softmax.attributes.get_int("axis", -1) not in (-1, 3):
        return None
    weighted = _only_user(softmax.outputs[0], "MatMul")
    turned = _only_user(weighted.outputs[0], "Transpose") if weighted is not None else None
    last = _only_user(turned.outputs[0], "Reshape") if turned is not None else None
    if weighted is None or turned is None or last is None or weighted.inputs[0] is not softmax.outputs[0]:
        return None
    joined = dims(last.outputs[0])
    if order(turned) != HEADS or joined is None or len(joined) != 3 or not isinstance(joined[2], int):
        return None
    value = weighted.inputs[1]
    for product, bias, scale in _scores(softmax.inputs[0], shape):
        key = made_by(product.inputs[1], "Transpose")
        if key is not None and order(key) == KEYS:
            query, origin = product.inputs[0], key.inputs[0]
            if query is not None and origin is not None and value is not None and _agree(query, origin, value):
                return Attention(query, origin, value, bias, scale, last)
    return None


def _scores(value: ir.Value | None, shape: Sequence[int | str]) -> Iterator[tuple[ir.Node, ir.Value | None, float]]:
    """The product of queries and keys, what is added to it, and what it is scaled by."""
    add = made_by(value, "Add")
    for scores, bias in [(value, None)] if add is None else [tuple(add.inputs), tuple(reversed(add.inputs))]:
        if bias is not None and not _fits(dims(bias), shape):
            continue
        factor = 1.0
        scaled = made_by(scores, "Mul", "Div")
        if scaled is not None and (number := scalar(scaled.inputs[1])):
            scores, factor = scaled.inputs[0], number if scaled.op_type == "Mul" else 1 / number
        product = made_by(scores, "MatMul")
        if product is not None and used_once(product.outputs[0]) and dims(scores) == tuple(shape):
            yield product, bias, factor


def _fits(bias: Sequence[int | str] | None, shape: Sequence[int | str]) -> bool:
    """Whether it is one number for each key, be it the same for several sequences, heads or queries."""
    if bias is None or len(bias) != 4 or bias[3] != shape[3]:
        return False
    return all(own in (1, other) for own, other in zip(bias[:3], shape[:3], strict=True))


def _agree(query: ir.Value, key: ir.Value, value: ir.Value) -> bool:
    """As many heads of one width in all three."""
    shapes = [dims(one) for one in (query, key, value)]
    return all(shape is not None and len(shape) == 4 for shape in shapes) and (
        len({(shape[1], shape[3]) for shape in shapes if shape is not None}) == 1
    )


def _one_precision(found: Attention) -> bool:
    softmax = found.last.inputs[0]
    inside = [found.query, found.key, found.value, found.last.outputs[0], softmax, found.bias]
    return len({value.dtype for value in inside if value is not None}) == 1


def _fuse(graph: ir.Graph, found: Attention) -> None:
    query = _side_by_side(graph, found.query)
    shape = dims(found.query)
    if query is None or shape is None:
        return
    bias = _for_every_query(graph, found.last, found.bias, query)
    inputs: list[ir.Value | None] = [query, found.key, found.value, None, None, bias]
    old = found.last.outputs[0]
    outputs = [ir.Value(name=old.name, type=old.type, shape=old.shape)]
    replaced = [old]
    grown = _grown(graph, found)
    if grown is not None:
        inputs = [query, *grown[:2], None, None, bias, *grown[2:]]
        replaced += [found.key, found.value]
        outputs += [ir.Value(name=one.name, type=one.type, shape=one.shape) for one in replaced[1:]]
    while inputs[-1] is None:
        inputs.pop()
    attributes = {"num_heads": int(shape[1]), "scale": found.scale}
    name = f"{old.name}.attention"
    node = ir.node("MultiHeadAttention", inputs, attributes=attributes, domain=DOMAIN, outputs=outputs, name=name)
    graph.insert_before(found.last, node)
    convenience.replace_all_uses_with(replaced, outputs, replace_graph_outputs=True)


def _for_every_query(graph: ir.Graph, before: ir.Node, bias: ir.Value | None, query: ir.Value) -> ir.Value | None:
    """`bias`, [B or 1, H or 1, S, T]: the operator doesn't broadcast it over queries. Made once for all layers."""
    known, length = dims(bias), (dims(query) or (0, 0))[1]
    if bias is None or known is None or known[2] == length:
        return bias
    made = next((user for user in bias.consumers() if user.op_type == "Expand"), None)
    if made is not None:
        return made.outputs[0]
    one = integers(graph, "lengths", [1])
    queries = ir.node("Shape", [query], attributes={"start": 1, "end": 2})
    target = ir.node("Concat", [one, one, queries.outputs[0], one], attributes={"axis": 0})
    wide = ir.node("Expand", [bias, target.outputs[0]], name=f"{bias.name}.queries")
    wide.outputs[0].name, wide.outputs[0].type = f"{bias.name}.queries", bias.type
    wide.outputs[0].shape = ir.Shape([*known[:2], length, known[3]])
    queries.outputs[0].type = target.outputs[0].type = ir.TensorType(ir.DataType.INT64)
    for node in (queries, target, wide):
        graph.insert_before(before, node)
    return wide.outputs[0]


def _grown(graph: ir.Graph, found: Attention) -> list[ir.Value] | None:
    """New keys and values, [B, S, H * K], then past ones, [B, H, P, K], if both caches grow by them."""
    fresh, past = [], []
    for cache in (found.key, found.value):
        join = made_by(cache, "Concat")
        if join is None or len(join.inputs) != 2 or join.attributes.get_int("axis", 0) not in (-2, 2):
            return None
        before, new = join.inputs
        rows = _side_by_side(graph, new) if new is not None else None
        if before is None or rows is None:
            return None
        fresh.append(rows)
        past.append(before)
    return [*fresh, *past]


def _side_by_side(graph: ir.Graph, value: ir.Value) -> ir.Value | None:
    """[B, H, S, K] -> the [B, S, H * K] it was cut from."""
    split = made_by(value, "Split")
    if split is not None and split.attributes.get_int("axis", 0) == 1:
        whole = _uncut(split.inputs[0])
        return _part(graph, split, whole, value) if whole is not None else None
    return _uncut(value)


def _uncut(value: ir.Value | None) -> ir.Value | None:
    turned = made_by(value, "Transpose")
    cut = made_by(turned.inputs[0], "Reshape") if turned is not None and order(turned) == HEADS else None
    source, shape = (cut.inputs[0], dims(cut.outputs[0])) if cut is not None else (None, None)
    before = dims(source)
    if shape is None or before is None or len(before) != 3 or before[:2] != shape[:2]:
        return None
    return source


def _part(graph: ir.Graph, split: ir.Node, whole: ir.Value, value: ir.Value) -> ir.Value:
    """The part of `whole` that `value` is cut from, by a `Split` of the last axis that all parts share."""
    position = split.outputs.index(value)
    known = next((user for user in whole.consumers() if user.op_type == "Split"), None)
    if known is not None:
        return known.outputs[position]
    widths, parts = [], []
    for output in split.outputs:
        shape = dims(output) or (0, 0, 0, 0)
        widths.append(int(shape[1]) * int(shape[3]))
        lead = whole.shape[:2] if whole.shape is not None else (None, None)
        name = f"{output.name}.flat"
        parts.append(ir.Value(name=name, type=whole.type, shape=ir.Shape([*lead, widths[-1]])))
    node = ir.node(
        "Split",
        [whole, integers(graph, "split", widths)],
        attributes={"axis": -1},
        outputs=parts,
        name=f"{whole.name}.parts",
    )
    graph.insert_before(split, node)
    return parts[position]


def _only_user(value: ir.Value, op: str) -> ir.Node | None:
    user = next(iter(value.consumers())) if used_once(value) else None
    return user if user is not None and user.op_type == op and user.domain == "" else None
