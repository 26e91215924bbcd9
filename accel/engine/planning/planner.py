"""Plan a static decode graph: replace what patterns match by fused operations, and leave the rest to the executor."""

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from accel.engine.nodes import Graph, Node, classify
from accel.engine.operations.attention import attention
from accel.engine.operations.normalize import Norm, Normalize, normalize
from accel.engine.operations.product import product
from accel.engine.planning.attention import FUSED, SOFTMAX, match_attention
from accel.engine.planning.linear_maps import NORMS, RMS_NORM
from accel.engine.planning.patterns import Fused, Matcher
from accel.engine.planning.products import Draft, extend, fuse, gate, halves, match_product, weight_of
from accel.engine.planning.trace import BATCH, NoMatchError, Trace
from accel.engine.registry import MICROSOFT, OPERATORS, Operator

DOMAIN = "accel.engine"
OPERATIONS = {
    "product": Operator(product, frozenset(), False, {}),
    "normalize": Operator(normalize, frozenset(), False, {}),
    "attention": Operator(attention, frozenset(), False, {4: 1, 5: 2}),
    "cross attention": Operator(attention, frozenset(), False, {}),
}
SKIP_NORMS = {
    (MICROSOFT, "SkipSimplifiedLayerNormalization"): ("", "SimplifiedLayerNormalization"),
    (MICROSOFT, "SkipLayerNormalization"): ("", "LayerNormalization"),
}
Shapes = Mapping[str, tuple[int | str | None, ...]]


@dataclass(frozen=True)
class Plan:
    """A graph of fused operations and the nodes that none replaces.

    Attributes:
        graph: The graph, for the executor.
        trace: The shapes of its values, for an example.
        misses: Node that looked like the centre of an operation -> why it is none.
    """

    graph: Graph
    trace: Trace
    misses: Mapping[str, str]


def plan(graph: Graph, shapes: Shapes, batch: str, fixed: Mapping[str, torch.Tensor]) -> Plan:
    """Plan a static decode graph.

    Args:
        graph: The graph.
        shapes: Input -> lengths or symbols of its axes.
        batch: Symbol of the batch axis.
        fixed: Inputs that have the same value at every step, and that value.

    Raises:
        AccelError: A node can't be traced.
    """
    inputs = {name: dtype for name, dtype in graph.inputs.items() if name not in fixed}
    nodes = [part for node in graph.nodes for part in _without_skip(node, graph)]
    graph = classify(replace(graph, nodes=nodes, inputs=inputs, constants={**graph.constants, **fixed}))
    trace = Trace(graph, shapes, batch)
    sources = [name for name, dtype in inputs.items() if dtype.is_floating_point or name == "input_ids"]
    matcher = Matcher(trace, sources)
    fused = [*_attentions(matcher), *_products(matcher)]
    fused += _norms(matcher)
    rest = [node for node in nodes if matcher.is_free(node)]
    ordered = _ordered([*rest, *map(_node, fused)], graph)
    return Plan(classify(replace(graph, nodes=_reshaped(ordered, trace))), trace, matcher.misses)


def _without_skip(node: Node, graph: Graph) -> list[Node]:
    """Return a norm of a sum as additions and a norm; any other node alone."""
    kind = SKIP_NORMS.get(node.kind)
    if kind is None:
        return [node]
    x, skip, scale, *rest = (*node.inputs, "", "")[:5]
    beta, bias = (rest[0], rest[1]) if kind[1] == "LayerNormalization" else ("", rest[0])
    total = node.outputs[3] if len(node.outputs) > 3 and node.outputs[3] else f"{node.outputs[0]}.sum"
    add = OPERATORS["", "Add"]
    parts = []
    if bias:
        products = {
            output
            for other in graph.nodes
            if other.kind[1] in ("MatMul", "FusedMatMul", "Gemm")
            for output in other.outputs
        }
        if skip in products and x not in products:
            x, skip = skip, x
        parts.append(Node(f"{node.name} bias", ("", "Add"), add, {}, (x, bias), (f"{total}.biased",)))
        x = f"{total}.biased"
    parts.append(Node(f"{node.name} sum", ("", "Add"), add, {}, (x, skip), (total,)))
    inputs = (total, scale, beta) if beta else (total, scale)
    attributes = {"epsilon": node.attributes.get("epsilon", 1e-5)}
    parts.append(Node(node.name, kind, OPERATORS[kind], attributes, inputs, node.outputs[:1]))
    return parts


def _attentions(matcher: Matcher) -> list[Fused]:
    """Return the attention around every softmax."""
    found = []
    for node in matcher.trace.graph.nodes:
        if node.kind in (SOFTMAX, FUSED):
            try:
                found.append(matcher.take(match_attention(matcher, node)))
            except NoMatchError as reason:
                matcher.miss(node, reason)
    return found


def _products(matcher: Matcher) -> list[Fused]:
    """Return the products with weights: gated ones, those with all that follows, and those that share their input."""
    drafts: dict[str, Draft] = {}
    for node in matcher.trace.graph.nodes:
        if weight_of(matcher, node) is not None:
            try:
                for draft in halves(matcher, match_product(matcher, node)):
                    drafts[draft.output] = draft
            except NoMatchError as reason:
                matcher.miss(node, reason)
    for node in matcher.trace.graph.nodes:
        if node.kind == ("", "Mul"):
            gated = gate(matcher, drafts, node)
            if gated is not None:
                taken = {id(each) for each in gated.nodes}
                drafts = {name: draft for name, draft in drafts.items() if id(draft.nodes[0]) not in taken}
                drafts[gated.output] = gated
    order = {id(node): index for index, node in enumerate(matcher.trace.graph.nodes)}
    grown = sorted(
        drafts.values(), key=lambda draft: -order[id(draft.nodes[0])]
    )  # the last of several takes the residual
    for draft in grown:
        extend(matcher, draft)
        matcher.taken.update(id(node) for node in draft.nodes)
    return [fuse(matcher, group) for group in _groups(grown[::-1])]


def _groups(drafts: Iterable[Draft]) -> list[list[Draft]]:
    """Return products that share their input, without residuals, together."""
    groups: dict[tuple[Any, ...], list[Draft]] = {}
    for draft in drafts:
        alone = id(draft) if draft.residuals else 0
        groups.setdefault((draft.source, id(draft.norm) if draft.norm else 0, alone), []).append(draft)
    return list(groups.values())


def _norms(matcher: Matcher) -> list[Fused]:
    """Return norms with the residual that is added to them. Those that products repeat are removed as unused later."""
    trace = matcher.trace
    found = []
    for node in trace.graph.nodes:
        if node.kind not in NORMS or not matcher.is_free(node) or node.inputs[0] not in matcher.hidden:
            continue
        if node.outputs[0] not in trace.values:  # its shape depends on data
            continue
        nodes, output = [node], node.outputs[0]
        tensors = [name for name in node.inputs if name]
        norm = Norm("rms" if node.kind == RMS_NORM else "layer", node.attributes.get("epsilon", 1e-5))
        spec = Normalize(norm, len(tensors) > 1, len(tensors) > 2, matcher.dtype(output))
        add = trace.only_consumer(output)
        if add is not None and add.kind == ("", "Add") and matcher.is_free(add):
            others = [name for name in add.inputs if name != output]
            if len(others) == 1 and others[0] in matcher.hidden and trace.shape(others[0]) == trace.shape(output):
                tensors += others
                nodes.append(add)
                output = add.outputs[0]
                spec = replace(spec, dtype=matcher.dtype(output))
        found.append(matcher.take(Fused("normalize", spec, tensors, [output], nodes)))
    return found


def _node(fused: Fused) -> Node:
    """Return a fused operation as a node."""
    name = f"{fused.nodes[0].name} ({fused.operation})"
    kind = (DOMAIN, fused.operation)
    return Node(
        name, kind, OPERATIONS[fused.operation], {"spec": fused.spec}, tuple(fused.inputs), tuple(fused.outputs)
    )


def _reshaped(nodes: list[Node], trace: Trace) -> list[Node]:
    """Return the nodes with a reshape where another node, or the caller, reads rows [B, 1, N] in another shape."""
    rows = {node.outputs[0] for node in nodes if node.kind[0] == DOMAIN}
    rows |= {name for node in nodes if node.kind == (DOMAIN, "product") for name in node.outputs}
    read = {name for node in nodes if node.kind[0] != DOMAIN for name in node.inputs} | set(trace.graph.outputs)
    result = []
    for node in nodes:
        outputs = list(node.outputs)
        after = []
        for index, name in enumerate(outputs):
            shape = trace.shape(name) if node.kind[0] == DOMAIN and name in rows & read else ()
            if shape and (len(shape) != 3 or shape[1] != 1):
                outputs[index], target = f"{name}.rows", f"{name}.shape"
                lengths = [-1, *shape[1:]] if shape[0] % BATCH == 0 else list(shape)
                trace.graph.constants[target] = torch.tensor(lengths)
                reshape = OPERATORS["", "Reshape"]
                after.append(Node(f"{name} (Reshape)", ("", "Reshape"), reshape, {}, (outputs[index], target), (name,)))
        result += [replace(node, outputs=tuple(outputs)), *after]
    return result


def _ordered(nodes: list[Node], graph: Graph) -> list[Node]:
    """Return the nodes that outputs depend on, each after those that compute its inputs, else in the graph's order."""
    producer = {name: index for index, node in enumerate(nodes) for name in node.outputs if name}
    needed, pending = set[int](), [producer[name] for name in graph.outputs if name in producer]
    while pending:
        index = pending.pop()
        if index not in needed:
            needed.add(index)
            pending += [producer[name] for name in nodes[index].inputs if name in producer]
    before = {index: {producer[name] for name in nodes[index].inputs if name in producer} for index in needed}
    after: dict[int, list[int]] = {index: [] for index in needed}
    for index, sources in before.items():
        for source in sources:
            after[source].append(index)
    place = {name: index for index, node in enumerate(graph.nodes) for name in node.outputs}
    rank = {index: max(place.get(name, 0) for name in nodes[index].outputs) for index in needed}
    ready = [(rank[index], index) for index, sources in before.items() if not sources]
    heapq.heapify(ready)
    ordered = []
    while ready:
        _, index = heapq.heappop(ready)
        ordered.append(nodes[index])
        for consumer in after[index]:
            before[consumer].discard(index)
            if not before[consumer]:
                heapq.heappush(ready, (rank[consumer], consumer))
    return ordered
