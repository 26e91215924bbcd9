"""Recognise an activation by its values, however its nodes spell it."""

from collections import Counter
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from accel.engine.nodes import Node
from accel.engine.operations.activations import ACTIVATIONS, Activation
from accel.engine.planning.linear_maps import is_float_cast
from accel.engine.planning.trace import NoMatchError, Trace
from accel.engine.registry import MICROSOFT

ELEMENTWISE = {
    *(("", name) for name in ("Add", "Cast", "Div", "Gelu", "Mul", "Neg", "Pow", "Relu", "Sigmoid", "Sub", "Tanh")),
    (MICROSOFT, "QuickGelu"),
}
POINTS = torch.cat([torch.linspace(-12, 12, 481, dtype=torch.float64), torch.tensor([-1e6, 1e6], dtype=torch.float64)])
TOLERANCE = 1e-5
ROUNDED_TOLERANCE = 1e-4  # where constants are rounded to 16 bits; the variants of GELU are 5e-4 apart


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
    values, nodes = {source}, _followers(trace, source)
    values.update(node.outputs[0] for node in nodes)
    while nodes:
        reads = Counter(name for node in nodes for name in node.inputs)
        exits = [name for name in values if trace.uses[name] != reads[name] or not reads[name]]
        if len(exits) == 1 and exits[0] != source:
            found = _named(_values(trace, source, nodes, exits[0]), _tolerance(trace, nodes))
            if found is not None:
                return Elementwise(exits[0], tuple(nodes), found)
        values.discard(nodes.pop().outputs[0])  # what follows the activation may be elementwise, too
    raise NoMatchError(f"no known activation reads {source}")


def _followers(trace: Trace, source: str) -> list[Node]:
    """Return the nodes that compute one number of each of `source`, in order."""
    values, found = {source}, dict[int, Node]()
    pending = [(trace.order[id(node)], node) for node in trace.consumers[source]]
    while pending:  # in the graph's order, so that a node's other inputs are known by then
        index, node = min(pending, key=lambda pair: pair[0])
        pending = [pair for pair in pending if pair[0] != index]
        inputs = [name for name in node.inputs if name]
        is_cast = node.kind == ("", "Cast")
        if node.kind not in ELEMENTWISE or (is_cast and not is_float_cast(node)):
            continue
        if all(name in values or trace.scalar(name) is not None for name in inputs):
            found[index] = node
            values.add(node.outputs[0])
            pending += [(trace.order[id(each)], each) for each in trace.consumers[node.outputs[0]]]
    return [found[index] for index in sorted(found)]


def _tolerance(trace: Trace, nodes: list[Node]) -> float:
    """Return the tolerance for values of nodes, by the precision of their constants."""
    constants = [trace.constant(name) for node in nodes for name in node.inputs]
    rounded = any(value is not None and value.dtype in (torch.float16, torch.bfloat16) for value in constants)
    return ROUNDED_TOLERANCE if rounded else TOLERANCE


def _values(trace: Trace, source: str, nodes: list[Node], target: str) -> Tensor:
    """Return what the nodes make of `POINTS`."""
    values = {source: POINTS}
    for node in nodes:
        if node.kind == ("", "Cast"):
            values[node.outputs[0]] = values[node.inputs[0]]
            continue
        inputs: list[Tensor | None] = []
        for name in node.inputs:
            known = values[name] if name in values else trace.constant(name)
            inputs.append(known.double() if known is not None and known.is_floating_point() else known)
        result = node.operator.function(*inputs, **node.attributes)
        if isinstance(result, Tensor):
            values[node.outputs[0]] = result
    return values[target]


def _named(values: Tensor, tolerance: float) -> Activation | None:
    """Return the activation whose values these are."""
    candidates = [Activation(name) for name in ACTIVATIONS if name not in ("none", "softcap")]
    limit = float(values[-1])
    if isfinite(limit) and limit > 0:
        candidates.append(Activation("softcap", limit))
    for candidate in candidates:
        expected = candidate(POINTS)
        if (
            values.shape == expected.shape
            and ((expected - values).abs() <= tolerance * expected.abs().clamp(min=1)).all()
        ):
            return candidate
    return None
