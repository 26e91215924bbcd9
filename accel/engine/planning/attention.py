"""Pattern: attention of one token over a cache, from the rows of queries, keys and values to the heads' outputs."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from accel.engine.nodes import Node
from accel.engine.operations.attention import Attention, Bias
from accel.engine.planning.heads import Cut, match_heads
from accel.engine.planning.linear_maps import RESHAPES, evaluate, find_region, is_float_cast
from accel.engine.planning.patterns import Fused, Matcher
from accel.engine.planning.trace import BATCH, NoMatchError
from accel.engine.registry import MICROSOFT

SOFTMAX, FUSED = ("", "Softmax"), (MICROSOFT, "MultiHeadAttention")
WRITE = ("", "TensorScatter")


@dataclass
class Scores:
    """softmax(softcap(scale * query keys.T) + biases) @ values, as names of values.

    Attributes:
        query: Queries [..., D].
        keys: Keys [..., S, D], or [..., D, S] where `transposed`.
        values: Values [..., S, D].
        output: The result.
        transposed: See `keys`.
        scale: Factor of the products.
        softcap: See `Attention`.
        biases: What is added to the scores: name, factor, and the shape of the scores there.
        nodes: The nodes.
    """

    query: str
    keys: str
    values: str
    output: str
    transposed: bool
    scale: float = 1.0
    softcap: float = 0.0
    biases: list[tuple[str, float, tuple[int, ...]]] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)


@dataclass(frozen=True)
class Cache:
    """A cache that keys or values are views of.

    Attributes:
        name: Value that holds it, [B, KV, S, D].
        past: The same before the new entry is written, and None if none is written.
        write: The node that writes it, or None.
        matrices: Number b * KV + head of the matrix of the cache that each matrix of keys or values is.
    """

    name: str
    past: str | None
    write: Node | None
    matrices: Tensor


def match_attention(matcher: Matcher, node: Node) -> Fused:
    """Match the attention around a `Softmax` or a `MultiHeadAttention`.

    Raises:
        NoMatchError: It is none that the operation computes.
    """
    trace = matcher.trace
    scores = _fused(matcher, node) if node.kind == FUSED else _spelled(matcher, node)
    keys = _cache(matcher, scores.keys, scores.transposed)
    values = _cache(matcher, scores.values, transposed=False)
    shape = trace.shape(keys.name)
    if trace.shape(values.name) != shape:
        raise NoMatchError(f"{keys.name} and {values.name} are caches of different shapes")
    _, kv_heads, length, size = shape
    query = match_heads(matcher, scores.query, size, with_norm=True)
    count = query.heads.count
    if count % kv_heads:
        raise NoMatchError(f"{count} query heads are no multiple of {kv_heads} heads of the cache")
    _check_shared(trace.shape(scores.query)[:-1], node, keys, count, kv_heads)
    _check_shared(trace.shape(scores.query)[:-1], node, values, count, kv_heads)
    new = _new_entry(matcher, keys, values, query, size)
    inputs, cuts = [query.row], [query]
    if new is None:
        inputs += [keys.name, values.name]
    else:
        key, value, position = new
        cuts += [key, value]
        inputs += [key.row, value.row, position, keys.past or "", values.past or ""]
    inputs += [cut.weight for cut in cuts if cut.weight]
    inputs += query.rotation[1:] if query.rotation else ()
    inputs += [name for name, _, _ in scores.biases]
    spec = Attention(
        query.heads,
        new[0].heads if new else None,
        new[1].heads if new else None,
        kv_heads,
        query.rotation[0] if query.rotation else None,
        scores.scale,
        scores.softcap,
        tuple(_bias(matcher, *bias, (BATCH, count, length)) for bias in scores.biases),
        trace.dtype(scores.output),
    )
    written = [cache.name for cache in (keys, values) if new]
    writes = [cache.write for cache in (keys, values) if new and cache.write]
    name = "attention" if new else "cross attention"
    return Fused(name, spec, inputs, [scores.output, *written], [*scores.nodes, *writes])


def _new_entry(matcher: Matcher, keys: Cache, values: Cache, query: Cut, size: int) -> tuple[Cut, Cut, str] | None:
    """Return the new key and value, and the position to write them to; None if the caches are read as they are.

    Raises:
        NoMatchError: The operation does not write them so.
    """
    trace = matcher.trace
    writes = [cache.write for cache in (keys, values)]
    if writes[0] is None or writes[1] is None or not all(matcher.is_free(write) for write in writes if write):
        return None
    position = writes[0].inputs[2] if len(writes[0].inputs) > 2 else ""
    if not position or writes[1].inputs[2:] != (position,) or trace.shape(position) != (BATCH,):
        raise NoMatchError(f"{keys.name} and {values.name} are not written at the same position of a row")
    key = match_heads(matcher, writes[0].inputs[1], size, with_norm=True)
    value = match_heads(matcher, writes[1].inputs[1], size, with_norm=False)
    heads = trace.shape(keys.name)[1]
    if (key.heads.count, value.heads.count) != (heads, heads):
        raise NoMatchError(f"{key.heads.count} and {value.heads.count} heads are written to caches of {heads}")
    if value.rotation is not None or key.rotation != query.rotation:
        raise NoMatchError("queries and keys are rotated differently, or values are rotated")
    return key, value, position


def _fused(matcher: Matcher, node: Node) -> Scores:
    """Read a `MultiHeadAttention`."""
    query, keys, values, *rest = node.inputs
    if any(rest[:2]) or len(rest) > 3:
        raise NoMatchError(f"{node.name} has a bias of its own, a padding mask or past keys")
    trace, heads = matcher.trace, node.attributes["num_heads"]
    batch, tokens, width = trace.shape(query)
    if tokens != 1 or len(trace.shape(keys)) != 4:
        raise NoMatchError(f"{node.name} is of {tokens} tokens, or its keys are not cut into heads")
    scale = node.attributes.get("scale", 0.0) or (width // heads) ** -0.5
    shape: tuple[int, ...] = (batch, heads, 1, trace.shape(keys)[2])
    biases = [(name, 1.0, shape) for name in rest[2:] if name]
    return Scores(query, keys, values, node.outputs[0], False, scale, biases=biases, nodes=[node])


def _spelled(matcher: Matcher, softmax: Node) -> Scores:
    """Read products, a softmax between them, and what is added to the scores."""
    trace, hidden = matcher.trace, matcher.hidden
    shape = trace.shape(softmax.inputs[0])
    if softmax.attributes.get("axis", -1) not in (-1, len(shape) - 1):
        raise NoMatchError(f"{softmax.name} is not over the keys")
    last, after = _next_product(matcher, softmax.outputs[0])
    scores = Scores("", "", last.inputs[1], last.outputs[0], True, nodes=[softmax, *after, last])
    value, factor = softmax.inputs[0], 1.0
    while True:
        node = trace.producer.get(value)
        if node is None or trace.shape(value)[-1] != shape[-1] or value not in hidden:
            raise NoMatchError(f"{value} holds no scores of queries and keys")
        scores.nodes.append(node)
        scaled = trace.scaled(node)
        if node.kind == ("", "Add"):
            biases = [name for name in node.inputs if name not in hidden]
            if len(biases) != 1 or scores.softcap:
                raise NoMatchError(f"{node.name} adds no bias of the positions, or before the soft cap")
            scores.biases.append((biases[0], factor, trace.shape(value)))
            value = node.inputs[0] if node.inputs[1] == biases[0] else node.inputs[1]
        elif scaled is not None:
            value, factor = scaled[0], factor * scaled[1]
        elif node.kind == ("", "Tanh") and not scores.softcap:
            scores.softcap, factor, value = factor, 1.0, node.inputs[0]
        elif is_float_cast(node) or node.kind in RESHAPES:
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
    """Return the product of the probabilities with the values, and the nodes before it that only change the shape."""
    trace = matcher.trace
    length = trace.shape(value)[-1]
    nodes: list[Node] = []
    while (node := trace.only_consumer(value)) is not None and trace.shape(value)[-1] == length:
        if node.kind == ("", "MatMul") and node.inputs[0] == value:
            return node, nodes
        if not is_float_cast(node) and node.kind not in RESHAPES:
            break
        nodes.append(node)
        value = node.outputs[0]
    raise NoMatchError(f"{value} is not multiplied with values alone")


def _cache(matcher: Matcher, name: str, transposed: bool) -> Cache:
    """Return the cache [B, KV, S, D] that keys or values are a view of.

    Args:
        matcher: The state.
        name: Keys or values of every query head: [..., S, D].
        transposed: They are [..., D, S].

    Raises:
        NoMatchError: They are no view of one, or heads are not shared by consecutive query heads.
    """
    trace = matcher.trace
    region = find_region(trace, name, matcher.hidden)
    node, shape = trace.producer.get(region.root), trace.shape(region.root)
    if len(shape) != 4 or shape[0] != BATCH:
        raise NoMatchError(f"{region.root} of shape {list(shape)} is no cache")
    past = None
    if node is not None and node.kind == WRITE:
        past = node.inputs[0]
        axis, mode = node.attributes.get("axis", -2), node.attributes.get("mode", "linear")
        if axis % 4 != 2 or mode not in ("linear", "circular") or trace.shape(node.inputs[1])[2] != 1:
            raise NoMatchError(f"{node.name} does not write one entry along the third axis")
    if (past or region.root) not in trace.graph.inputs:
        raise NoMatchError(f"{name} is no view of a cache")
    numbered = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
    found = evaluate(region, trace, numbered, {})
    found = found.mT if transposed else found
    repeats = found.numel() // numbered.numel()
    matrices = torch.arange(BATCH * shape[1]).repeat_interleave(repeats)
    if found.shape[-2:] != shape[2:] or not torch.equal(
        found.reshape(-1, *shape[2:]), numbered.flatten(0, 1)[matrices]
    ):
        raise NoMatchError(f"{name} is not {region.root} with every head repeated")
    return Cache(region.root, past, node if past else None, matrices.reshape(found.shape[:-2]))


def _check_shared(queries: tuple[int, ...], node: Node, cache: Cache, heads: int, kv_heads: int) -> None:
    """Raise `NoMatchError` if consecutive query heads don't share one head of the cache.

    Args:
        queries: Shape of the query heads, [..., number of queries that a product multiplies with the same matrix].
        node: The `Softmax` or `MultiHeadAttention`.
        cache: The cache.
        heads: Number of query heads.
        kv_heads: Number of heads of the cache.
    """
    numbers = torch.arange(BATCH * heads)
    if node.kind == FUSED:
        numbers, matrices = numbers.reshape(BATCH, heads), cache.matrices
        if heads != node.attributes["num_heads"]:
            raise NoMatchError(f"{node.name} has heads of another size than its cache")
    else:
        numbers, matrices = numbers.reshape(queries), cache.matrices[..., None]
    try:
        numbers, matrices = torch.broadcast_tensors(numbers, matrices)
    except RuntimeError as error:
        raise NoMatchError(f"{node.name}: {error}") from error
    expected = numbers // heads * kv_heads + numbers % heads // (heads // kv_heads)
    if numbers.numel() != BATCH * heads or not torch.equal(matrices, expected):
        raise NoMatchError(f"{node.name}: heads of {cache.name} are not shared by consecutive query heads")


def _bias(matcher: Matcher, name: str, scale: float, scores: tuple[int, ...], shape: tuple[int, int, int]) -> Bias:
    """Return how a bias broadcasts to scores.

    Args:
        matcher: The state.
        name: The bias.
        scale: Its factor.
        scores: Shape of the scores that it is added to.
        shape: The same as [B, H, S].

    Raises:
        NoMatchError: It has several numbers for a score, or none for some.
    """
    size = torch.Size(matcher.trace.shape(name)).numel()
    numbered = torch.arange(size).reshape(matcher.trace.shape(name))
    if torch.Size(torch.broadcast_shapes(numbered.shape, scores)).numel() == torch.Size(shape).numel():
        added = numbered.expand(scores).reshape(shape)
        for batched in (False, True):
            for per_head in (False, True):
                lengths = (shape[0] if batched else 1, shape[1] if per_head else 1, shape[2])
                if size == torch.Size(lengths).numel() and torch.equal(numbered.reshape(lengths).expand(shape), added):
                    return Bias(batched, per_head, scale)
    raise NoMatchError(f"the bias {name} of shape {list(numbered.shape)} does not broadcast to scores {list(shape)}")
