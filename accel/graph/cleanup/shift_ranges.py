"""Count from where the count begins, instead of counting from zero and adding the rest."""

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir import convenience
from onnx_ir.passes.common import RemoveUnusedNodesPass

from accel.graph.shapes import dims, made_by, scalar

VIEWS = ("Unsqueeze", "Squeeze", "Reshape")


def shift_ranges(models: Sequence[ir.Model]) -> None:
    """In place: `Range(a, b, d) + s` becomes `Range(a + s, b + s, d)` for a scalar `s`.

    Such as the positions of new tokens, which begin where the past ends. A range's limits are computed on the host,
    where lengths are known; the sum would need the past's length on the device, copied there at every step.
    """
    for model in models:
        for node in list(model.graph):
            if node.op_type == "Add" and node.domain == "" and dims(node.outputs[0]) is not None:
                for counted, shift in (node.inputs, reversed(node.inputs)):
                    if shift is not None and dims(shift) == () and (views := views_of_range(counted)):
                        _shift(model.graph, node, views, shift)
                        break
        RemoveUnusedNodesPass()(model)


def views_of_range(value: ir.Value | None) -> list[ir.Node]:
    """The `Range` that `value` comes from and what only changes its shape since, in order; empty if there is none."""
    views: list[ir.Node] = []
    while (view := made_by(value, *VIEWS)) is not None:
        views.insert(0, view)
        value = view.inputs[0]
    counted = made_by(value, "Range")
    return [counted, *views] if counted is not None else []


def _shift(graph: ir.Graph, total: ir.Node, views: Sequence[ir.Node], shift: ir.Value) -> None:
    """Replace the sum `total` by copies of `views` whose range is shifted."""
    old, (counted, *rest) = total.outputs[0], views
    limits = [_plus(graph, total, value, shift) for value in counted.inputs[:2]]
    made: ir.Value | None = None
    for node in (counted, *rest):
        inputs = [*limits, counted.inputs[2]] if made is None else [made, *node.inputs[1:]]
        like = node.outputs[0]
        made = ir.Value(name=f"{old.name}.{like.name}", type=like.type, shape=like.shape)
        copy = ir.node(node.op_type, inputs, attributes=node.attributes, outputs=[made], name=made.name)
        graph.insert_before(total, copy)
    if made is not None:
        made.type, made.shape = old.type, old.shape
        convenience.replace_all_uses_with(old, made, replace_graph_outputs=True)
        graph.remove(total, safe=True)
        made.name = old.name


def _plus(graph: ir.Graph, before: ir.Node, value: ir.Value | None, shift: ir.Value) -> ir.Value | None:
    if scalar(value) == 0:
        return shift
    output = ir.Value(name=f"{before.outputs[0].name}.{len(graph)}", type=shift.type, shape=shift.shape)
    graph.insert_before(before, ir.node("Add", [value, shift], outputs=[output], name=output.name))
    return output
