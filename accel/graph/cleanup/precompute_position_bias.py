"""A lookup by a function of distances becomes one by the distance: what relative positions mean is written out once.

T5's takes a dozen nodes over a few integers (`_relative_position_bucket`), which a GPU computes anew for every token:
https://github.com/huggingface/transformers/blob/main/src/transformers/models/t5/modeling_t5.py
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx_ir import convenience
from onnx_ir.passes.common import RemoveUnusedNodesPass

from accel.graph.cleanup.eliminate_expand import ELEMENTWISE
from accel.graph.shapes import dims, integer, scalar

FUNCTIONS = ELEMENTWISE | {"Log", "Exp", "Sqrt", "Floor", "Ceil", "Round", "Sign", "Pow", "Mod", "Clip"}
FEWEST = 4  # nodes; what takes their place are three
REACH = 2**16  # distances that are looked at, in both directions; beyond, the function is taken to stay as it is
LONGEST = 2**11  # entries of a table


def precompute_position_bias(models: Sequence[ir.Model]) -> None:
    """In place: `Gather(weight, f(x))`, x integers and f elementwise, becomes `Gather(table, x)`, x limited to the
    distances beyond which f no longer changes. Left alone where f goes on changing, or leads out of the weight.
    """
    for model in models:
        for node in list(model.graph):
            if node.op_type == "Gather" and node.domain == "" and node.attributes.get_int("axis", 0) == 0:
                _write_out(model.graph, node)
        RemoveUnusedNodesPass()(model)


def _write_out(graph: ir.Graph, lookup: ir.Node) -> None:
    weight, index = lookup.inputs
    constant = convenience.get_const_tensor(weight) if weight is not None else None
    given = _argument(index) if index is not None and constant is not None else None
    if constant is None or given is None or weight is None or index is None:
        return
    value, function = given
    if len(function) < FEWEST or dims(value) is None or dims(value) != dims(index):
        return
    places = _computed(graph, value, index)
    least, most = _limits(places)
    if most - least >= LONGEST:
        return
    distances = np.array([*range(most + 1), *range(least, 0)])  # negative entries count from a table's end
    wanted = places[distances + REACH]
    rows = constant.numpy()
    if not -len(rows) <= wanted.min() <= wanted.max() < len(rows):
        return
    table = rows[wanted]
    name = f"{weight.name}.by_distance"
    if name not in graph.initializers:
        graph.register_initializer(ir.val(name, const_value=ir.tensor(table, dtype=constant.dtype, name=name)))
    known = graph.initializers[name].const_value
    if known is None or not np.array_equal(known.numpy(), table):
        return
    for op, limit in (("Max", least), ("Min", most)):
        limited = ir.Value(type=value.type, shape=value.shape)
        graph.insert_before(lookup, ir.node(op, [value, integer(graph, limit)], outputs=[limited]))
        value = limited
    lookup.replace_input_with(0, graph.initializers[name])
    lookup.replace_input_with(1, value)


def _computed(graph: ir.Graph, value: ir.Value, index: ir.Value) -> np.ndarray:
    """What `index` is where `value` is -REACH, ..., REACH."""
    part = convenience.extract(graph, [value], [index])
    part.opset_imports.update(graph.opset_imports)
    distances = np.arange(-REACH, REACH + 1).reshape(*[1] * (len(value.shape or ()) - 1), -1)
    with np.errstate(all="ignore"):  # such as the logarithm of 0, which another branch stands in for
        made: Any = ReferenceEvaluator(ir.to_proto(ir.Model(part, ir_version=10))).run(
            None, {str(value.name): distances}
        )
    return np.asarray(made[0]).reshape(-1)


def _limits(places: np.ndarray) -> tuple[int, int]:
    """The distances, 0 and around it, beyond which `places` are what they are at the ends."""
    below, above = np.flatnonzero(places != places[0]), np.flatnonzero(places != places[-1])
    least = int(below[0]) - 1 - REACH if len(below) else 0
    most = int(above[-1]) + 1 - REACH if len(above) else 0
    return min(least, 0), max(most, 0)


def _argument(index: ir.Value) -> tuple[ir.Value, list[ir.Node]] | None:
    """The value x of integers, as early as there is one, that `index` is a function of, and the function's nodes."""
    found = None
    values = [index]
    for value in values:  # grows
        function = _function(index, value)
        if (
            function is not None
            and value.dtype is ir.DataType.INT64
            and (found is None or len(function) > len(found[1]))
        ):
            found = value, function
        node = value.producer()
        if node is not None and _elementwise(node):
            values += [one for one in node.inputs if one is not None and scalar(one) is None and one not in values]
    return found


def _function(index: ir.Value, value: ir.Value) -> list[ir.Node] | None:
    """The nodes by which `index` is computed from `value` and constants alone; None if it takes more."""
    nodes: dict[ir.Node, None] = {}
    values = [index]
    while values:
        one = values.pop()
        node = one.producer()
        if one is value or scalar(one) is not None or node in nodes:
            continue
        if node is None or not _elementwise(node):
            return None
        nodes[node] = None
        values += [given for given in node.inputs if given is not None]
    return list(nodes)


def _elementwise(node: ir.Node) -> bool:
    return node.domain == "" and node.op_type in FUNCTIONS
