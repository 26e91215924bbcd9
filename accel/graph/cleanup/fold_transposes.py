"""Store weights in the layout in which they are used."""

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir import convenience
from onnx_ir.passes import PassResult

from accel.graph.passes import GraphPass
from accel.graph.shapes import permutation
from accel.graph.weights import transpose


class FoldTransposes(GraphPass):
    """Store a weight that every graph reads only through one `Transpose` transposed, under its own name.

    A weight that any graph also reads untransposed (a tied embedding) stays, and its `Transpose` with it, so that all
    graphs keep holding equal bytes.
    """

    name = "fold_transposes"
    description = "Store weights transposed where every use transposes them"

    def prepare(self, models: Sequence[ir.Model]) -> None:
        """Collect in which orders of axes the graphs read each weight."""
        self._orders: dict[str, set[tuple[int, ...] | None]] = {}
        for model in models:
            for name, weight in model.graph.initializers.items():
                self._orders.setdefault(name, set()).add(_order_read(weight))

    def call(self, model: ir.Model) -> PassResult:
        """Transpose the weights on which all graphs agree."""
        modified = False
        for name, weight in model.graph.initializers.items():
            orders = self._orders[name]
            order = next(iter(orders)) if len(orders) == 1 else None
            if order is not None:
                _remove_transposes(weight, order)
                modified = True
        return PassResult(model, modified)


def _order_read(weight: ir.Value) -> tuple[int, ...] | None:
    """Return the one order of axes in which nodes read a weight; None if it is also read otherwise, or returned."""
    readers = weight.consumers()
    if weight.const_value is None or weight.is_graph_output() or not readers:
        return None
    if any(node.op_type != "Transpose" or node.outputs[0].is_graph_output() for node in readers):
        return None
    rank = len(weight.const_value.shape)
    orders = {permutation(node) or tuple(reversed(range(rank))) for node in readers}
    return orders.pop() if len(orders) == 1 else None


def _remove_transposes(weight: ir.Value, order: tuple[int, ...]) -> None:
    """Transpose a weight's content and remove the `Transpose` nodes behind it."""
    transpose(weight, order)
    for node in weight.consumers():
        convenience.replace_all_uses_with(node.outputs[0], weight)
        if node.graph is not None:
            node.graph.remove(node, safe=True)
