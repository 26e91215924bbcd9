"""Tabulate relative position biases by distance, instead of computing a bucket for every distance in every run.

T5 computes a bucket from a distance by a dozen nodes over a few integers (`_relative_position_bucket`), which a GPU
repeats for every token: https://github.com/huggingface/transformers/blob/main/src/transformers/models/t5/modeling_t5.py
"""

from collections import deque
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx_ir import convenience
from onnx_ir.passes import PassResult

from accel.graph.build import add_node
from accel.graph.cleanup.eliminate_expand import ELEMENTWISE
from accel.graph.passes import GraphPass, remove_unused
from accel.graph.shapes import dims, integer, scalar

FUNCTIONS = ELEMENTWISE | {"Log", "Exp", "Sqrt", "Floor", "Ceil", "Round", "Sign", "Pow", "Mod", "Clip"}
MIN_NODES = 4  # of a function that is worth a table: `Max`, `Min` and `Gather` replace it
MAX_DISTANCE = 2**16  # distances evaluated in both directions; the function is taken to be constant beyond
MAX_ROWS = 2**11  # of a table


class PrecomputePositionBias(GraphPass):
    """Replace `Gather(weight, f(x))` by `Gather(table, clip(x))`, for integers x and an elementwise function f.

    x is clipped to the distances beyond which f is constant. The `Gather` stays as it is where f never becomes
    constant, needs too large a table, or yields indices outside of the weight.
    """

    name = "precompute_position_bias"
    description = "Tabulate relative position biases by distance"

    def call(self, model: ir.Model) -> PassResult:
        """Replace them in the main graph."""
        modified = False
        for node in list(model.graph):
            if node.op_type == "Gather" and node.domain == "" and node.attributes.get_int("axis", 0) == 0:
                modified |= _tabulate(model.graph, node)
        return remove_unused(model, modified)


def _tabulate(graph: ir.Graph, gather: ir.Node) -> bool:
    """Let a `Gather` read a table by distance, if it can; return whether it does."""
    weight, index = gather.inputs
    tensor = convenience.get_const_tensor(weight) if weight is not None else None
    if weight is None or index is None or tensor is None:
        return False
    distance, nodes = _distance(index)
    if distance is None or nodes < MIN_NODES or dims(distance) is None or dims(distance) != dims(index):
        return False
    indices = _evaluate(graph, distance, index)
    lowest, highest = _limits(indices)
    if highest - lowest >= MAX_ROWS:
        return False
    distances = np.array([*range(highest + 1), *range(lowest, 0)])  # negative indices count from the table's end
    indices = indices[distances + MAX_DISTANCE]
    rows = tensor.numpy()
    if indices.min() < -len(rows) or indices.max() >= len(rows):
        return False
    table = _table(graph, f"{weight.name}.by_distance", rows[indices], tensor.dtype)
    if table is None:
        return False
    clipped = distance
    for op_type, limit in (("Max", lowest), ("Min", highest)):
        inputs = [clipped, integer(graph, limit)]
        clipped = add_node(graph, op_type, inputs, dtype=distance.dtype, shape=distance.shape, before=gather)
    gather.replace_input_with(0, table)
    gather.replace_input_with(1, clipped)
    return True


def _table(graph: ir.Graph, name: str, content: np.ndarray, dtype: ir.DataType) -> ir.Value | None:
    """Return the initializer `name`, created if there is none; None if there is one of other content."""
    if name not in graph.initializers:
        graph.register_initializer(ir.val(name, const_value=ir.tensor(content, dtype=dtype, name=name)))
    existing = graph.initializers[name].const_value
    if existing is None or not np.array_equal(existing.numpy(), content):
        return None
    return graph.initializers[name]


def _evaluate(graph: ir.Graph, distance: ir.Value, index: ir.Value) -> np.ndarray:
    """Return the values of `index` where `distance` is -MAX_DISTANCE, ..., MAX_DISTANCE."""
    function = convenience.extract(graph, [distance], [index])
    function.opset_imports.update(graph.opset_imports)
    distances = np.arange(-MAX_DISTANCE, MAX_DISTANCE + 1).reshape(*[1] * (len(distance.shape or ()) - 1), -1)
    evaluator = ReferenceEvaluator(ir.to_proto(ir.Model(function, ir_version=10)))
    with np.errstate(all="ignore"):  # such as log(0), where a `Where` selects the other branch
        outputs: Any = evaluator.run(None, {str(distance.name): distances})
    return np.asarray(outputs[0]).reshape(-1)


def _limits(indices: np.ndarray) -> tuple[int, int]:
    """Return the lowest and highest distance, 0 or beyond it, outside of which `indices` are constant."""
    from_below, from_above = np.flatnonzero(indices != indices[0]), np.flatnonzero(indices != indices[-1])
    lowest = int(from_below[0]) - 1 - MAX_DISTANCE if len(from_below) else 0
    highest = int(from_above[-1]) + 1 - MAX_DISTANCE if len(from_above) else 0
    return min(lowest, 0), max(highest, 0)


def _distance(index: ir.Value) -> tuple[ir.Value | None, int]:
    """Return the int64 value from which most nodes compute `index`, and the number of these nodes."""
    distance, most_nodes = None, -1
    pending, seen = deque([index]), {index}
    while pending:
        value = pending.popleft()
        nodes = _nodes_between(value, index)
        if nodes is not None and value.dtype is ir.DataType.INT64 and nodes > most_nodes:
            distance, most_nodes = value, nodes
        node = value.producer()
        if node is not None and _is_elementwise(node):
            for term in node.inputs:
                if term is not None and scalar(term) is None and term not in seen:
                    seen.add(term)
                    pending.append(term)
    return distance, most_nodes


def _nodes_between(value: ir.Value, index: ir.Value) -> int | None:
    """Return by how many elementwise nodes `value` and constants make `index`; None if it needs anything else."""
    nodes: set[ir.Node] = set()
    pending = [index]
    while pending:
        term = pending.pop()
        node = term.producer()
        if term is value or scalar(term) is not None or node in nodes:
            continue
        if node is None or not _is_elementwise(node):
            return None
        nodes.add(node)
        pending += [each for each in node.inputs if each is not None]
    return len(nodes)


def _is_elementwise(node: ir.Node) -> bool:
    """Return whether `node` computes each element from elements of its inputs alone."""
    return node.domain == "" and node.op_type in FUNCTIONS
