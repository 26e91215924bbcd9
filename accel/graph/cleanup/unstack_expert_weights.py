"""Weights that lie stacked and are only ever looked at one by one, as those of experts, become weights of their own.

A stack in the graph is cut at every run, unless the runtime folds the cut, which it does once per branch of an `If`.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir import convenience


def unstack_expert_weights(models: Sequence[ir.Model]) -> None:
    """In place: a weight that every graph only takes layers of, by constant numbers, is stored layer by layer."""
    whole = {value.name for model in models for value in model.graph.initializers.values() if not _cut(value)}
    for model in models:
        for value in list(model.graph.initializers.values()):
            if value.name not in whole:
                _split(model.graph, value)


def _cut(value: ir.Value) -> bool:
    """Whether all that reads `value` is a `Gather` of one layer of its first axis."""
    tensor, users = value.const_value, value.consumers()
    if tensor is None or len(tensor.shape) < 2 or not users or value.is_graph_output():
        return False
    return all(user.inputs[0] is value and _layer(user) is not None for user in users)


def _layer(node: ir.Node) -> int | None:
    """The one layer that a node takes of its first input's first axis, counted from the end if negative."""
    if node.op_type != "Gather" or node.domain != "" or node.attributes.get_int("axis", 0) != 0:
        return None
    number = convenience.get_const_tensor(node.inputs[1]) if node.inputs[1] is not None else None
    known = number is not None and len(number.shape) == 0 and not node.outputs[0].is_graph_output()
    return int(number.numpy()) if known and number is not None else None


def _split(graph: ir.Graph, stack: ir.Value) -> None:
    tensor = stack.const_value
    if tensor is None:
        return
    parts: dict[int, ir.Value] = {}
    for user in stack.consumers():
        number = (_layer(user) or 0) % tensor.shape.numpy()[0]
        if number not in parts:
            parts[number] = _part(tensor, number, f"{stack.name}.{number}")
            graph.register_initializer(parts[number])
        convenience.replace_all_uses_with(user.outputs[0], parts[number])
        if user.graph is not None:
            user.graph.remove(user, safe=True)
    graph.initializers.pop(stack.name or "")


def _part(tensor: ir.TensorProtocol, number: int, name: str) -> ir.Value:
    def load() -> ir.TensorProtocol:
        return ir.tensor(np.ascontiguousarray(tensor.numpy()[number]), dtype=tensor.dtype)

    shape = ir.Shape(tensor.shape.numpy()[1:])
    part = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape)
    part.const_value = ir.LazyTensor(load, dtype=tensor.dtype, shape=shape, name=name)
    return part
