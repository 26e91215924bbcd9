"""Inputs of a merged decoder as Optimum and Transformers.js feed them."""

from collections.abc import Collection

import numpy as np
import onnx_ir as ir
from onnx_ir import convenience

LENGTH = 2  # axis of a cache, [batch, heads, length, head_size]
END = np.iinfo(np.int64).max


def count_kept_logits(model: ir.Model, indices: str, number: str) -> bool:
    """Replace the input of indices of the tokens whose logits are computed by their number, in place.

    Both clients know only the number of last tokens, 0 for all, as an int64 scalar.

    Args:
        model: Graph of prefill or decode, with `input_ids` [batch, new].
        indices: Name of the input to replace, int64 [kept].
        number: Name of the new input.

    Returns:
        Whether the graph had the input `indices`.
    """
    graph = model.graph
    old = next((value for value in graph.inputs if value.name == indices), None)
    if old is None:
        return False
    ids = next(value for value in graph.inputs if value.name == "input_ids")
    kept = ir.Value(name=number, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([]))
    constants = {"zero": 0, "one": 1, "axis": [0], "end": [END], "vector": [1]}
    nodes = {}
    for name, value in constants.items():
        nodes[name] = ir.node("Constant", [], {"value": ir.tensor(np.array(value, np.int64))}, name=f"{number}.{name}")
    zero, one, axis, end, vector = (node.outputs[0] for node in nodes.values())

    def add(operator: str, inputs: list[ir.Value], **attributes: int) -> ir.Value:
        """Append a node and return its output."""
        nodes[operator] = ir.node(operator, inputs, attributes, name=f"{number}.{operator}")
        return nodes[operator].outputs[0]

    length = add("Squeeze", [add("Shape", [ids], start=1, end=2), axis])
    # Slice counts negative starts from the end, and -0 is the beginning: all tokens.
    start = add("Neg", [add("Reshape", [kept, vector])])
    result = add("Slice", [add("Range", [zero, length, one]), start, end, axis])
    for node in nodes.values():
        node.outputs[0].name = node.name
    result.type, result.shape = old.type, old.shape
    convenience.replace_all_uses_with(old, result)
    graph.insert_before(graph[0], list(nodes.values()))
    graph.inputs[graph.inputs.index(old)] = kept
    return True


def add_default(model: ir.Model, name: str, value: int) -> None:
    """Make the input `name`, an int64 scalar, optional: an initializer of that name has the value if none is fed."""
    kept = next(candidate for candidate in model.graph.inputs if candidate.name == name)
    kept.const_value = ir.tensor(np.array(value, np.int64), name=name)
    model.graph.register_initializer(kept)


def name_cache_lengths(model: ir.Model, caches: Collection[str], symbol: str) -> None:
    """Give the length axis of cache inputs a name where it is a number, in place.

    A client without caches feeds length 0, also where an encoder's output always has the same length.

    Args:
        model: Merged decoder.
        caches: Names of the cache inputs.
        symbol: Name of the axis.
    """
    for value in model.graph.inputs:
        if value.name in caches and value.shape is not None and isinstance(value.shape[LENGTH], int):
            value.shape = ir.Shape([symbol if axis == LENGTH else dim for axis, dim in enumerate(value.shape)])
