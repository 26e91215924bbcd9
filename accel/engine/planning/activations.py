"""Recognise an activation by its values, however its nodes spell it."""

from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from accel.engine.nodes import Node
from accel.engine.operations.activations import ACTIVATIONS, Activation
from accel.engine.planning.trace import NoMatchError, Trace
from accel.engine.registry import MICROSOFT

ELEMENTWISE = {
    ("", name)
    for name in ("Add", "Cast", "Div", "Erf", "Exp", "Gelu", "Mul", "Neg", "Pow", "Relu", "Sigmoid", "Sub", "Tanh")
} | {(MICROSOFT, name) for name in ("FastGelu", "Gelu", "QuickGelu")}
POINTS = torch.cat([torch.linspace(-12, 12, 481, dtype=torch.float64), torch.tensor([-1e6, 1e6], dtype=torch.float64)])
TOLERANCE = 1e-4  # constants of the nodes may be rounded to FP16; the variants of GELU are 5e-4 apart


@dataclass(frozen=True)
class Elementwise:
    """Nodes that compute one number of each of `source`, and nothing else that is read.

    Attributes:
        target: What they compute.
        nodes: The nodes.
        activation: Function of their numbers.
    """

    target: str
    nodes: tuple[Node, ...]
    activation: Activation


def match_activation(trace: Trace, source: str) -> Elementwise:
    """Match the activation that reads `source`.

    Raises:
        NoMatchError: There is none, or not one of `ACTIVATIONS`.
    """
    values, nodes = {source}, list[Node]()
    for node in trace.graph.nodes:
        inputs = [name for name in node.inputs if name]
        if node.kind in ELEMENTWISE and values.intersection(inputs):
            if all(name in values or trace.scalar(name) is not None for name in inputs):
                nodes.append(node)
                values.add(node.outputs[0])
    while nodes:
        read = {name for node in nodes for name in node.inputs}
        exits = [
            name
            for name in values
            if trace.uses[name] != sum(node.inputs.count(name) for node in nodes) or name not in read
        ]
        if len(exits) == 1 and exits[0] != source:
            found = _named(_values(trace, source, nodes, exits[0]))
            if found is not None:
                return Elementwise(exits[0], tuple(nodes), found)
        values.discard(nodes.pop().outputs[0])  # what follows the activation may be elementwise, too
    raise NoMatchError(f"no known activation reads {source}")


def _values(trace: Trace, source: str, nodes: list[Node], target: str) -> Tensor:
    """Return what the nodes make of `POINTS`."""
    values = {source: POINTS}
    for node in nodes:
        inputs = []
        for name in node.inputs:
            known = values[name] if name in values else trace.constant(name)
            inputs.append(known.double() if known is not None and known.is_floating_point() else known)
        values[node.outputs[0]] = (
            inputs[0] if node.kind == ("", "Cast") else node.operator.function(*inputs, **node.attributes)
        )
    return values[target]


def _named(values: Tensor) -> Activation | None:
    """Return the activation whose values these are."""
    candidates = [Activation(name) for name in ACTIVATIONS if name != "softcap"]
    limit = float(values[-1])
    if isfinite(limit) and limit > 0:
        candidates.append(Activation("softcap", limit))
    for candidate in candidates:
        expected = candidate(POINTS)
        if ((expected - values).abs() <= TOLERANCE * expected.abs().clamp(min=1)).all():
            return candidate
    return None
