"""A decoder step over caches of a fixed length, which it writes in place: every shape is known before it runs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir import convenience
from onnx_ir.passes.common import RemoveUnusedNodesPass, TopologicalSortPass

from accel.graph.shapes import integer, made_by, scalar

OPSET = 24  # the first with TensorScatter; other operators take more types from version 20 to it, and mean the same
SUMS = ("Add", "Sub", "Mul")
# What arithmetic on data may do with the number of past tokens: it is then the place of the first new one.
ON_DATA = (*SUMS, "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal", "Where", "Max", "Min", "Cast")


@dataclass(frozen=True)
class Names:
    """Axes of a step: past tokens, new ones, both. Of a static step: the input with the first new token's place, the
    axis of the tokens there is room for.
    """

    position: str
    bucket: str
    past: str = "past"
    new: str = "new"
    total: str = "total"


class NotStaticError(ValueError):
    """The graph does something with the number of past tokens that a cache of fixed length can't answer."""

    def __init__(self, node: ir.Node | None, reason: str) -> None:
        super().__init__(f"node {node.name} ({node.op_type}): {reason}" if node is not None else reason)


def static_cache(decode: ir.Model, cache: Mapping[str, str], names: Names) -> None:
    """In place: a decoder with past becomes one with caches of a fixed length, a bucket's, as input and as output.

    `cache`: cache input -> the output that feeds it. Those with an axis of past tokens grow: where the graph appends to
    one, it writes the new entries at `position` instead, a new input, by `TensorScatter`, which ONNX Runtime does in
    place if input and output share their address. The mask's axis is the bucket's as well: what is not yet written is
    masked there by 0, and by the model's own causal mask, which sees the new tokens at `position`.
    Raises `NotStatic` where the graph uses the number of past tokens in another way.
    ONNX specification, from opset 24 on: https://onnx.ai/onnx/operators/onnx__TensorScatter.html
    """
    graph = decode.graph
    grown = {
        value: axis for value in graph.inputs if value.name in cache and (axis := _axis(value, names.past)) is not None
    }
    outputs = {value.name: value for value in graph.outputs}
    position = ir.Value(name=names.position, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([]))
    graph.inputs.append(position)
    Lengths(graph, grown, position, names).resolve()
    writes = Writes(graph, position)
    for value, axis in grown.items():
        writes.append(value, outputs[cache[value.name or ""]], axis)
    decode.opset_imports[""] = max(OPSET, decode.opset_imports[""])
    _rename(graph, names)
    RemoveUnusedNodesPass()(decode)
    TopologicalSortPass()(decode)


def _axis(value: ir.Value, symbol: str) -> int | None:
    """The axis of `value` that goes by `symbol`."""
    for axis, dim in enumerate(value.shape or ()):
        if not isinstance(dim, int) and dim.value == symbol:
            return axis
    return None


@dataclass(frozen=True)
class Sum:
    """So many times the past tokens, the new ones, and a constant."""

    past: int = 0
    new: int = 0
    rest: int = 0

    def plus(self, other: "Sum", sign: int = 1) -> "Sum":
        return Sum(self.past + sign * other.past, self.new + sign * other.new, self.rest + sign * other.rest)


PAST, TOTAL, NEW = Sum(past=1), Sum(past=1, new=1), Sum(new=1)


class Lengths:
    """The number of past tokens, wherever the graph knows it from, and what is made of it.

    As a length (of a mask, a shape, a count from zero) it becomes the bucket's, as the caches' shape says now; as a
    place, `position`.
    """

    def __init__(self, graph: ir.Graph, grown: Mapping[ir.Value, int], position: ir.Value, names: Names) -> None:
        self.graph, self.position, self.names = graph, position, names
        self.sums: dict[ir.Value, Sum] = {}  # lengths that past tokens are in
        self.pasts: dict[int, ir.Value] = {}  # number of axes, none or one -> the past tokens themselves
        for value, axis in grown.items():
            for length in self._read(value, axis):
                self.sums[length] = PAST
                self.pasts.setdefault(len(length.shape or ()), length)

    def _read(self, value: ir.Value, axis: int) -> Iterable[ir.Value]:
        """`Shape` of that axis of a cache, as a vector and as the scalars taken out of it."""
        rank = len(value.shape or ())
        for node, _ in list(value.uses()):
            if node.op_type != "Shape":
                continue
            start, end, _ = slice(node.attributes.get_int("start", 0), node.attributes.get_int("end", rank)).indices(
                rank
            )
            if not start <= axis < end:
                continue
            if end - start > 1:
                raise NotStaticError(node, "it takes the number of past tokens together with other lengths")
            yield node.outputs[0]
            for user, _ in list(node.outputs[0].uses()):
                if user.op_type in ("Gather", "Squeeze"):
                    yield user.outputs[0]

    def resolve(self) -> None:
        """Rewrite every use of the number of past tokens."""
        for node in self.graph:  # in topological order
            if node.op_type in ("Add", "Sub") and any(value in self.sums for value in node.inputs):
                terms = [self._sum(value) for value in node.inputs]
                if terms[0] is not None and terms[1] is not None:
                    self.sums[node.outputs[0]] = terms[0].plus(terms[1], -1 if node.op_type == "Sub" else 1)
        uses = [(node, index, value) for value in self.sums for node, index in value.uses()]
        for node, index, value in uses:
            if node.graph is not None and node.outputs[0] not in self.sums:
                self._use(node, index, value)

    def _sum(self, value: ir.Value | None) -> Sum | None:
        """What `value` is as a sum of lengths; None if it isn't one."""
        if value is None or value in self.sums:
            return None if value is None else self.sums[value]
        number = scalar(value)
        if number is not None:
            return Sum(rest=int(number))
        return NEW if self._is_new(value) else None

    def _is_new(self, value: ir.Value) -> bool:
        """Whether `value` is the number of new tokens: their axis of an input."""
        taken = made_by(value, "Gather", "Squeeze")
        shape = made_by(taken.inputs[0] if taken is not None else value, "Shape")
        known = shape.inputs[0].shape if shape is not None and shape.inputs[0] is not None else None
        if shape is None or known is None:
            return False
        read = known[shape.attributes.get_int("start", 0) : shape.attributes.get_int("end", len(known))]
        return [dim if isinstance(dim, int) else dim.value for dim in read] == [self.names.new]

    def _use(self, node: ir.Node, index: int, value: ir.Value) -> None:
        """One use of a length that past tokens are in."""
        sum_, axes = self.sums[value], len(value.shape or ())
        if node.op_type == "Range":
            self._range(node)
        elif node.op_type in ("Concat", "Expand", "Reshape", "ConstantOfShape") and sum_ in (PAST, TOTAL):
            node.replace_input_with(index, self.pasts[axes])
        elif node.op_type in ON_DATA and sum_ == PAST and axes == 0:
            node.replace_input_with(index, self.position)
        else:
            raise NotStaticError(
                node, "it uses the number of past tokens in a way that a cache of fixed length can't answer"
            )

    def _range(self, node: ir.Node) -> None:
        """A count of all tokens goes over the bucket; one of the new ones begins at `position`."""
        start, limit = (self._sum(value) for value in node.inputs[:2])
        if start is None or limit is None or scalar(node.inputs[2]) != 1:
            raise NotStaticError(node, "it counts by what a cache of fixed length can't answer")
        if start == Sum() and limit == TOTAL:
            node.replace_input_with(1, self.pasts[0])
        elif start == Sum(past=1, rest=start.rest) and limit == start.plus(NEW):
            first = integer(self.graph, start.rest)
            counted = _insert(self.graph, node, "Range", [first, self._new_plus(node, start.rest), node.inputs[2]])
            counted.shape = node.outputs[0].shape
            _replace(self.graph, node, ir.node("Add", [counted, self.position]))
        else:
            raise NotStaticError(node, "it counts neither all tokens nor the new ones")

    def _new_plus(self, before: ir.Node, rest: int) -> ir.Value:
        """The number of new tokens, and `rest`."""
        ids, axis = next(
            (value, axis) for value in self.graph.inputs if (axis := _axis(value, self.names.new)) is not None
        )
        new = _insert(
            self.graph,
            before,
            "Gather",
            [_insert(self.graph, before, "Shape", [ids]), integer(self.graph, axis)],
            axis=0,
        )
        return _insert(self.graph, before, "Add", [new, integer(self.graph, rest)]) if rest else new


class Writes:
    """New entries of caches, written at `position`."""

    def __init__(self, graph: ir.Graph, position: ir.Value) -> None:
        self.graph, self.position = graph, position
        self.places: ir.Value | None = None  # `position` for every sequence

    def append(self, cache: ir.Value, grown: ir.Value, axis: int) -> None:
        """`grown` = `Concat(cache, entries)` along `axis` becomes `cache` with `entries` from `position` on."""
        node = grown.producer()
        rank = len(cache.shape or ())
        entries = node.inputs[1] if node is not None and node.op_type == "Concat" and len(node.inputs) == 2 else None
        if node is None or entries is None or node.inputs[0] is not cache:
            raise NotStaticError(node, f"{grown.name} is not {cache.name} with new entries behind it")
        if node.attributes.get_int("axis", 0) % rank != axis or axis == 0:
            raise NotStaticError(node, f"{cache.name} grows along another axis than its tokens'")
        if self.places is None:
            sequences = _insert(self.graph, node, "Shape", [cache], start=0, end=1)
            self.places = _insert(self.graph, node, "Expand", [self.position, sequences])
        _replace(self.graph, node, ir.node("TensorScatter", [cache, entries, self.places], {"axis": axis}))


def _insert(
    graph: ir.Graph, before: ir.Node, op: str, inputs: Sequence[ir.Value | None], **attributes: int
) -> ir.Value:
    """What a new node computes from integers."""
    made = ir.Value(type=ir.TensorType(ir.DataType.INT64))
    graph.insert_before(before, ir.node(op, inputs, attributes, outputs=[made]))
    return made


def _replace(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    """Put `new`, of one output, in the place of `old`, under its names."""
    made, known = new.outputs[0], old.outputs[0]
    made.type, made.shape, new.name = known.type, known.shape, old.name
    graph.insert_before(old, new)
    convenience.replace_all_uses_with(known, made, replace_graph_outputs=True)
    graph.remove(old, safe=True)
    made.name = known.name


def _rename(graph: ir.Graph, names: Names) -> None:
    """The bucket's name for axes of past tokens, or of all; an axis that has more in it is no longer known."""
    old = {names.past, names.total, f"{names.past} + {names.new}", f"{names.new} + {names.past}"}

    def renamed(dim: int | ir.SymbolicDim) -> int | str | None:
        if isinstance(dim, int) or dim.value is None:
            return dim if isinstance(dim, int) else None
        if dim.value in old:
            return names.bucket
        return None if any(symbol in dim.value for symbol in (names.past, names.total)) else dim.value

    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape([renamed(dim) for dim in value.shape])
