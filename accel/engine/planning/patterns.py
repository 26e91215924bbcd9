"""What patterns share: the nodes that are taken already, and the walk along a value's consumers."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from accel.engine.nodes import Node
from accel.engine.planning.linear_maps import Region, feature_map, find_region, hidden_values
from accel.engine.planning.trace import BATCH, NoMatchError, Trace

logger = logging.getLogger(__name__)


@dataclass
class Fused:
    """A fused operation in place of nodes.

    Attributes:
        operation: `normalize`, `product` or `attention`.
        spec: Its specification.
        inputs: Names of the values that it reads, in the order that the operation expects.
        outputs: Names of the values that it computes.
        nodes: The nodes that it replaces. Values between them are not computed.
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

    Attributes:
        trace: The traced graph.
        hidden: Values that depend on the hidden state.
        taken: Identities of the nodes that fused operations replace.
        misses: Reason for every node that no operation took, by name.
    """

    def __init__(self, trace: Trace, sources: Iterable[str]) -> None:
        self.trace = trace
        self.hidden = hidden_values(trace, sources)
        self.taken: set[int] = set()
        self.misses: dict[str, str] = {}

    def is_free(self, node: Node) -> bool:
        """Return whether no operation has taken a node."""
        return id(node) not in self.taken

    def take(self, fused: Fused) -> Fused:
        """Take the nodes of an operation, and return it."""
        self.taken.update(id(node) for node in fused.nodes)
        return fused

    def miss(self, node: Node, reason: object) -> None:
        """Note why no operation takes a node."""
        self.misses[node.name] = str(reason)
        logger.debug(f"{node.name}: {reason}")

    def row(self, name: str) -> Region:
        """Return the views between a value and the row of features that it is.

        Raises:
            NoMatchError: The features are in another order, or scaled.
        """
        region = find_region(self.trace, name, self.hidden)
        if region.nodes:
            found = feature_map(region, self.trace)
            if found.scale != 1 or not torch.equal(found.features, torch.arange(len(found.features))):
                raise NoMatchError(f"{name} is not {region.root} with its features in order")
            size = self.trace.values[region.root].numel()
            if size != BATCH * len(found.features):
                raise NoMatchError(f"{name} is a part of {region.root}")
        return region

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a value; raise `NoMatchError` if its shape depends on data."""
        self.trace.shape(name)
        return self.trace.values[name].dtype
