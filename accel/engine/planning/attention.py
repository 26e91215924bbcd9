"""Pattern: attention of one token over a cache, from the rows that hold queries, keys and values to the heads' outputs."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from accel.engine.nodes import Node
from accel.engine.operations.attention import ANGLES, Attention, Bias, Heads, Rotary
from accel.engine.operations.normalize import Norm
from accel.engine.planning.linear_maps import (
    LINEAR,
    RMS_NORM,
    VIEWS,
    Region,
    Rotation,
    evaluate,
    feature_map,
    find_region,
    rotation,
)
from accel.engine.planning.patterns import Fused, Matcher
from accel.engine.planning.trace import BATCH, NoMatchError
from accel.engine.registry import MICROSOFT

SOFTMAX, FUSED = ("", "Softmax"), (MICROSOFT, "MultiHeadAttention")
WRITES = {("", "TensorScatter")}


@dataclass
class Scores:
    """softmax(softcap(scale * query keys.T) + biases) @ values, as names of values."""

    query: str
    keys: str
    values: str
    output: str
    scale: float = 1.0
    softcap: float = 0.0
    biases: dict[str, float] = field(default_factory=dict)  # value -> factor
    nodes: list[Node] = field(default_factory=list)


@dataclass
class Cut:
    """Heads that are cut from a row: the row, how, by which rotation, with which weight of a norm, and by which nodes."""

    row: str
    heads: Heads
    rotation: tuple[Rotary, str, str] | None
    weight: str | None
    nodes: list[Node]


def match_attention(matcher: Matcher, node: Node) -> Fused:
    """Match the attention around a `Softmax` or a `MultiHeadAttention`.

    Raises:
        NoMatchError: It is none that the operation computes.
    """
    scores = _fused(matcher, node) if node.kind == FUSED else _spelled(matcher, node)
    keys = _cache(matcher, scores.keys, transposed=node.kind == SOFTMAX)
    values = _cache(matcher, scores.values, transposed=False)
    _, kv_heads, _, size = matcher.trace.shape(keys[0])
    query = _cut(matcher, scores.query, size)
    heads = query.heads
    if heads.count % kv_heads:
        raise NoMatchError(f"{heads.count} query heads are no multiple of {kv_heads} heads of the cache")
    nodes = [*scores.nodes, *query.nodes]
    inputs, weights = [query.row], [query.weight] if query.weight else []
    key = value = None
    if keys[1] is not None and values[1] is not None:
        key, value = _cut(matcher, keys[1].inputs[1], size), _cut(matcher, values[1].inputs[1], size)
        if keys[1].inputs[2] != values[1].inputs[2] or value.rotation is not None:
            raise NoMatchError("keys and values are written at different positions, or values are rotated")
        if key.rotation != query.rotation:
            raise NoMatchError("queries and keys are rotated differently")
        inputs += [key.row, value.row, keys[1].inputs[2]]
        weights += [each.weight for each in (key, value) if each.weight]
        nodes += [keys[1], values[1], *key.nodes, *value.nodes]
    inputs += [keys[0], values[0], *weights]
    rotary = None
    if query.rotation is not None:
        rotary = query.rotation[0]
        inputs += query.rotation[1:]
    inputs += scores.biases
    biases = tuple(_bias(matcher, name, heads.count, factor) for name, factor in scores.biases.items())
    spec = Attention(
        heads,
        key.heads if key else None,
        value.heads if value else None,
        kv_heads,
        rotary,
        scores.scale,
        scores.softcap,
        biases,
        matcher.dtype(scores.output),
    )
    written = [each[1].outputs[0] for each in (keys, values) if each[1] is not None]
    return Fused("attention" if key else "cross attention", spec, inputs, [scores.output, *written], nodes)


def _fused(matcher: Matcher, node: Node) -> Scores:
    """Read a `MultiHeadAttention`."""
    query, keys, values, *rest = node.inputs
    if any(rest[:2]) or len(rest) > 3:
        raise NoMatchError(f"{node.name} has a bias of its own, a padding mask or past keys")
    size = matcher.trace.shape(node.inputs[0])[-1] // node.attributes["num_heads"]
    scale = node.attributes.get("scale", 0.0) or size**-0.5
    return Scores(
        query, keys, values, node.outputs[0], scale, biases=dict.fromkeys(filter(None, rest[2:]), 1.0), nodes=[node]
    )


def _spelled(matcher: Matcher, softmax: Node) -> Scores:
    """Read products, a softmax between them, and what is added to the scores."""
    trace, hidden = matcher.trace, matcher.hidden
    if softmax.attributes.get("axis", -1) not in (-1, len(trace.shape(softmax.inputs[0])) - 1):
        raise NoMatchError(f"{softmax.name} is not over the keys")
    last, after = _next_product(matcher, softmax.outputs[0])
    scores = Scores("", "", last.inputs[1], last.outputs[0], nodes=[softmax, *after, last])
    value, factor = softmax.inputs[0], 1.0
    while True:
        node = trace.producer.get(value)
        if node is None:
            raise NoMatchError(f"{value} is no product of queries and keys")
        scores.nodes.append(node)
        if node.kind == ("", "Add"):
            biases = [name for name in node.inputs if name not in hidden]
            if len(biases) != 1 or scores.softcap:
                raise NoMatchError(f"{node.name} adds no bias of the positions")
            scores.biases[biases[0]] = factor
            value = node.inputs[0] if node.inputs[1] == biases[0] else node.inputs[1]
        elif node.kind in (("", "Mul"), ("", "Div")) and trace.scalar(node.inputs[1]):
            number = trace.scalar(node.inputs[1]) or 1.0
            factor *= number if node.kind[1] == "Mul" else 1 / number
            value = node.inputs[0]
        elif node.kind == ("", "Tanh") and not scores.softcap:
            scores.softcap, factor, value = factor, 1.0, node.inputs[0]
        elif node.kind in (("", "Cast"), ("", "Reshape"), ("", "Unsqueeze"), ("", "Squeeze")):
            value = node.inputs[0]
        elif node.kind == ("", "MatMul"):
            scores.query, scores.keys = node.inputs
            break
        else:
            raise NoMatchError(f"{node.name} lies between the softmax and the product of queries and keys")
    # c * tanh(scale / c * product): the scale before the tanh is relative to c
    scores.scale = factor * (scores.softcap or 1.0)
    return scores


def _next_product(matcher: Matcher, value: str) -> tuple[Node, list[Node]]:
    """Return the product of the probabilities with the values, and the views before it."""
    views: list[Node] = []
    while (node := matcher.trace.only_consumer(value)) is not None:
        if node.kind == ("", "MatMul") and node.inputs[0] == value:
            return node, views
        if node.kind not in VIEWS:
            break
        views.append(node)
        value = node.outputs[0]
    raise NoMatchError(f"{value} is not multiplied with values alone")


def _cache(matcher: Matcher, name: str, transposed: bool) -> tuple[str, Node | None]:
    """Return the cache [B, KV, S, D] that keys or values are a view of, and the node that writes to it.

    Args:
        matcher: The state.
        name: Keys or values of every query head: [B, H, S, D], its first axes also as one.
        transposed: They are [B, H, D, S].

    Raises:
        NoMatchError: They are no view of one, or heads are not shared by consecutive query heads.
    """
    trace = matcher.trace
    region = find_region(trace, name, matcher.hidden)
    node, shape = trace.producer.get(region.root), trace.shape(region.root)
    cache = region.root
    if node is not None and node.kind in WRITES and len(shape) == 4:
        if node.attributes.get("axis", -2) % 4 != 2 or node.attributes.get("mode", "linear") != "linear":
            raise NoMatchError(f"{node.name} writes along another axis than the third")
        cache = node.inputs[0]
    if cache not in trace.graph.inputs or len(shape) != 4:
        raise NoMatchError(f"{name} is no view of a cache")
    numbered = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
    found = evaluate(region, trace, numbered, {})
    repeats = found.numel() // numbered.numel()
    if transposed:
        found = found.mT
    if not repeats or not torch.equal(found.reshape(-1), numbered.repeat_interleave(repeats, 1).reshape(-1)):
        raise NoMatchError(f"{name} is not {cache} with every head repeated")
    return cache, node


def _cut(matcher: Matcher, name: str, size: int) -> Cut:
    """Match how heads are cut from a row, normed and rotated.

    Raises:
        NoMatchError: They are computed in another way.
    """
    trace = matcher.trace
    region = find_region(trace, name, matcher.hidden, LINEAR, with_norms=True)
    features, found = rotation(region, trace) if region.sides else (feature_map(region, trace), None)
    norm, weight = _norm(region)
    index = features.features.reshape(-1, size)
    heads = _heads(index, features.scale, norm)
    rotary = None if found is None else (_rotary(found, index), found.cos, found.sin)
    return Cut(region.root, heads, rotary, weight, region.nodes)


def _norm(region: Region) -> tuple[Norm | None, str | None]:
    """Return the norm of heads in a region, and its weight."""
    if not region.norms:
        return None, None
    (node,) = region.norms if len(region.norms) == 1 else (None,)
    if node is None or node.kind != RMS_NORM:
        raise NoMatchError(f"{region.target} has {len(region.norms)} norms, expected one RMS norm")
    return Norm("rms", node.attributes.get("epsilon", 1e-5)), node.inputs[1]


def _heads(index: Tensor, scale: float, norm: Norm | None) -> Heads:
    """Return the regular cut of features with these indices, int64 [heads, size].

    Raises:
        NoMatchError: They don't lie in groups of equal distances.
    """
    count, size = index.shape
    starts = index[:, 0]
    for per_group in (each for each in range(count, 0, -1) if count % each == 0):
        grouped = starts.reshape(-1, per_group)
        stride = int(grouped[0, 1] - grouped[0, 0]) if per_group > 1 else size
        distance = int(grouped[1, 0] - grouped[0, 0]) if len(grouped) > 1 else stride * per_group
        heads = Heads(int(starts[0]), len(grouped), per_group, distance, stride, size, scale, norm)
        if torch.equal(torch.from_numpy(heads.features()), index):
            return heads
    raise NoMatchError(f"heads begin at features {starts.tolist()}, or their features are not side by side")


def _rotary(found: Rotation, features: Tensor) -> Rotary:
    """Return the rotation of heads with these features, int64 [heads, size].

    Raises:
        NoMatchError: Heads are rotated differently, or not in a known way.
    """
    size = features.shape[1]
    cosines, sines, signs, partners = (
        each.reshape(-1, size) for each in (found.cosines, found.sines, found.signs, found.partners)
    )
    rotated = int((cosines[0] >= 0).sum())
    place = torch.arange(rotated)
    for interleaved in (False, True):
        partner = place ^ 1 if interleaved else (place + rotated // 2) % rotated
        sign = torch.where(place % 2 == 0 if interleaved else place < rotated // 2, -1.0, 1.0).double()
        for angles, at in ANGLES.items():
            expected = torch.tensor([at(i, rotated) for i in range(rotated)])
            pairs = ((cosines, expected), (sines, expected), (partners, features[:, partner]), (signs, sign))
            if all(torch.equal(each[:, :rotated], want.expand(len(each), rotated)) for each, want in pairs):
                return Rotary(rotated, interleaved, angles)
    raise NoMatchError(f"features are rotated with partners {partners[0].tolist()}")


def _bias(matcher: Matcher, name: str, heads: int, scale: float) -> Bias:
    """Return how a bias broadcasts to scores [B, H, 1, S].

    Raises:
        NoMatchError: It doesn't.
    """
    shape = matcher.trace.shape(name)
    lead = shape[:-2] if len(shape) > 1 else ()
    if len(shape) > 1 and shape[-2] != 1:
        raise NoMatchError(f"the bias {name} of shape {list(shape)} has several queries")
    if len(lead) == 1:  # batch and heads as one axis, or heads alone
        if lead[0] in (1, heads, BATCH * heads):
            return Bias(lead[0] == BATCH * heads, lead[0] != 1, scale)
    elif len(lead) == 2 and lead[0] in (1, BATCH) and lead[1] in (1, heads):
        return Bias(lead[0] == BATCH, lead[1] == heads and heads > 1, scale)
    elif not lead:
        return Bias(False, False, scale)
    raise NoMatchError(f"the bias {name} of shape {list(shape)} does not broadcast to {heads} heads")
