"""Add up once what every layer adds to its attention scores."""

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir import convenience
from onnx_ir.passes import PassResult

from accel.graph.build import add_node
from accel.graph.passes import GraphPass
from accel.graph.shapes import broadcast, dims, made_by, used_once

Pair = frozenset[ir.Value]


@dataclass(frozen=True)
class NestedSum:
    """(x + a) + b: the outer and the inner `Add`."""

    outer: ir.Node
    inner: ir.Node

    def pairs(self) -> list[Pair]:
        """Return {x, b} and {a, b}: the pairs that could be added first."""
        last = [value for value in self.outer.inputs if value is not None and value is not self.inner.outputs[0]]
        return [frozenset((value, last[0])) for value in self.inner.inputs if last and value is not None]


class HoistAdditions(GraphPass):
    """Replace `(x + a) + b` by `x + (a + b)` where several sums add the same `a` and `b`.

    Such as a position bias and a mask. Broadcasting is associative, so the result keeps its shape, and `a + b` is never
    larger than it. A mask that `plan.clamp_masks` has clamped can take a bias and a score within FP16; whether the sum
    stays there is audited like that of every other value.
    """

    name = "hoist_additions"
    description = "Add position bias and mask once for all layers"

    def call(self, model: ir.Model) -> PassResult:
        """Hoist pairs of the main graph, the most frequent first; each round leaves at least one node less."""
        modified = False
        sums = _sums_of_most_frequent_pair(model.graph)
        while len(sums) > 1:
            _hoist(model.graph, sums)
            modified = True
            sums = _sums_of_most_frequent_pair(model.graph)
        return PassResult(model, modified)


def _nested_sums(graph: ir.Graph) -> list[NestedSum]:
    """Return every `(x + a) + b` whose inner sum no other node reads."""
    sums = []
    for outer in graph:
        if outer.op_type == "Add" and outer.domain == "":
            inner = next((node for node in map(_inner, outer.inputs) if node is not None), None)
            if inner is not None and inner.graph is graph:
                sums.append(NestedSum(outer, inner))
    return sums


def _inner(value: ir.Value | None) -> ir.Node | None:
    """Return the `Add` that computes `value`, if only one node reads it."""
    return made_by(value, "Add") if value is not None and used_once(value) else None


def _sums_of_most_frequent_pair(graph: ir.Graph) -> list[NestedSum]:
    """Return the sums of the pair that is added most often, no node in two of them."""
    by_pair: dict[Pair, list[NestedSum]] = {}
    for nested in _nested_sums(graph):
        for pair in nested.pairs():
            sums = by_pair.setdefault(pair, [])
            taken = {node for other in sums for node in (other.outer, other.inner)}
            if len(pair) == 2 and not taken & {nested.outer, nested.inner}:
                sums.append(nested)
    return max(by_pair.values(), key=len, default=[])


def _hoist(graph: ir.Graph, sums: Sequence[NestedSum]) -> None:
    """Add the pair that all `sums` share once, before the first of them."""
    pair = next(pair for pair in sums[0].pairs() if all(pair in nested.pairs() for nested in sums))
    total: ir.Value | None = None
    for nested in sums:
        outer, inner = nested.outer, nested.inner
        addends = [
            value for value in (*inner.inputs, *outer.inputs) if value is not None and value is not inner.outputs[0]
        ]
        rest = next(value for value in addends if value not in pair)
        if total is None:
            shared = [value for value in addends if value in pair]
            output = outer.outputs[0]
            name = f"{output.name}.added"
            total = add_node(
                graph, "Add", shared, name, dtype=output.dtype, shape=_broadcast_shape(shared), before=outer
            )
        add = ir.node("Add", [rest, total], name=outer.name)
        convenience.replace_nodes_and_values(graph, outer, [outer, inner], [add], outer.outputs, add.outputs)


def _broadcast_shape(values: Sequence[ir.Value]) -> ir.Shape | None:
    """Return the shape of the values' sum; None where it is unknown."""
    shapes = [shape for shape in map(dims, values) if shape is not None]
    result = broadcast(shapes) if len(shapes) == len(values) else None
    return ir.Shape(result) if result is not None else None
