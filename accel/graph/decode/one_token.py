"""A step of exactly one new token: where an axis has one place, nothing needs to be moved around it."""

from math import prod

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from accel.graph.shapes import dims, integers, made_by, order, reshape_target


def one_token(decode: ir.Model, new: str) -> None:
    """In place: the axis `new` has length 1."""
    graph = decode.graph
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape([1 if _is(dim, new) else dim for dim in value.shape])


def transpose_to_reshape(decode: ir.Model) -> None:
    """In place: a `Transpose` that only moves axes of length 1 becomes a `Reshape`, and parts are cut once.

    A transposition reads and writes everything, a reshape nothing: heads of one token lie the same both ways.
    """
    graph = decode.graph
    for node in list(graph):
        target = _untouched(node) if node.op_type == "Transpose" and node.domain == "" else None
        if target is not None:
            old = node.outputs[0]
            made = ir.node("Reshape", [node.inputs[0], integers(graph, "shape", target)], name=node.name)
            made.outputs[0].type, made.outputs[0].shape = old.type, old.shape
            graph.insert_before(node, made)
            ir.convenience.replace_all_uses_with(old, made.outputs[0], replace_graph_outputs=True)
            graph.remove(node, safe=True)
            made.outputs[0].name = old.name
    _split_once(graph)
    RemoveUnusedNodesPass()(decode)


def _split_once(graph: ir.Graph) -> None:
    """What is cut both side by side and by heads is cut side by side alone: of one token, each part is the same."""
    for node in list(graph):
        whole = _source(node.inputs[0]) if _cuts_rows(node) else None
        for flat in list(whole.consumers()) if whole is not None else ():
            if flat is not node and _cuts_rows(flat) and len(flat.outputs) == len(node.outputs):
                pairs = list(zip(node.outputs, flat.outputs, strict=True))
                if all(_size(old) is not None and _size(old) == _size(new) for old, new in pairs):
                    for old, new in pairs:
                        _reshaped(graph, node, old, new)
                break


def _cuts_rows(node: ir.Node) -> bool:
    """Whether a `Split` cuts what each sequence has from its beginning to its end: nothing lies across its parts."""
    known = dims(node.inputs[0]) if node.op_type == "Split" and node.domain == "" else None
    if known is None:
        return False
    axis = node.attributes.get_int("axis", 0) % len(known)
    return axis > 0 and all(dim == 1 for dim in known[1:axis])


def _reshaped(graph: ir.Graph, before: ir.Node, old: ir.Value, new: ir.Value) -> None:
    """Let `new` in the shape of `old` stand in for it."""
    target = reshape_target(new, old)
    if target is not None and old.uses():
        made = ir.node("Reshape", [new, integers(graph, "shape", target)])
        made.outputs[0].type, made.outputs[0].shape = old.type, old.shape
        made.outputs[0].name = f"{old.name}.reshaped"
        after = new.producer()
        if after is not None:
            graph.insert_after(max(after, before, key=list(graph).index), made)
            ir.convenience.replace_all_uses_with(old, made.outputs[0], replace_graph_outputs=True)


def _source(value: ir.Value | None) -> ir.Value | None:
    """What `value` is a reshape of."""
    while (node := made_by(value, "Reshape")) is not None:
        value = node.inputs[0]
    return value


def _size(value: ir.Value) -> tuple[int, tuple[str, ...]] | None:
    """Elements: the product of the known lengths, and the symbols of the others."""
    known = dims(value)
    if known is None:
        return None
    symbols = tuple(sorted(dim for dim in known if isinstance(dim, str)))
    return prod(dim for dim in known if isinstance(dim, int)), symbols


def _is(dim: int | ir.SymbolicDim, symbol: str) -> bool:
    return not isinstance(dim, int) and dim.value == symbol


def _untouched(turn: ir.Node) -> tuple[int, ...] | None:
    """The shape that says what this `Transpose` does, if all axes of more than one place stay in order."""
    given = dims(turn.inputs[0])
    if given is None:
        return None
    wide = [axis for axis in order(turn) if given[axis] != 1]
    return reshape_target(turn.inputs[0], turn.outputs[0]) if wide == sorted(wide) else None
