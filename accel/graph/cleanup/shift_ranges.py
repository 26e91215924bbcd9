"""Shift the limits of a range instead of adding to its elements."""

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir import convenience
from onnx_ir.passes import PassResult

from accel.graph.build import add_node
from accel.graph.passes import GraphPass, remove_unused
from accel.graph.shapes import dims, made_by, scalar

VIEWS = ("Unsqueeze", "Squeeze", "Reshape")


class ShiftRanges(GraphPass):
    """Replace `Range(a, b, d) + s` by `Range(a + s, b + s, d)` for a scalar `s`.

    Such as the positions of new tokens, which begin where the past ends. A range's limits are computed on the host,
    where lengths are known; the sum would need the past's length on the device, copied there at every decode step.
    """

    name = "shift_ranges"
    description = "Add to the limits of ranges, not to their elements"

    def call(self, model: ir.Model) -> PassResult:
        """Shift them in the main graph."""
        modified = False
        for node in list(model.graph):
            if node.op_type != "Add" or node.domain != "" or dims(node.outputs[0]) is None:
                continue
            for counted, shift in (node.inputs, reversed(node.inputs)):
                if shift is None or dims(shift) != ():
                    continue
                nodes = range_and_views(counted)
                if nodes:
                    _shift(model.graph, node, nodes, shift)
                    modified = True
                    break
        return remove_unused(model, modified)


def range_and_views(value: ir.Value | None) -> list[ir.Node]:
    """Return the `Range` that `value` comes from, and the nodes that reshape it on the way; empty if there is none."""
    nodes: list[ir.Node] = []
    while (view := made_by(value, *VIEWS)) is not None:
        nodes.insert(0, view)
        value = view.inputs[0]
    counted = made_by(value, "Range")
    return [counted, *nodes] if counted is not None else []


def _shift(graph: ir.Graph, total: ir.Node, nodes: Sequence[ir.Node], shift: ir.Value) -> None:
    """Replace the sum `total` by copies of a `Range` and its views, with the range's limits shifted."""
    start, limit, delta = nodes[0].inputs
    range_inputs = [_add(graph, total, start, shift), _add(graph, total, limit, shift), delta]
    copies: list[ir.Node] = []
    for node in nodes:
        inputs = [copies[-1].outputs[0], *node.inputs[1:]] if copies else range_inputs
        original = node.outputs[0]
        name = f"{total.outputs[0].name}.{original.name}"
        output = ir.Value(name=name, type=original.type, shape=original.shape)
        copies.append(ir.node(node.op_type, inputs, attributes=node.attributes, outputs=[output], name=name))
    convenience.replace_nodes_and_values(graph, total, [total], copies, total.outputs, copies[-1].outputs)


def _add(graph: ir.Graph, total: ir.Node, limit: ir.Value | None, shift: ir.Value) -> ir.Value:
    """Return `limit` + `shift`, computed before `total`."""
    if scalar(limit) == 0:
        return shift
    name = f"{total.outputs[0].name}.{len(graph)}"
    return add_node(graph, "Add", [limit, shift], name, dtype=shift.dtype, shape=shift.shape, before=total)
