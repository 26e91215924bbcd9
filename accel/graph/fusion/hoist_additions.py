"""What every layer adds to its scores is added up once, before the layers."""

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir import convenience

from accel.graph.shapes import made_by, used_once

Pair = frozenset[ir.Value]
Place = tuple[ir.Node, ir.Node]  # (outer, inner) of (x + a) + b


def hoist_additions(models: Sequence[ir.Model]) -> None:
    """In place: `(x + a) + b` becomes `x + (a + b)` where several places add the same `a` and `b`.

    Such as a position bias and a mask. Broadcasting is associative, so the result keeps its shape, and `a + b` is never
    larger than it. A mask that `plan.clamp_masks` has clamped can take a bias and a score within FP16; whether the sum
    stays there is audited like that of every other value.
    """
    for model in models:
        while len(places := _most_common(model.graph)) > 1:  # each round leaves at least one node less
            _hoist(model.graph, places)


def _sums(graph: ir.Graph) -> list[Place]:
    """(outer, inner) of every `(x + a) + b` whose inner sum nobody else reads."""
    found = []
    for outer in graph:
        if outer.op_type == "Add" and outer.domain == "":
            inner = next((node for value in outer.inputs if (node := _inner(value)) is not None), None)
            if inner is not None and inner.graph is graph:
                found.append((outer, inner))
    return found


def _inner(value: ir.Value | None) -> ir.Node | None:
    return made_by(value, "Add") if value is not None and used_once(value) else None


def _pairs(outer: ir.Node, inner: ir.Node) -> list[Pair]:
    last = [value for value in outer.inputs if value is not None and value is not inner.outputs[0]]
    return [frozenset((value, last[0])) for value in inner.inputs if last and value is not None]


def _most_common(graph: ir.Graph) -> list[Place]:
    """The places of the pair that is added most often, no node in two of them."""
    found: dict[Pair, list[Place]] = {}
    for place in _sums(graph):
        for pair in _pairs(*place):
            known = found.setdefault(pair, [])
            if len(pair) == 2 and not {node for other in known for node in other} & set(place):
                known.append((place[0], place[1]))
    return max(found.values(), key=len, default=[])


def _hoist(graph: ir.Graph, places: Sequence[Place]) -> None:
    pair = next(pair for pair in _pairs(*places[0]) if all(pair in _pairs(*place) for place in places))
    total: ir.Value | None = None
    for outer, inner in places:
        addends = [value for value in (*inner.inputs, *outer.inputs) if value is not inner.outputs[0]]
        rest = next(value for value in addends if value not in pair)
        if total is None:
            added = [value for value in addends if value in pair]
            total = ir.Value(name=f"{outer.outputs[0].name}.added", type=outer.outputs[0].type)
            total.shape = _broadcast(added)
            graph.insert_before(outer, ir.node("Add", added, outputs=[total], name=total.name))
        old = outer.outputs[0]
        made = ir.Value(name=old.name, type=old.type, shape=old.shape)
        graph.insert_before(outer, ir.node("Add", [rest, total], outputs=[made], name=outer.name))
        convenience.replace_all_uses_with(old, made, replace_graph_outputs=True)
        graph.remove((outer, inner), safe=True)


def _broadcast(values: Sequence[ir.Value | None]) -> ir.Shape | None:
    """The shape of the sum; None where symbols leave it open."""
    shapes = [value.shape for value in values if value is not None and value.shape is not None]
    if len(shapes) != len(values):
        return None
    rank = max(len(shape) for shape in shapes)
    result: list[int | ir.SymbolicDim] = []
    for axis in range(-rank, 0):
        lengths = [shape[axis] for shape in shapes if -axis <= len(shape)]
        wide = [dim for dim in lengths if dim != 1]
        if len(set(map(str, wide))) > 1 or any(isinstance(dim, ir.SymbolicDim) and dim.value is None for dim in wide):
            return None
        result.append(wide[0] if wide else 1)
    return ir.Shape(result)
