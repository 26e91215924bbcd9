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
    fixed = {
        value.name for model in models for value in model.graph.initializers.values() if not _only_transposed(value)
    }
    for model in models:
        for value in list(model.graph.initializers.values()):
            if value.name not in fixed and value.const_value is not None:
                _fold(value, value.const_value)


def _only_transposed(value: ir.Value) -> bool:
    users = value.consumers()
    orders = {tuple(user.attributes.get_ints("perm", ())) for user in users if user.op_type == "Transpose"}
    return bool(users) and len(orders) == 1 and all(user.op_type == "Transpose" for user in users)


def _fold(value: ir.Value, tensor: ir.TensorProtocol) -> None:
    users = value.consumers()
    order = tuple(users[0].attributes.get_ints("perm", ())) or tuple(reversed(range(len(tensor.shape))))
    shape = ir.Shape([tensor.shape.numpy()[axis] for axis in order])
    value.const_value = ir.LazyTensor(
        lambda: ir.tensor(np.ascontiguousarray(tensor.numpy().transpose(order)), dtype=tensor.dtype),
        dtype=tensor.dtype,
        shape=shape,
        name=value.name,
    )
    value.shape = shape
    for user in users:
        convenience.replace_all_uses_with(user.outputs[0], value, replace_graph_outputs=False)
        if user.graph is not None:
            user.graph.remove(user, safe=True)
