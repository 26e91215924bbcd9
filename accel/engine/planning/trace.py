"""A graph run on small shapes without data, so that every value's shape is known."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from accel.engine.nodes import SHAPE, Graph, Node
from accel.engine.registry import MICROSOFT
from accel.errors import AccelError


class NoMatchError(Exception):
    """A fused operation doesn't compute what the graph does; the message says why."""


Shapes = Mapping[str, tuple[int | str | None, ...]]
"""Input -> lengths of its axes; a symbol or None where the length isn't fixed."""

Lengths = Mapping[str | None, int]
"""Symbol of an axis -> its length."""

BATCH = 3  # rows of the example: more than one, so that a row's elements can be told from the batch
LENGTHS = (7, 11, 13, 17)  # lengths of axes with different symbols in the example: caches, encoder outputs
OTHER_BATCH, OTHER_LENGTHS = 5, (19, 23, 29, 31)  # of a second example, to tell what depends on lengths
LOW_BIT_PRODUCT = (MICROSOFT, "MatMulNBits")
PRODUCTS = {("", "MatMul"), ("", "Gemm"), (MICROSOFT, "FusedMatMul"), LOW_BIT_PRODUCT}
KNOWN = 1 << 16  # constants of more elements are traced by their shape alone


class Trace:
    """The values of a graph for an example of `BATCH` rows.

    Args:
        graph: The graph.
        shapes: Shapes of its inputs.
        batch: Symbol of the batch axis.

    Attributes:
        graph: The graph.
        shapes: Shapes of its inputs.
        batch: Symbol of the batch axis.
        lengths: Length of every symbol in the example.
        others: Value -> its shape in an example of other lengths.
        values: Value -> the value itself where it is known, else zeros in its shape, without memory of their own.
        known: Values that follow from constants and shapes, without large weights.
        varying: Known values that differ in an example of other lengths.
        producer: Value -> the node that computes it.
        order: Identity of a node -> its index in the graph.
        consumers: Value -> the nodes that read it, or its shape, once for each time.
        uses: Value -> how often nodes read it, or the graph returns it.

    A value whose shape depends on data, and all computed from it, is in none of `values`.

    Raises:
        AccelError: A node can't be traced.
    """

    def __init__(self, graph: Graph, shapes: Shapes, batch: str) -> None:
        self.graph, self.shapes, self.batch = graph, shapes, batch
        self.lengths = _lengths(shapes, LENGTHS) | {batch: BATCH}
        self.values, self.known = evaluate_shapes(graph, shapes, self.lengths)
        other, _ = evaluate_shapes(graph, shapes, _lengths(shapes, OTHER_LENGTHS) | {batch: OTHER_BATCH})
        self.others = {name: tuple(value.shape) for name, value in other.items()}
        computed = self.known - set(graph.constants)
        self.varying = {name for name in computed if not _equal(self.values[name], other[name])}
        self.producer = {name: node for node in graph.nodes for name in node.outputs if name}
        self.order = {id(node): index for index, node in enumerate(graph.nodes)}
        self.consumers: dict[str, list[Node]] = defaultdict(list)
        for node in graph.nodes:
            for name in node.inputs:
                self.consumers[name].append(node)
        self.uses = Counter({name: len(nodes) for name, nodes in self.consumers.items()})
        self.uses.update(graph.outputs)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the lengths of a value's axes in the example.

        Raises:
            NoMatchError: They depend on data.
        """
        if name not in self.values:
            raise NoMatchError(f"the shape of {name or 'an output that nothing reads'} depends on data")
        return tuple(self.values[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a value.

        Raises:
            NoMatchError: It isn't known, as its shape depends on data.
        """
        self.shape(name)
        return self.values[name].dtype

    def constant(self, name: str) -> Tensor | None:
        """Return a value of the example that follows from constants and shapes; None for others, and large weights."""
        return self.values[name] if name in self.known else None

    def scalar(self, name: str) -> float | None:
        """Return the number in a constant of one element; None for any other value, and if it follows from lengths."""
        value = self.constant(name)
        return float(value.item()) if value is not None and value.numel() == 1 and name not in self.varying else None

    def scaled(self, node: Node) -> tuple[str, float] | None:
        """Return the value that a node multiplies with a constant number, and that number; None if it does not."""
        if node.kind not in (("", "Mul"), ("", "Div")):
            return None
        for value, factor in (node.inputs, node.inputs[::-1])[: 2 if node.kind[1] == "Mul" else 1]:
            number = self.scalar(factor)
            if number and value in self.values and self.values[factor].ndim <= self.values[value].ndim:
                return value, number if node.kind[1] == "Mul" else 1 / number
        return None

    def is_weight(self, name: str) -> bool:
        """Return whether a value is one of the graph's constants, of floating-point numbers."""
        return name in self.graph.constants and self.graph.constants[name].is_floating_point()

    def stored(self, name: str) -> tuple[str, bool]:
        """Return the value that a matrix is, or is the transpose of, and whether it is the transpose."""
        node, transposed = self.producer.get(name), False
        while node is not None and node.kind == ("", "Transpose") and len(self.shape(node.inputs[0])) == 2:
            transposed ^= tuple(node.attributes.get("perm", (1, 0))) == (1, 0)
            name = node.inputs[0]
            node = self.producer.get(name)
        return name, transposed

    def only_consumer(self, name: str) -> Node | None:
        """Return the node that reads a value, if only one does, once, and the graph doesn't return it."""
        return self.consumers[name][0] if self.uses[name] == 1 and self.consumers[name] else None


def _lengths(shapes: Shapes, lengths: Sequence[int]) -> dict[str | None, int]:
    """Return a length for every symbol."""
    symbols = dict.fromkeys(axis for axes in shapes.values() for axis in axes if not isinstance(axis, int))
    return {symbol: lengths[index % len(lengths)] for index, symbol in enumerate(symbols)}


def evaluate_shapes(graph: Graph, shapes: Shapes, lengths: Lengths) -> tuple[dict[str, Tensor], set[str]]:
    """Run a graph without data, and without memory for it.

    Args:
        graph: The graph.
        shapes: Shapes of its inputs.
        lengths: Length of every symbol in them.

    Returns:
        Value -> the value itself where it is known, else zeros in its shape; and the names of those that are known.

    Raises:
        AccelError: A node can't run on inputs of these shapes.
    """
    constants = graph.constants.items()  # weights may be on the device
    values = {name: tensor.cpu() if tensor.numel() <= KNOWN else _zeros(tensor) for name, tensor in constants}
    known = {name for name, tensor in constants if tensor.numel() <= KNOWN}
    for name, dtype in graph.inputs.items():
        if name not in graph.constants:
            shape = [axis if isinstance(axis, int) else lengths[axis] for axis in shapes[name]]
            values[name] = torch.zeros((), dtype=dtype).expand(shape)
    for node in graph.nodes:
        names = [name for name in node.inputs if name]
        if any(name not in values for name in names) or not graph.unknown.isdisjoint(node.outputs):
            continue
        is_known = node.kind == SHAPE or all(name in known for name in names)
        results = _results(node, [values[name] if name else None for name in node.inputs], is_known)
        values.update(results if is_known else {name: _zeros(result) for name, result in results.items()})
        known.update(results if is_known else ())
    return values, known


def _zeros(like: Tensor) -> Tensor:
    """Return zeros in the shape and dtype of a tensor, all at one address on the CPU."""
    return torch.zeros((), dtype=like.dtype).expand(like.shape)


def _results(node: Node, inputs: list[Tensor | None], is_known: bool) -> dict[str, Tensor]:
    """Return a node's outputs. If they aren't to be known, a product with a weight is computed of one feature.

    Raises:
        AccelError: Torch refuses its inputs.
    """
    attributes = node.attributes
    if node.kind == LOW_BIT_PRODUCT and not is_known and inputs[0] is not None:  # without dequantizing the weight
        return {node.outputs[0]: inputs[0][..., :1].expand(*inputs[0].shape[:-1], attributes["N"])}
    if node.kind in PRODUCTS and not is_known and not attributes.get("transA", 0):
        first, second = inputs[0], inputs[1]
        if first is not None and second is not None and second.ndim == 2:
            inputs[:2] = first[..., :1], second[:, :1] if attributes.get("transB", 0) else second[:1]
    for index in node.operator.writes:
        written = inputs[index]
        inputs[index] = None if written is None else written.clone(memory_format=torch.contiguous_format)
    try:
        results = node.operator.function(*inputs, **attributes)
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        raise AccelError(f"node {node.name} can't be planned: {str(error).splitlines()[0]}") from error
    outputs = zip(node.outputs, results if isinstance(results, tuple) else (results,), strict=False)
    return {name: result for name, result in outputs if name and result is not None}


def _equal(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors have the same shape and elements."""
    return first.shape == second.shape and torch.equal(first, second)
