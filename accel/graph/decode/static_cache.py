"""Give a decode graph KV caches of fixed length, written in place, so that all shapes are known before it runs."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir import convenience
from onnx_ir.passes import PassResult
from onnx_ir.passes.common import TopologicalSortPass

from accel.graph.build import add_node
from accel.graph.decode.per_sequence import NotStaticError, PerSequence
from accel.graph.passes import GraphPass, remove_unused
from accel.graph.shapes import dims, integer, made_by, scalar

OPSET = 24  # the first with TensorScatter; since 20 the other operators only gained types, and compute the same
SUMS = ("Add", "Sub", "Mul")
# Operators on data in which the number of past tokens is the position of the first new token.
ON_DATA = (*SUMS, "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal", "Where", "Max", "Min", "Cast")
ON_SHAPES = ("Concat", "Expand", "Reshape", "ConstantOfShape")


@dataclass(frozen=True)
class Names:
    """Names in a decode graph.

    Attributes:
        position: New input of a static decode graph: position of each sequence's first new token, int64 [batch].
        bucket: Axis of a static cache's tokens, written or not.
        past: Axis of past tokens.
        new: Axis of new tokens.
        total: Axis of past and new tokens.
    """

    position: str
    bucket: str
    past: str = "past"
    new: str = "new"
    total: str = "total"


class StaticCache(GraphPass):
    """Replace dynamic caches by static ones, as input and as output.

    Caches with an axis of past tokens are self-attention caches. Where the graph appends to one, it writes the new
    entries at the new input `position` [batch] instead, by `TensorScatter`, which ONNX Runtime does in place if input
    and output share their address. The attention mask gets the bucket's length as well: positions that aren't written
    yet are masked by 0 there, and by the model's own causal mask, in which a sequence's new tokens begin at its own
    `position`.
    ONNX specification, from opset 24 on: https://onnx.ai/onnx/operators/onnx__TensorScatter.html

    Args:
        cache: Cache input -> cache output that becomes it in the next decode step.
        names: Names in the graph.
    """

    name = "static_cache"
    description = "Write caches of fixed length in place"

    def __init__(self, cache: Mapping[str, str], names: Names) -> None:
        super().__init__()
        self.cache, self.names = cache, names

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite a decode graph.

        Raises:
            NotStaticError: The graph uses the number of past tokens in another way. It is left half-rewritten.
        """
        graph, names = model.graph, self.names
        axes = {}  # self-attention cache -> axis of its tokens
        for value in graph.inputs:
            axis = _axis(value, names.past)
            if value.name in self.cache and axis is not None:
                axes[value] = axis
        outputs = {value.name: value for value in graph.outputs}
        batch = _batch(axes)
        position = ir.Value(name=names.position, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([batch]))
        graph.inputs.append(position)
        PastLengths(graph, axes, position, names).rewrite_uses()  # as if it were one number for all sequences
        PerSequence(graph, [position], batch).rewrite_uses()
        for value, axis in axes.items():
            _write_in_place(graph, value, outputs[self.cache[value.name or ""]], axis, position)
        model.opset_imports[""] = max(OPSET, model.opset_imports[""])
        _rename_axes(graph, names)
        result = remove_unused(model)  # modified: the graph has a new input
        TopologicalSortPass()(model)
        return result


def _axis(value: ir.Value, symbol: str) -> int | None:
    """Return the axis of `value` whose length is `symbol`."""
    for axis, dim in enumerate(value.shape or ()):
        if not isinstance(dim, int) and dim.value == symbol:
            return axis
    return None


@dataclass(frozen=True)
class Sum:
    """A length as `past` times the past tokens, `new` times the new tokens, and `rest`."""

    past: int = 0
    new: int = 0
    rest: int = 0

    def plus(self, other: "Sum", sign: int = 1) -> "Sum":
        """Return this length plus `sign` times `other`."""
        return Sum(self.past + sign * other.past, self.new + sign * other.new, self.rest + sign * other.rest)


PAST, TOTAL, NEW = Sum(past=1), Sum(past=1, new=1), Sum(new=1)


class PastLengths:
    """The values of a graph that hold the number of past tokens, or are computed from it.

    As a length (of a mask, a shape, a range from zero) the number becomes the bucket's length, which the caches' shape
    holds in a static graph; as a position it becomes `position`.
    """

    def __init__(self, graph: ir.Graph, axes: Mapping[ir.Value, int], position: ir.Value, names: Names) -> None:
        self.graph, self.position, self.names = graph, position, names
        self.sums: dict[ir.Value, Sum] = {}  # lengths that count past tokens
        self.lengths: dict[int, ir.Value] = {}  # rank, 0 or 1 -> a value that holds the number of past tokens alone
        for cache, axis in axes.items():
            for length in self._lengths(cache, axis):
                self.sums[length] = PAST
                self.lengths.setdefault(len(length.shape or ()), length)

    def _lengths(self, cache: ir.Value, axis: int) -> list[ir.Value]:
        """Return what holds the length of a cache's axis: vectors that `Shape` makes, and scalars taken from them."""
        rank = len(cache.shape or ())
        lengths = []
        for node, _ in cache.uses():
            if node.op_type != "Shape":
                continue
            first, last = node.attributes.get_int("start", 0), node.attributes.get_int("end", rank)
            start, end, _ = slice(first, last).indices(rank)
            if not start <= axis < end:
                continue
            if end - start > 1:
                raise NotStaticError(node, "it reads the number of past tokens together with other lengths")
            vector = node.outputs[0]
            lengths.append(vector)
            for consumer, _ in vector.uses():
                if consumer.op_type in ("Gather", "Squeeze"):
                    lengths.append(consumer.outputs[0])
        return lengths

    def rewrite_uses(self) -> None:
        """Rewrite every use of the number of past tokens."""
        for node in self.graph:  # in topological order
            if node.op_type in ("Add", "Sub") and any(value in self.sums for value in node.inputs):
                first, second = (self._sum(value) for value in node.inputs)
                if first is not None and second is not None:
                    self.sums[node.outputs[0]] = first.plus(second, -1 if node.op_type == "Sub" else 1)
        uses = [(node, index, value) for value in self.sums for node, index in value.uses()]
        for node, index, value in uses:
            if node.graph is not None and node.outputs[0] not in self.sums:
                self._rewrite_use(node, index, value)

    def _sum(self, value: ir.Value | None) -> Sum | None:
        """Return `value` as a sum of lengths; None if it isn't one."""
        if value is None:
            return None
        if value in self.sums:
            return self.sums[value]
        number = scalar(value)
        if number is not None:
            return Sum(rest=int(number))
        return NEW if self._is_new(value) else None

    def _is_new(self, value: ir.Value) -> bool:
        """Return whether `value` is the number of new tokens, read from the shape of another value."""
        taken = made_by(value, "Gather", "Squeeze")
        shape = made_by(taken.inputs[0] if taken is not None else value, "Shape")
        source = shape.inputs[0] if shape is not None else None
        if shape is None or source is None or source.shape is None:
            return False
        start, end = shape.attributes.get_int("start", 0), shape.attributes.get_int("end", len(source.shape))
        lengths = [dim if isinstance(dim, int) else dim.value for dim in source.shape[start:end]]
        return lengths == [self.names.new]

    def _rewrite_use(self, node: ir.Node, index: int, value: ir.Value) -> None:
        """Rewrite input `index` of `node`, a length that counts past tokens."""
        length, rank = self.sums[value], len(value.shape or ())
        if node.op_type == "Range":
            self._rewrite_range(node)
        elif node.op_type in ON_SHAPES and length in (PAST, TOTAL):
            node.replace_input_with(index, self.lengths[rank])
        elif node.op_type in ON_DATA and length == PAST and rank == 0:
            node.replace_input_with(index, self.position)
        else:
            raise NotStaticError(node, "it uses the number of past tokens in a way that a static cache doesn't allow")

    def _rewrite_range(self, node: ir.Node) -> None:
        """Let a range over all tokens cover the bucket, and one over the new tokens begin at `position`."""
        start, limit = (self._sum(value) for value in node.inputs[:2])
        if start is None or limit is None or scalar(node.inputs[2]) != 1:
            raise NotStaticError(node, "its limits are no sums of token counts, or its delta isn't 1")
        if start == Sum() and limit == TOTAL:
            node.replace_input_with(1, self.lengths[0])
        elif start == Sum(past=1, rest=start.rest) and limit == start.plus(NEW):
            inputs = [integer(self.graph, start.rest), self._new_tokens(node, start.rest), node.inputs[2]]
            counted = _add_int64(self.graph, "Range", inputs, node)
            counted.shape = node.outputs[0].shape
            _replace(self.graph, node, "Add", [counted, self.position])
        else:
            raise NotStaticError(node, "it counts neither all tokens nor the new ones")

    def _new_tokens(self, before: ir.Node, rest: int) -> ir.Value:
        """Return the number of new tokens plus `rest`, computed before a node."""
        ids, axis = self._new_axis()
        shape = _add_int64(self.graph, "Shape", [ids], before)
        new = _add_int64(self.graph, "Gather", [shape, integer(self.graph, axis)], before, axis=0)
        return _add_int64(self.graph, "Add", [new, integer(self.graph, rest)], before) if rest else new

    def _new_axis(self) -> tuple[ir.Value, int]:
        """Return the first input with an axis of new tokens, and the axis."""
        for value in self.graph.inputs:
            axis = _axis(value, self.names.new)
            if axis is not None:
                return value, axis
        raise NotStaticError(None, f"no input has an axis {self.names.new!r} of new tokens")


def _batch(caches: Iterable[ir.Value]) -> str | int:
    """Return the length or symbol of the batch's axis, the first one of every cache."""
    lengths = {(dims(cache) or ("?",))[0] for cache in caches}
    if len(lengths) != 1:
        raise NotStaticError(
            None, f"the first axes of the caches are {sorted(map(str, lengths))}, expected one, the batch"
        )
    return lengths.pop()


def _write_in_place(graph: ir.Graph, cache: ir.Value, present: ir.Value, axis: int, position: ir.Value) -> None:
    """Replace `present` = `Concat(cache, entries)` along `axis` by a write of `entries` into `cache` at `position`."""
    node = present.producer()
    rank = len(cache.shape or ())
    entries = node.inputs[1] if node is not None and node.op_type == "Concat" and len(node.inputs) == 2 else None
    if node is None or entries is None or node.inputs[0] is not cache:
        raise NotStaticError(node, f"{present.name} is not {cache.name} with new entries appended")
    if node.attributes.get_int("axis", 0) % rank != axis or axis == 0:
        raise NotStaticError(node, f"new entries of {cache.name} aren't appended along its axis of tokens")
    _replace(graph, node, "TensorScatter", [cache, entries, position], axis=axis)


def _add_int64(
    graph: ir.Graph, op_type: str, inputs: list[ir.Value | None], before: ir.Node, **attributes: int
) -> ir.Value:
    """Insert a node that computes integers before another one, and return its output."""
    return add_node(graph, op_type, inputs, attributes=attributes, dtype=ir.DataType.INT64, before=before)


def _replace(graph: ir.Graph, node: ir.Node, op_type: str, inputs: list[ir.Value | None], **attributes: int) -> None:
    """Replace a node of one output by another that takes over its names."""
    new = ir.node(op_type, inputs, attributes, name=node.name)
    convenience.replace_nodes_and_values(graph, node, [node], [new], node.outputs, new.outputs)


def _rename_axes(graph: ir.Graph, names: Names) -> None:
    """Name axes of past tokens, and of all tokens, after the bucket; drop the names of axes computed from them."""
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(dim, names) for dim in value.shape])


def _renamed(dim: int | ir.SymbolicDim, names: Names) -> int | str | None:
    """Return the length of an axis in a static graph; None if it is unknown."""
    if isinstance(dim, int) or dim.value is None:
        return dim if isinstance(dim, int) else None
    if dim.value in (names.past, names.total, f"{names.past} + {names.new}", f"{names.new} + {names.past}"):
        return names.bucket
    return None if names.past in dim.value or names.total in dim.value else dim.value
