"""Store a weight the way it is used."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir import convenience


def fold_transposes(models: Sequence[ir.Model]) -> None:
    """In place: a weight that every graph only uses transposed is stored transposed, under its own name.

    A weight that any graph also uses as it is (a tied embedding) stays, and its `Transpose` with it, so that all
    graphs keep holding equal bytes.
    """
    orders: dict[str, set[tuple[int, ...] | None]] = {}
    for model in models:
        for value in model.graph.initializers.values():
            orders.setdefault(value.name or "", set()).add(_order(value))
    for model in models:
        for value in list(model.graph.initializers.values()):
            agreed = orders[value.name or ""]
            order = next(iter(agreed)) if len(agreed) == 1 else None
            if order is not None and value.const_value is not None:
                _fold(value, value.const_value, order)


def _order(value: ir.Value) -> tuple[int, ...] | None:
    """The one order of axes in which a weight is used, or None if it is also used otherwise or returned."""
    users = value.consumers()
    if value.const_value is None or value.is_graph_output() or not users:
        return None
    if any(user.op_type != "Transpose" or user.outputs[0].is_graph_output() for user in users):
        return None
    rank = len(value.const_value.shape)
    found = {tuple(user.attributes.get_ints("perm", ())) or tuple(reversed(range(rank))) for user in users}
    return found.pop() if len(found) == 1 else None


def _fold(value: ir.Value, tensor: ir.TensorProtocol, order: tuple[int, ...]) -> None:
    users = value.consumers()
    shape = ir.Shape([tensor.shape.numpy()[axis] for axis in order])
    value.const_value = ir.LazyTensor(
        lambda: ir.tensor(np.ascontiguousarray(tensor.numpy().transpose(order)), dtype=tensor.dtype),
        dtype=tensor.dtype,
        shape=shape,
        name=value.name,
    )
    value.shape = shape
    for user in users:
        convenience.replace_all_uses_with(user.outputs[0], value)
        if user.graph is not None:
            user.graph.remove(user, safe=True)
