"""Queries that share keys and values look at them together, instead of at a copy each.

Grouped-query attention (https://arxiv.org/abs/2305.13245), as exported, repeats every key and value for all queries of
its group: in a step, the whole cache. For one token the queries of a group are rows of one product with the cache as it
lies.
"""

from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from accel.graph.shapes import dims, integers, made_by, order, scalar, used_once

KEYS = (0, 1, 3, 2)  # [B, H, T, K] -> [B, H, K, T]


@dataclass
class Grouped:
    """Products with repeated keys and values, and the nodes between them, whose values have the heads' axis."""

    scores: ir.Node  # query [B, H, 1, D] times keys
    keys: ir.Value  # [B, G, T, D], repeated for `scores`
    between: list[ir.Node]
    mixed: ir.Node  # shares [B, H, 1, T] times values
    values: ir.Value  # [B, G, T, D]


def fuse_gqa(decode: ir.Model) -> None:
    """In place, in a graph of one token."""
    for node in list(decode.graph):
        found = _grouped(node) if node.op_type == "Softmax" and node.domain == "" else None
        if found is not None:
            _rewrite(decode.graph, found)
    RemoveUnusedNodesPass()(decode)


def _grouped(softmax: ir.Node) -> Grouped | None:
    if softmax.attributes.get_int("axis", -1) not in (-1, 3):
        return None
    between: list[ir.Node] = [softmax]
    value = softmax.outputs[0]
    while used_once(value) and (cast := next(iter(value.consumers()))).op_type == "Cast":
        between.append(cast)
        value = cast.outputs[0]
    mixed = next(iter(value.consumers()), None) if used_once(value) else None
    if mixed is None or mixed.op_type != "MatMul" or mixed.inputs[0] is not value:
        return None
    if mixed.outputs[0].is_graph_output():
        return None
    scores = _scores(softmax.inputs[0], between)
    turned = made_by(scores.inputs[1], "Transpose") if scores is not None else None
    if scores is None or turned is None or order(turned) != KEYS:
        return None
    keys, values = _unrepeated(turned.inputs[0]), _unrepeated(mixed.inputs[1])
    query = dims(scores.inputs[0])
    if keys is None or values is None or query is None or len(query) != 4 or query[2] != 1:
        return None
    return Grouped(scores, keys, between, mixed, values)


def _scores(value: ir.Value | None, between: list[ir.Node]) -> ir.Node | None:
    """The product that `value` comes from by casts, one factor for all, and a bias that all heads share."""
    while value is not None and used_once(value) and (node := made_by(value, "Add", "Mul", "Div", "Cast", "MatMul")):
        if node.op_type == "MatMul":
            return node
        between.append(node)
        if node.op_type == "Cast" or (node.op_type in ("Mul", "Div") and scalar(node.inputs[1]) is not None):
            value = node.inputs[0]
        elif node.op_type == "Add":
            shared = [_for_all_heads(one) for one in node.inputs]
            if shared.count(True) != 1:
                return None
            value = node.inputs[shared.index(False)]
        else:
            return None
    return None


def _for_all_heads(value: ir.Value | None) -> bool:
    known = dims(value)
    return known is not None and (len(known) < 3 or all(dim == 1 for dim in known[-3:-1]))


def _unrepeated(value: ir.Value | None) -> ir.Value | None:
    """[B, H, T, D] -> the [B, G, T, D] it repeats, H / G times each."""
    wide = made_by(value, "Reshape")
    repeated = made_by(wide.inputs[0], "Expand") if wide is not None else None
    apart = made_by(repeated.inputs[0], "Unsqueeze") if repeated is not None else None
    source = apart.inputs[0] if apart is not None else None
    given, made = dims(source), dims(value)
    if apart is None or given is None or made is None or len(given) != 4 or len(made) != 4:
        return None
    heads, groups = made[1], given[1]
    if not isinstance(heads, int) or not isinstance(groups, int) or heads % groups or scalar(apart.inputs[1]) != 2:
        return None
    return source if (given[0], *given[2:]) == (made[0], *made[2:]) else None


def _rewrite(graph: ir.Graph, found: Grouped) -> None:
    query = found.scores.inputs[0]
    before, after = dims(query), dims(found.mixed.outputs[0])
    held = dims(found.keys)
    if query is None or before is None or after is None or held is None:
        return
    groups = int(held[1])
    rows = int(before[1]) // groups
    width = int(before[3])
    grouped = integers(graph, "shape", [0, groups, rows, width])
    rows_of_groups = ir.node("Reshape", [query, grouped])
    turned = ir.node("Transpose", [found.keys], attributes={"perm": KEYS})
    rows_of_groups.outputs[0].shape = ir.Shape([before[0], groups, rows, width])
    turned.outputs[0].shape = ir.Shape([held[0], groups, width, held[2]])
    for index, (node, like) in enumerate(((rows_of_groups, query), (turned, found.keys))):
        node.outputs[0].type = like.type
        graph.insert_before(found.scores, node)
        found.scores.replace_input_with(index, node.outputs[0])
    for one in (found.scores, *found.between):
        known = dims(one.outputs[0])
        if known is not None:
            one.outputs[0].shape = ir.Shape([known[0], groups, rows, known[3]])
    found.mixed.replace_input_with(1, found.values)
    old = found.mixed.outputs[0]
    old.shape = ir.Shape([after[0], groups, rows, after[3]])
    uses = list(old.uses())
    target = integers(graph, "shape", [0, int(after[1]), 1, int(after[3])])
    made = ir.node("Reshape", [old, target])
    made.outputs[0].type, made.outputs[0].shape = old.type, ir.Shape(after)
    graph.insert_after(found.mixed, made)
    for user, index in uses:
        user.replace_input_with(index, made.outputs[0])
