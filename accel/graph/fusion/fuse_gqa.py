"""Rewrite grouped-query attention to avoid repeating keys and values for every query head.

Grouped-query attention (https://arxiv.org/abs/2305.13245), as exported, repeats every key and value for all query heads
of its group: in a decode step, the whole cache. For one token, the queries of a group can be the rows of one product
with the group's keys.
"""

from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes import PassResult

from accel.graph.build import add_node
from accel.graph.fusion.attention import unrepeated
from accel.graph.passes import GraphPass, NoMatchError, remove_unused
from accel.graph.shapes import KEYS, Dims, dims, integers, made_by, permutation, scalar, used_once


@dataclass
class GroupedAttention:
    """Products with repeated keys and values, and the nodes between them, whose values have an axis of heads."""

    scores: ir.Node  # query [B, H, 1, D] times keys
    keys: ir.Value  # [B, G, T, D], repeated for `scores`
    between: list[ir.Node]
    mixed: ir.Node  # probabilities [B, H, 1, T] times values
    values: ir.Value  # [B, G, T, D]


class FuseGqa(GraphPass):
    """Multiply the queries of a group [B, G, H / G, D] with its keys and values, in a graph of one token."""

    name = "fuse_gqa"
    description = "Share keys and values between the queries of a group"

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite every attention of the main graph that repeats keys and values."""
        softmaxes = [node for node in model.graph if node.op_type == "Softmax" and node.domain == ""]
        modified = self.rewrite_each(softmaxes, lambda node: _rewrite(model.graph, _match(node)))
        return remove_unused(model, modified)


def _match(softmax: ir.Node) -> GroupedAttention:
    """Match grouped-query attention around a softmax; raise `NoMatchError` if it is none."""
    if softmax.attributes.get_int("axis", -1) not in (-1, 3):
        raise NoMatchError(f"the softmax is over axis {softmax.attributes.get_int('axis', -1)}")
    between = [softmax]
    mixed = _product_behind(softmax, between)
    scores = _product_before(softmax.inputs[0], between)
    transpose = made_by(scores.inputs[1], "Transpose")
    if transpose is None or permutation(transpose) != KEYS:
        raise NoMatchError("the keys are not transposed for the product")
    keys, values = unrepeated(transpose.inputs[0], "keys"), unrepeated(mixed.inputs[1], "values")
    query = dims(scores.inputs[0])
    if query is None or len(query) != 4 or query[2] != 1:
        raise NoMatchError(f"the queries have shape {query}, expected [batch, heads, 1, width]")
    return GroupedAttention(scores, keys, between, mixed, values)


def _product_behind(softmax: ir.Node, between: list[ir.Node]) -> ir.Node:
    """Return the product of probabilities and values, and append the casts before it to `between`."""
    probabilities = softmax.outputs[0]
    node = next(iter(probabilities.consumers()), None)
    while node is not None and node.op_type == "Cast" and used_once(probabilities):
        between.append(node)
        probabilities = node.outputs[0]
        node = next(iter(probabilities.consumers()), None)
    if node is None or node.op_type != "MatMul" or node.inputs[0] is not probabilities or not used_once(probabilities):
        raise NoMatchError("the probabilities are not read by one product alone")
    if node.outputs[0].is_graph_output():
        raise NoMatchError("the attention's result is an output of the graph")
    return node


def _product_before(value: ir.Value | None, between: list[ir.Node]) -> ir.Node:
    """Return the product of queries and keys, and append what is between it and `value` to `between`.

    Casts, constant factors and a bias that is the same for all heads may be between them.
    """
    while value is not None and used_once(value):
        node = made_by(value, "Add", "Mul", "Div", "Cast", "MatMul")
        if node is None:
            break
        if node.op_type == "MatMul":
            return node
        between.append(node)
        if node.op_type == "Add":
            same = [_same_for_all_heads(addend) for addend in node.inputs]
            if same.count(True) != 1:
                raise NoMatchError("the bias of the scores differs between heads")
            value = node.inputs[same.index(False)]
        elif node.op_type == "Cast" or scalar(node.inputs[1]) is not None:
            value = node.inputs[0]
        else:
            raise NoMatchError("the scores are scaled by something else than a constant")
    raise NoMatchError("the scores are not the product of queries and keys")


def _same_for_all_heads(value: ir.Value | None) -> bool:
    """Return whether a value [..., H, S, T] broadcasts over heads and queries."""
    shape = dims(value)
    return shape is not None and (len(shape) < 3 or all(dim == 1 for dim in shape[-3:-1]))


def _rewrite(graph: ir.Graph, attention: GroupedAttention) -> None:
    """Let the product read the group's keys and values; queries become rows [B, G, H / G, D]."""
    query = attention.scores.inputs[0]
    query_shape, keys_shape = dims(query), dims(attention.keys)
    result_shape = dims(attention.mixed.outputs[0])
    if query is None or query_shape is None or keys_shape is None or result_shape is None:
        raise NoMatchError("shapes are unknown")
    batch, heads, _, width = query_shape
    groups, tokens = int(keys_shape[1]), keys_shape[2]
    rows = int(heads) // groups

    scores = attention.scores
    target = integers(graph, "shape", [0, groups, rows, int(width)])
    grouped_shape = ir.Shape([batch, groups, rows, width])
    grouped = add_node(graph, "Reshape", [query, target], dtype=query.dtype, shape=grouped_shape, before=scores)
    transposed = add_node(
        graph,
        "Transpose",
        [attention.keys],
        attributes={"perm": KEYS},
        dtype=attention.keys.dtype,
        shape=ir.Shape([keys_shape[0], groups, width, tokens]),
        before=scores,
    )
    scores.replace_input_with(0, grouped)
    scores.replace_input_with(1, transposed)
    for node in (scores, *attention.between):
        shape = dims(node.outputs[0])
        if shape is not None:
            node.outputs[0].shape = ir.Shape(_with_groups(shape, groups, rows))  # [B, G, H / G, T]
    attention.mixed.replace_input_with(1, attention.values)
    result = attention.mixed.outputs[0]
    result.shape = ir.Shape(_with_groups(result_shape, groups, rows))  # [B, G, H / G, D]
    readers = list(result.uses())
    target = integers(graph, "shape", [0, int(result_shape[1]), 1, int(result_shape[3])])
    joined = add_node(
        graph, "Reshape", [result, target], dtype=result.dtype, shape=ir.Shape(result_shape), behind=result
    )  # [B, H, 1, D]
    for node, index in readers:
        node.replace_input_with(index, joined)


def _with_groups(shape: Dims, groups: int, rows: int) -> Dims:
    """Return [B, H, 1, X] as [B, groups, rows, X]."""
    return (shape[0], groups, rows, shape[3])
