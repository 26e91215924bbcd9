"""Measure what a region of nodes does to the features of a row, instead of recognising how it is spelled.

Between two fused operations lie views, cuts into heads, scalings and rotations by position. Exporters and models spell them in
dozens of ways. But all are linear in the features, and what they do can be read from their results for a few inputs.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from accel.engine.nodes import Node
from accel.engine.planning.trace import BATCH, META, NoMatchError, Trace
from accel.engine.registry import MICROSOFT

VIEWS = {
    ("", name)
    for name in (
        "Concat", "Expand", "Flatten", "Gather", "GatherND", "Identity", "Reshape", "Slice", "Split", "Squeeze",
        "Tile", "Transpose", "Unsqueeze", "Cast",
    )
}  # fmt: skip
LINEAR = VIEWS | {("", name) for name in ("Add", "Div", "Mul", "Neg", "Sub")} | {(MICROSOFT, "RotaryEmbedding")}
RMS_NORM, LAYER_NORM = ("", "SimplifiedLayerNormalization"), ("", "LayerNormalization")
NORMS = {RMS_NORM, LAYER_NORM}


@dataclass
class Region:
    """The nodes between a root, which holds a row's features, and a value computed from it.

    Attributes:
        root: The value that the region begins at.
        target: The value that it ends at.
        nodes: Its nodes, in order.
        sides: Values that its nodes read beside the root, and that follow from positions: cosines and sines.
        norms: Those of its nodes that normalise heads. The map is measured without them.
    """

    root: str
    target: str
    nodes: list[Node]
    sides: list[str] = field(default_factory=list)
    norms: list[Node] = field(default_factory=list)


def find_region(
    trace: Trace, target: str, hidden: Iterable[str], kinds: set[tuple[str, str]] = VIEWS, with_norms: bool = False
) -> Region:
    """Return the largest region of nodes of `kinds` that ends at `target` and begins at one value.

    Args:
        trace: The traced graph.
        target: The value.
        hidden: Values that depend on the hidden state. Others are constants or follow from positions.
        kinds: Operators of the region's nodes.
        with_norms: Norms belong to the region as well.

    Raises:
        NoMatchError: It begins at several values.
    """
    hidden = set(hidden)
    allowed = kinds | NORMS if with_norms else kinds
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
            continue
        if node is None or node.kind not in allowed or not _is_linear(node, trace, hidden):
            roots[name] = None
            continue
        if id(node) not in nodes:
            nodes[id(node)] = node
            pending += [value for index, value in enumerate(node.inputs) if index not in node.operator.host]
    if len(roots) != 1:
        raise NoMatchError(f"{target} is computed from {', '.join(roots) or 'no hidden state'}, expected one value")
    order = {id(node): index for index, node in enumerate(trace.graph.nodes)}
    ordered = sorted(nodes.values(), key=lambda node: order[id(node)])
    norms = [node for node in ordered if node.kind in NORMS]
    return Region(next(iter(roots)), target, ordered, list(sides), norms)


def _is_linear(node: Node, trace: Trace, hidden: set[str]) -> bool:
    """Return whether a node of a region is linear in the hidden state, and adds nothing to it."""
    name = node.kind[1]
    inputs = [value for value in node.inputs if value]
    if name in ("Add", "Sub"):
        return all(value in hidden for value in inputs)
    if name in ("Mul", "Div"):
        if name == "Div" and inputs[1] in hidden:
            return False
        others = [value for value in inputs if value not in hidden]
        return len(others) == 1 and not (trace.is_weight(others[0]) and trace.scalar(others[0]) is None)
    if name == "Concat":
        return all(value in hidden for value in inputs)
    return inputs[0] in hidden and not hidden.intersection(inputs[1:])


def evaluate(region: Region, trace: Trace, root: Tensor, sides: Mapping[str, Tensor]) -> Tensor:
    """Return the target's value for a value of the root, in FP64 and with norms left out.

    Args:
        region: The region.
        trace: The traced graph.
        root: Value of the root, in its shape in the trace.
        sides: Value of every side, in its shape.
    """
    values = {region.root: root, **sides}
    for node in region.nodes:
        if node.kind in NORMS or node.kind == ("", "Cast"):
            values[node.outputs[0]] = values[node.inputs[0]]
            continue
        inputs = [None if not name else values[name] if name in values else _known(trace, name) for name in node.inputs]
        results = node.operator.function(*inputs, **node.attributes)
        results = results if isinstance(results, tuple) else (results,)
        values.update({name: result for name, result in zip(node.outputs, results, strict=False) if name})
    return values[region.target]


def _known(trace: Trace, name: str) -> Tensor:
    """Return a constant, in FP64 if it is a floating-point number."""
    value = trace.constant(name)
    if value is None:
        raise NoMatchError(f"{name} is not known before the step runs")
    return value.double() if value.is_floating_point() else value


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
        raise NoMatchError(f"{region.root} of shape {shape} has no batch axis first")
    ones = evaluate(region, trace, torch.ones(shape, dtype=torch.float64), sides or {}).reshape(-1)
    scale = float(ones[0])
    if not torch.equal(ones, torch.full_like(ones, scale)) or scale == 0 or ones.numel() % BATCH:
        raise NoMatchError(f"{region.target} is not {region.root} times one factor")
    size = torch.Size(shape).numel()
    numbered = torch.arange(1, size + 1, dtype=torch.float64).reshape(shape)
    found = evaluate(region, trace, numbered, sides or {}).reshape(BATCH, -1) / scale
    index = found.round().long() - 1
    rows = torch.arange(BATCH)[:, None] * (size // BATCH)
    if (found - found.round()).abs().max() > 1e-6 or not torch.equal(index - rows, (index - rows)[:1].expand_as(index)):
        raise NoMatchError(f"{region.target} mixes features of {region.root}, or rows of the batch")
    return FeatureMap((index - rows)[0], scale)


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

    Raises:
        NoMatchError: It does something else.
    """
    if len(region.sides) != 2:
        raise NoMatchError(
            f"{region.target} depends on {', '.join(region.sides) or 'no positions'}, expected two values"
        )
    for cos, sin in (region.sides, region.sides[::-1]):
        try:
            return _rotation(region, trace, cos, sin)
        except NoMatchError as error:
            reason = error
    raise reason


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
    sources = (measured(numbered, zeros[cos], ones[sin]) * signs).long() - 1
    cosines = _index(measured(root, _numbered(trace, cos), zeros[sin]), rotated)
    sines = _index(measured(root, zeros[cos], _numbered(trace, sin)) * signs, rotated)
    partners = torch.where(rotated, sources, -1)
    return features, Rotation(cos, sin, cosines, sines, partners, signs)


def _numbered(trace: Trace, name: str) -> Tensor:
    """Return the numbers 1, 2, ... in the shape of a value with one row of numbers for each row of the batch, or for all."""
    shape = trace.shape(name)
    return torch.arange(1, torch.Size(shape).numel() + 1, dtype=torch.float64).reshape(shape)


def _index(numbers: Tensor, rotated: Tensor) -> Tensor:
    """Return measured numbers as indices from 0; -1 where nothing is rotated."""
    return torch.where(rotated, numbers.round().long() - 1, -1)


def hidden_values(trace: Trace, sources: Iterable[str]) -> set[str]:
    """Return the values that depend on any of `sources`, themselves included."""
    hidden = set(sources)
    for node in trace.graph.nodes:
        if hidden.intersection(node.inputs):
            hidden.update(
                name for name in node.outputs if name not in trace.values or trace.values[name].device == META
            )
    return hidden
