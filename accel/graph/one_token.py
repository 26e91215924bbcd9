"""A step of exactly one new token: where an axis has one place, nothing needs to be moved around it."""

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from accel.graph.shapes import dims, integers, order, reshape_target


def one_token(step: ir.Model, new: str) -> None:
    """In place: the axis `new` gets length 1, and a `Transpose` that only moves such axes becomes a `Reshape`.

    A transposition reads and writes everything, a reshape nothing: heads of one token lie the same both ways.
    """
    graph = step.graph
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape([1 if _is(dim, new) else dim for dim in value.shape])
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
    RemoveUnusedNodesPass()(step)


def _is(dim: int | ir.SymbolicDim, symbol: str) -> bool:
    return not isinstance(dim, int) and dim.value == symbol


def _untouched(turn: ir.Node) -> tuple[int, ...] | None:
    """The shape that says what this `Transpose` does, if all axes of more than one place stay in order."""
    given = dims(turn.inputs[0])
    if given is None:
        return None
    wide = [axis for axis in order(turn) if given[axis] != 1]
    return reshape_target(turn.inputs[0], turn.outputs[0]) if wide == sorted(wide) else None
