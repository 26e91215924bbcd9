"""A graph run once on small shapes without data, so that every value's shape is known."""

from collections import Counter, defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from accel.engine.nodes import SHAPE, Graph, Node


class NoMatchError(Exception):
    """A fused operation doesn't compute what the graph does; the message says why."""


META = torch.device("meta")
BATCH = 2  # rows of the example: more than one, so that a row's elements can be told from the batch
LENGTHS = 5  # length of every other axis without a fixed length: caches, encoder outputs
KNOWN = 1 << 16  # constants of more elements are traced by their shape alone


class Trace:
    """The values of a graph for an example of `BATCH` rows.

    Args:
        graph: The graph.
        shapes: Input -> lengths of its axes; a symbol or None where the length isn't fixed.
        batch: Symbol of the batch axis.

    Attributes:
        graph: The graph.
        values: Value -> tensor: the value itself where it follows from constants and shapes, else one without data.
        producer: Value -> the node that computes it.
        consumers: Value -> the nodes that read it, once for each time; without those that read its shape alone.
        uses: Value -> how often nodes read it, or the graph returns it.

    A value whose shape depends on data, and all computed from it, is in none of `values`.
    """

    def __init__(self, graph: Graph, shapes: Mapping[str, tuple[int | str | None, ...]], batch: str) -> None:
        self.graph = graph
        self.values: dict[str, Tensor] = {
            name: tensor if tensor.numel() <= KNOWN else tensor.to(META) for name, tensor in graph.constants.items()
        }
        self.producer = {name: node for node in graph.nodes for name in node.outputs if name}
        self.consumers: dict[str, list[Node]] = defaultdict(list)
        for name, dtype in graph.inputs.items():
            if name not in graph.constants:
                lengths = [_length(axis, batch) for axis in shapes[name]]
                self.values[name] = torch.empty(lengths, dtype=dtype, device=META)
        for node in graph.nodes:
            if node.kind != SHAPE:
                for name in node.inputs:
                    self.consumers[name].append(node)
            self._run(node)
        self.uses = Counter({name: len(nodes) for name, nodes in self.consumers.items()})
        self.uses.update(graph.outputs)

    def _run(self, node: Node) -> None:
        """Compute a node's outputs."""
        if any(name and name not in self.values for name in node.inputs):
            return
        inputs = [self.values[name] if name else None for name in node.inputs]
        without_data = any(tensor is not None and tensor.device == META for tensor in inputs)
        if node.kind == SHAPE:
            inputs = [None if tensor is None else torch.empty(tensor.shape) for tensor in inputs]
        elif without_data:
            host = node.operator.host
            inputs = [
                tensor if tensor is None or index in host else tensor.to(META) for index, tensor in enumerate(inputs)
            ]
        try:
            results = node.operator.function(*inputs, **node.attributes)
        except NotImplementedError:  # the shape of its output depends on data
            return
        for name, result in zip(node.outputs, results if isinstance(results, tuple) else (results,), strict=False):
            if name and result is not None:
                self.values[name] = result

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the lengths of a value's axes in the example.

        Raises:
            NoMatchError: They depend on data.
        """
        if name not in self.values:
            raise NoMatchError(f"the shape of {name} depends on data")
        return tuple(self.values[name].shape)

    def constant(self, name: str) -> Tensor | None:
        """Return a value that follows from constants and shapes; None for any other, and for large weights."""
        value = self.values.get(name) if name else None
        return None if value is None or value.device == META else value

    def scalar(self, name: str) -> float | None:
        """Return the number in a constant of one element; None for any other value."""
        value = self.constant(name)
        return float(value.item()) if value is not None and value.numel() == 1 else None

    def is_weight(self, name: str) -> bool:
        """Return whether a value is one of the graph's constants, of floating-point numbers."""
        return name in self.graph.constants and self.graph.constants[name].is_floating_point()

    def only_consumer(self, name: str) -> Node | None:
        """Return the node that reads a value, if only one does, once, and the graph doesn't return it."""
        return self.consumers[name][0] if self.uses[name] == 1 and self.consumers[name] else None


def _length(axis: int | str | None, batch: str) -> int:
    """Return the length of an axis in the example."""
    if isinstance(axis, int):
        return axis
    return BATCH if axis == batch else LENGTHS
