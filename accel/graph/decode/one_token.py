"""Specialize a decode graph for exactly one new token: an axis of length 1 needs no transposes around it."""

from math import prod

import onnx_ir as ir
from onnx_ir import convenience
from onnx_ir.passes import PassResult

from accel.graph.passes import GraphPass, remove_unused
from accel.graph.shapes import dims, integers, made_by, permutation, reshape_target, scalar


class OneToken(GraphPass):
    """Give the axis of new tokens length 1 in every shape, and count no further than 1.

    Args:
        new: Symbol of the axis of new tokens.
    """

    name = "one_token"
    description = "Specialize shapes for one new token"

    def __init__(self, new: str) -> None:
        super().__init__()
        self.new = new

    def call(self, model: ir.Model) -> PassResult:
        """Replace the symbol in the shapes of the main graph."""
        modified = False
        graph = model.graph
        for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
            if value.shape is not None and any(self._is_new(dim) for dim in value.shape):
                value.shape = ir.Shape([1 if self._is_new(dim) else dim for dim in value.shape])
                modified = True
        for node in list(graph):
            if node.op_type == "Range" and dims(node.outputs[0]) == (1,):
                modified |= _only_element(graph, node)
        return remove_unused(model, modified)

    def _is_new(self, dim: int | ir.SymbolicDim) -> bool:
        """Return whether an axis is that of new tokens."""
        return not isinstance(dim, int) and dim.value == self.new


def _only_element(graph: ir.Graph, counted: ir.Node) -> bool:
    """Replace a `Range` of one element by that element, if it is a constant; return whether it is."""
    start, output = scalar(counted.inputs[0]), counted.outputs[0]
    if start is None or output.dtype is not ir.DataType.INT64 or output.is_graph_output():
        return False
    convenience.replace_all_uses_with(output, integers(graph, "range", [int(start)]))
    return True


class TransposeToReshape(GraphPass):
    """Replace a `Transpose` that only moves axes of length 1 by a `Reshape`, and split rows of features once.

    A transposition reads and writes all elements, a reshape none: one token's heads have the same order in memory
    before and after it.
    """

    name = "transpose_to_reshape"
    description = "Reshape where a transpose only moves axes of length 1"

    def call(self, model: ir.Model) -> PassResult:
        """Replace transposes, then the splits that are equal without them."""
        modified = False
        graph = model.graph
        for node in list(graph):
            target = _target(node) if node.op_type == "Transpose" and node.domain == "" else None
            if target is not None:
                reshape = ir.node("Reshape", [node.inputs[0], integers(graph, "shape", target)], name=node.name)
                convenience.replace_nodes_and_values(graph, node, [node], [reshape], node.outputs, reshape.outputs)
                modified = True
        for node in list(graph):
            modified |= _reuse_split(graph, node)
        return remove_unused(model, modified)


def _target(transpose: ir.Node) -> tuple[int, ...] | None:
    """Return the target of an equivalent `Reshape`; None unless all axes longer than 1 keep their order."""
    shape = dims(transpose.inputs[0])
    if shape is None:
        return None
    long_axes = [axis for axis in permutation(transpose) if shape[axis] != 1]
    return reshape_target(transpose.inputs[0], transpose.outputs[0]) if long_axes == sorted(long_axes) else None


def _reuse_split(graph: ir.Graph, split: ir.Node) -> bool:
    """Replace the parts of a `Split` by reshaped parts of another, of what both reshape; return whether it could.

    Such as heads split on their own axis for the caches, and features split on the last axis for attention: of one
    token, the parts hold the same elements.
    """
    source = _before_reshapes(split.inputs[0]) if _splits_rows(split) else None
    if source is None:
        return False
    for other in source.consumers():
        if other is split or not _splits_rows(other) or len(other.outputs) != len(split.outputs):
            continue
        modified = False
        pairs = list(zip(split.outputs, other.outputs, strict=True))
        if all(_size(old) is not None and _size(old) == _size(new) for old, new in pairs):
            for old, new in pairs:
                modified |= _replace_by_reshape(graph, split, old, new)
        return modified
    return False


def _splits_rows(node: ir.Node) -> bool:
    """Return whether a `Split` cuts each sequence's elements into contiguous parts."""
    shape = dims(node.inputs[0]) if node.op_type == "Split" and node.domain == "" else None
    if shape is None:
        return False
    axis = node.attributes.get_int("axis", 0) % len(shape)
    return axis > 0 and all(dim == 1 for dim in shape[1:axis])


def _replace_by_reshape(graph: ir.Graph, split: ir.Node, old: ir.Value, new: ir.Value) -> bool:
    """Replace `old`, a part of `split`, by `new` in its shape, if a `Reshape` can; return whether it does."""
    target, producer = reshape_target(new, old), new.producer()
    if target is None or producer is None or not old.uses():
        return False
    reshape = ir.node("Reshape", [new, integers(graph, "shape", target)])
    output = reshape.outputs[0]
    output.type, output.shape, output.name = old.type, old.shape, f"{old.name}.reshaped"
    graph.insert_after(max(producer, split, key=list(graph).index), reshape)
    convenience.replace_all_uses_with(old, output, replace_graph_outputs=True)
    return True


def _before_reshapes(value: ir.Value | None) -> ir.Value | None:
    """Return the value that `value` is a reshape of, itself if it is none."""
    while (reshape := made_by(value, "Reshape")) is not None:
        value = reshape.inputs[0]
    return value


def _size(value: ir.Value) -> tuple[int, tuple[str, ...]] | None:
    """Return the product of a value's known lengths, and the symbols of its other axes; None if one is unknown."""
    shape = dims(value)
    if shape is None:
        return None
    symbols = tuple(sorted(dim for dim in shape if isinstance(dim, str)))
    return prod(dim for dim in shape if isinstance(dim, int)), symbols
