"""Measure what a region of nodes does to the features of a row, instead of recognising how it is spelled.

Between two fused operations lie views, cuts into heads, scalings and rotations by position. Exporters and models spell
them in dozens of ways. But all are linear in the features, and what they do can be read from their results for a few
inputs. What was read is then compared with the region's result for random numbers. Two polynomials that differ have the
same value there with a probability of zero (https://en.wikipedia.org/wiki/Schwartz-Zippel_lemma), so a region that
computes something else is refused.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from accel.engine.dtypes import DTYPES
from accel.engine.nodes import Node
from accel.engine.planning.trace import BATCH, NoMatchError, Trace
from accel.engine.registry import MICROSOFT

VIEWS = {
    ("", name)
    for name in (
        "Cast", "Concat", "Expand", "Gather", "GatherND", "Reshape", "Slice", "Split", "Squeeze", "Tile", "Transpose",
        "Unsqueeze",
    )
}  # fmt: skip
RESHAPES = {("", name) for name in ("Reshape", "Squeeze", "Unsqueeze")}  # views that keep the elements' order
LINEAR = VIEWS | {("", name) for name in ("Add", "Div", "Mul", "Neg", "Sub")} | {(MICROSOFT, "RotaryEmbedding")}


@dataclass
class Region:
    """The nodes between a root, which holds a row's features, and a value computed from it.

    Attributes:
        root: The value that the region begins at.
        target: The value that it ends at.
        nodes: Its nodes, in order.
        sides: Values that its nodes read beside the root, and that follow from positions: cosines and sines.
    """

    root: str
    target: str
    nodes: list[Node]
    sides: list[str] = field(default_factory=list)


def find_region(trace: Trace, target: str, hidden: Collection[str], kinds: set[tuple[str, str]] = VIEWS) -> Region:
    """Return the largest region of nodes of `kinds` that ends at `target` and begins at one value.

    Args:
        trace: The traced graph.
        target: The value.
        hidden: Values that depend on the hidden state. Others are constants or follow from positions.
        kinds: Operators of the region's nodes.

    Raises:
        NoMatchError: It begins at several values.
    """
    nodes: dict[int, Node] = {}
    roots: dict[str, None] = {}
    sides: dict[str, None] = {}
    pending = [target]
    while pending:
        name = pending.pop()
        node = trace.producer.get(name)
        if name not in hidden:
            if name and trace.constant(name) is None and not trace.is_weight(name):
                sides[name] = None
        elif node is None or node.kind not in kinds or not _is_linear(node, trace, hidden):
            roots[name] = None
        elif id(node) not in nodes:
            nodes[id(node)] = node
            pending += [value for index, value in enumerate(node.inputs) if index not in node.operator.host]
    if len(roots) != 1:
        raise NoMatchError(f"{target} is computed from {', '.join(roots) or 'no hidden state'}, expected one value")
    ordered = sorted(nodes.values(), key=lambda node: trace.order[id(node)])
    return Region(next(iter(roots)), target, ordered, list(sides))


def is_float_cast(node: Node) -> bool:
    """Return whether a node casts floating-point numbers to floating-point numbers."""
    return node.kind == ("", "Cast") and DTYPES[node.attributes["to"]].is_floating_point


def _is_linear(node: Node, trace: Trace, hidden: Collection[str]) -> bool:
    """Return whether a node of a region is linear in the hidden state, and adds nothing to it."""
    name = node.kind[1]
    inputs = [value for value in node.inputs if value]
    if name in ("Add", "Sub", "Concat"):
        return all(value in hidden for value in inputs)
    if name in ("Mul", "Div"):
        if name == "Div" and inputs[1] in hidden:
            return False
        others = [value for value in inputs if value not in hidden]
        return len(others) == 1 and not (trace.is_weight(others[0]) and trace.scalar(others[0]) is None)
    if name == "Cast":
        return is_float_cast(node)
    return inputs[0] in hidden and not any(value in hidden for value in inputs[1:])


def evaluate(region: Region, trace: Trace, root: Tensor, sides: Mapping[str, Tensor]) -> Tensor:
    """Return the target's value for a value of the root, in FP64.

    Args:
        region: The region.
        trace: The traced graph.
        root: Value of the root, in its shape in the trace.
        sides: Value of every side, in its shape.

    Raises:
        NoMatchError: A node reads another value that is known only when the step runs.
    """
    values = {region.root: root, **sides}
    for node in region.nodes:
        if node.kind == ("", "Cast"):
            values[node.outputs[0]] = values[node.inputs[0]]
            continue
        inputs = [None if not name else values[name] if name in values else _known(trace, name) for name in node.inputs]
        results = node.operator.function(*inputs, **node.attributes)
        outputs = zip(node.outputs, results if isinstance(results, tuple) else (results,), strict=False)
        values.update({name: result for name, result in outputs if name and result is not None})
    return values[region.target]


def _known(trace: Trace, name: str) -> Tensor:
    """Return a constant, in FP64 if it is a floating-point number."""
    value = trace.constant(name)
    if value is None:
        raise NoMatchError(f"{name} is not known before the step runs")
    return value.double() if value.is_floating_point() else value


def random_like(trace: Trace, name: str) -> Tensor:
    """Return random numbers in the shape of a value, FP64, for a comparison that only equal maps pass."""
    generator = torch.Generator().manual_seed(len(name))
    return torch.randn(trace.shape(name), dtype=torch.float64, generator=generator)


def is_close(first: Tensor, second: Tensor) -> bool:
    """Return whether two results in FP64 of the same formula are equal but for rounding."""
    return first.shape == second.shape and torch.allclose(first, second, rtol=1e-9, atol=1e-9)


@dataclass(frozen=True)
class FeatureMap:
    """What a region without positions does: element i of a row is `scale` times feature `features[i]`.

    Attributes:
        features: int64 [elements of the target in a row].
        scale: The factor.
    """

    features: Tensor
    scale: float


def feature_map(region: Region, trace: Trace, sides: Mapping[str, Tensor] | None = None) -> FeatureMap:
    """Measure a region in which every element of the target is one feature of the root's same row.

    Raises:
        NoMatchError: It is none.
    """
    shape = trace.shape(region.root)
    if not shape or shape[0] % BATCH:
        raise NoMatchError(f"{region.root} of shape {list(shape)} has no batch axis first")

    def measured(root: Tensor) -> Tensor:
        """Return the target [BATCH, elements]."""
        result = evaluate(region, trace, root, sides or {})
        if result.numel() % BATCH:
            raise NoMatchError(f"{region.target} of shape {list(result.shape)} has no batch axis")
        return result.reshape(BATCH, -1)

    ones = measured(torch.ones(shape, dtype=torch.float64))
    scale = float(ones[0, 0])
    if not torch.equal(ones, torch.full_like(ones, scale)) or scale == 0:
        raise NoMatchError(f"{region.target} is not {region.root} times one factor")
    size = torch.Size(shape).numel()
    numbered = measured(torch.arange(1, size + 1, dtype=torch.float64).reshape(shape)) / scale
    index = (numbered[0].round().long() - 1).clamp(0, size // BATCH - 1)
    root = random_like(trace, region.root)
    if not is_close(measured(root), root.reshape(BATCH, -1)[:, index] * scale):
        raise NoMatchError(f"{region.target} mixes features of {region.root}, or rows of the batch")
    return FeatureMap(index, scale)


@dataclass(frozen=True)
class Rotation:
    """What a region with positions does: element i is x[f(i)] * cos[c(i)] + sign(i) * x[p(i)] * sin[s(i)].

    Attributes:
        cos: The value with cosines, one row of numbers for each row of the batch, or one for all.
        sin: The value with sines.
        cosines: Index c(i) within a row's cosines, int64 [elements]; -1 for an element that is not rotated.
        sines: Index s(i) within a row's sines.
        partners: Feature p(i) that is added, int64 [elements].
        signs: float64 [elements].
    """

    cos: str
    sin: str
    cosines: Tensor
    sines: Tensor
    partners: Tensor
    signs: Tensor


def rotation(region: Region, trace: Trace) -> tuple[FeatureMap, Rotation]:
    """Measure a region that rotates pairs of features by angles that follow from the position.

    What it returns holds for zeros and ones only: the caller compares it for random numbers.

    Raises:
        NoMatchError: It does something else.
    """
    if len(region.sides) != 2:
        raise NoMatchError(
            f"{region.target} depends on {', '.join(region.sides) or 'no positions'}, expected two values"
        )
    reasons = []
    for cos, sin in (region.sides, region.sides[::-1]):
        try:
            return _rotation(region, trace, cos, sin)
        except NoMatchError as error:
            reasons.append(str(error))
    raise NoMatchError("; ".join(reasons))


def _rotation(region: Region, trace: Trace, cos: str, sin: str) -> tuple[FeatureMap, Rotation]:
    """Measure a rotation with known values of cosines and sines."""
    shape = trace.shape(region.root)
    zeros, ones = (
        {name: make(trace.shape(name), dtype=torch.float64) for name in (cos, sin)}
        for make in (torch.zeros, torch.ones)
    )
    features = feature_map(region, trace, {cos: ones[cos], sin: zeros[sin]})
    root = torch.ones(shape, dtype=torch.float64)

    def measured(root: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """Return the first row of the target, without the factor."""
        return evaluate(region, trace, root, {cos: cosines, sin: sines}).reshape(BATCH, -1)[0] / features.scale

    rotated = measured(root, zeros[cos], zeros[sin]) == 0
    signs = measured(root, zeros[cos], ones[sin]) * rotated
    if not rotated.any() or not torch.equal(signs.abs(), rotated.double()):
        raise NoMatchError(f"{region.target} is no rotation by {cos} and {sin}")
    numbered = torch.arange(1, root.numel() + 1, dtype=torch.float64).reshape(shape)
    partners = _index(measured(numbered, zeros[cos], ones[sin]) * signs, rotated)
    cosines = _index(measured(root, _numbered(trace, cos), zeros[sin]), rotated)
    sines = _index(measured(root, zeros[cos], _numbered(trace, sin)) * signs, rotated)
    return features, Rotation(cos, sin, cosines, sines, partners, signs)


def _numbered(trace: Trace, name: str) -> Tensor:
    """Return the numbers 1, 2, ... in the shape of a value."""
    shape = trace.shape(name)
    return torch.arange(1, torch.Size(shape).numel() + 1, dtype=torch.float64).reshape(shape)


def _index(numbers: Tensor, rotated: Tensor) -> Tensor:
    """Return measured numbers as indices from 0; -1 where nothing is rotated."""
    return torch.where(rotated, numbers.round().long() - 1, -1)


def hidden_values(trace: Trace, sources: Collection[str]) -> set[str]:
    """Return the values that depend on any of `sources`, themselves included."""
    hidden = set(sources)
    for node in trace.graph.nodes:
        if not hidden.isdisjoint(node.inputs):
            hidden.update(name for name in node.outputs if name not in trace.known)
    return hidden
