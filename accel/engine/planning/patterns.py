"""What patterns share: what is fused so far, and the row of features that a value is a view of."""

import logging
from collections.abc import Collection
from dataclasses import dataclass, field

import torch

from accel.engine.nodes import Node
from accel.engine.operations.normalize import Norm
from accel.engine.planning.linear_maps import feature_map, find_region, hidden_values
from accel.engine.planning.trace import BATCH, NoMatchError, Trace

logger = logging.getLogger(__name__)

RMS_NORM, LAYER_NORM = ("", "SimplifiedLayerNormalization"), ("", "LayerNormalization")
NORMS = {RMS_NORM: "rms", LAYER_NORM: "layer"}
EPSILON = 1e-5  # the default of both operators


@dataclass
class Fused:
    """A fused operation in place of nodes.

    Attributes:
        operation: `normalize`, `product`, `attention` or `cross attention`.
        spec: Its specification.
        inputs: Names of the values that it reads, in the order that the operation expects.
        outputs: Names of the values that it computes.
        nodes: The nodes whose results it computes, in the order of the graph.
    """

    operation: str
    spec: object
    inputs: list[str]
    outputs: list[str]
    nodes: list[Node] = field(default_factory=list)


class Matcher:
    """The state of matching one graph.

    Args:
        trace: The traced graph.
        sources: Values that begin the hidden state: token ids, caches and other floating-point inputs.

    Attributes:
        trace: The traced graph.
        hidden: Values that depend on the hidden state.
        computed: Values that fused operations compute, as rows [B, 1, N] or as caches.
        taken: Identities of the nodes whose results fused operations compute.
        misses: Node that looked like the centre of an operation -> why it is none.
    """

    def __init__(self, trace: Trace, sources: Collection[str]) -> None:
        self.trace = trace
        self.hidden = hidden_values(trace, sources)
        self.computed: set[str] = set()
        self.taken: set[int] = set()
        self.misses: dict[str, str] = {}

    def is_free(self, node: Node) -> bool:
        """Return whether no operation computes a node's result."""
        return id(node) not in self.taken

    def take(self, fused: Fused) -> Fused:
        """Take an operation, and return it. What it reads counts as used once more, so that no other one skips it.

        Raises:
            NoMatchError: An input of it depends on an output of it.
        """
        nodes = {id(node) for node in fused.nodes}
        self._check_order(fused, nodes)
        self.taken |= nodes
        self.computed.update(fused.outputs)
        self.trace.uses.update(fused.inputs)
        return fused

    def _check_order(self, fused: Fused, nodes: Collection[int]) -> None:
        """Raise `NoMatchError` if an input is computed from a value that one of the nodes computes."""
        first = min((self.trace.order[each] for each in nodes), default=0)
        pending, seen = list(fused.inputs), set[int]()
        while pending:
            name = pending.pop()
            node = self.trace.producer.get(name)
            if node is None or id(node) in seen or self.trace.order[id(node)] < first:
                continue
            if id(node) in nodes and name in fused.outputs:
                raise NoMatchError(f"an input depends on {name}, which the operation computes")
            seen.add(id(node))
            pending += node.inputs

    def miss(self, node: Node, reason: object) -> None:
        """Note why no operation computes a node's result."""
        self.misses[node.name] = str(reason)
        self.note(node.name, reason)

    def note(self, name: str, reason: object) -> None:
        """Log why no operation computes a value, or a node's result, that another one could have taken."""
        logger.debug(f"{name}: {reason}")

    def row(self, name: str, width: int) -> str:
        """Return the row of features that a value is a view of; the value itself, if it isn't that of all, in order.

        Args:
            name: The value.
            width: Number of its features.

        Raises:
            NoMatchError: It has no rows of that width.
        """
        self.check_row(name, width)
        try:
            region = find_region(self.trace, name, self.hidden)
            found = feature_map(region, self.trace)
        except NoMatchError:
            return name
        in_order = found.scale == 1 and torch.equal(found.features, torch.arange(width))
        return region.root if in_order and self.is_row(region.root, width) else name

    def check_row(self, name: str, width: int | None) -> None:
        """Raise `NoMatchError` if a value has no rows of `width` features, or of any number of them if that is None."""
        if not self.is_row(name, width):
            raise NoMatchError(f"{name} of shape {list(self.trace.shape(name))} has no rows of {width or 'features'}")

    def is_row(self, name: str, width: int | None) -> bool:
        """Return whether a value is one row of features for each row of the batch."""
        shape = self.trace.shape(name)
        count = torch.Size(shape).numel()
        batched = name in self.computed or shape[:1] == (BATCH,)
        return batched and count % BATCH == 0 and (width is None or count == BATCH * width)

    def is_residual(self, name: str, output: str) -> bool:
        """Return whether a value that is added to an operation's output is a row of the same shape.

        It can't depend on the output, if nothing but the addition reads that.
        """
        shape = self.trace.shape(output)
        return name in self.hidden and self.trace.shape(name) == shape and self.is_row(name, shape[-1])

    def norm(self, node: Node, width: int) -> tuple[Norm, list[str]]:
        """Return the norm of rows that a node computes, and its weight and bias.

        Raises:
            NoMatchError: It is over other axes, or its weight or bias is no vector of `width` numbers.
        """
        kind, shape = NORMS.get(node.kind), self.trace.shape(node.inputs[0])
        if kind is None or node.attributes.get("axis", -1) not in (-1, len(shape) - 1) or shape[-1:] != (width,):
            raise NoMatchError(f"{node.name} is no norm of the last {width} features")
        tensors = [name for name in node.inputs[1:] if name]
        if any(self.trace.shape(name) != (width,) for name in tensors):
            raise NoMatchError(f"{node.name} has a weight or bias that is no vector of {width} numbers")
        return Norm(kind, node.attributes.get("epsilon", EPSILON)), tensors
