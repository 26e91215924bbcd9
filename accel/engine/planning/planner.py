"""Plan a static decode graph: replace what patterns match by fused operations, and leave the rest to the executor."""

import heapq
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from accel.engine.nodes import Graph, Node, classify
from accel.engine.operations.attention import attention
from accel.engine.operations.normalize import Normalize, normalize
from accel.engine.operations.product import product
from accel.engine.planning.attention import FUSED, SOFTMAX, match_attention
from accel.engine.planning.patterns import LAYER_NORM, NORMS, RMS_NORM, Fused, Matcher
from accel.engine.planning.plan import DOMAIN, Plan
from accel.engine.planning.products import Draft, extend, fuse, gate, halves, match_product, weight_of
from accel.engine.planning.trace import BATCH, PRODUCTS, NoMatchError, Shapes, Trace
from accel.engine.registry import MICROSOFT, OPERATORS, Operator
from accel.errors import AccelError

OPERATIONS = {
    "product": Operator(product, frozenset(), False, {}),
    "normalize": Operator(normalize, frozenset(), False, {}),
    "attention": Operator(attention, frozenset(), False, {4: 1, 5: 2}),
    "cross attention": Operator(attention, frozenset(), False, {}),
}
SKIP_NORMS = {
    (MICROSOFT, "SkipSimplifiedLayerNormalization"): RMS_NORM,
    (MICROSOFT, "SkipLayerNormalization"): LAYER_NORM,
}
SKIP_EPSILON = 1e-12  # ONNX Runtime's default for both


def plan(graph: Graph, shapes: Shapes, batch: str, fixed: Mapping[str, torch.Tensor]) -> Plan:
    """Plan a static decode graph.

    Args:
        graph: The graph.
        shapes: Shapes of its inputs.
        batch: Symbol of the batch axis.
        fixed: Inputs that have the same value at every step, and that value.

    Raises:
        AccelError: A node can't be traced, or operations would depend on each other.
    """
    inputs = {name: dtype for name, dtype in graph.inputs.items() if name not in fixed}
    nodes = needed(_without_skips(graph), graph.outputs)
    graph = classify(replace(graph, nodes=nodes, inputs=inputs, constants={**graph.constants, **fixed}))
    trace = Trace(graph, shapes, batch)
    matcher = Matcher(trace, {name for name, dtype in inputs.items() if dtype.is_floating_point or name == "input_ids"})
    fused = [*_attentions(matcher), *_products(matcher)]
    fused += _norms(matcher)
    ordered = _ordered(needed(_replaced(nodes, fused), graph.outputs), graph)
    left = {node.name for node in ordered}
    misses = {name: reason for name, reason in matcher.misses.items() if name in left}
    return Plan(classify(replace(graph, nodes=_reshaped(ordered, trace))), trace, misses)


def _without_skips(graph: Graph) -> list[Node]:
    """Return the nodes with additions and a norm in place of every norm of a sum."""
    products = {name for node in graph.nodes if node.kind in PRODUCTS for name in node.outputs}
    nodes = []
    for node in graph.nodes:
        kind = SKIP_NORMS.get(node.kind)
        if kind is None or any(node.outputs[1:3]):  # nothing computes mean and deviation
            nodes.append(node)
        else:
            nodes += _without_skip(node, kind, products)
    return nodes


def _without_skip(node: Node, kind: tuple[str, str], products: Collection[str]) -> list[Node]:
    """Return additions and a norm that compute what a norm of a sum does.

    Args:
        node: The norm of a sum.
        kind: The norm alone.
        products: Values to which a bias is added first, so that it becomes a part of their product.
    """
    x, skip, scale, *rest = (*node.inputs, "", "")[:5]
    beta, bias = (rest[0], rest[1]) if kind == LAYER_NORM else ("", rest[0])
    total = node.outputs[3] if len(node.outputs) > 3 and node.outputs[3] else f"{node.outputs[0]}.sum"
    add = OPERATORS["", "Add"]
    parts = []
    if bias:
        if skip in products and x not in products:
            x, skip = skip, x
        parts.append(Node(f"{node.name} bias", ("", "Add"), add, {}, (x, bias), (f"{total}.biased",)))
        x = f"{total}.biased"
    parts.append(Node(f"{node.name} sum", ("", "Add"), add, {}, (x, skip), (total,)))
    inputs = (total, scale, beta) if beta else (total, scale)
    attributes = {"epsilon": node.attributes.get("epsilon", SKIP_EPSILON)}
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
    drafts = _gated(matcher, drafts)
    matcher.trace.uses.update(draft.source for draft in drafts.values())  # no other product may end behind them
    order = matcher.trace.order
    grown = sorted(drafts.values(), key=lambda draft: -order[id(draft.nodes[0])])
    for draft in grown:  # the last of several takes the residual
        extend(matcher, draft)
        matcher.taken.update(id(node) for node in draft.nodes)
    found = []
    for group in _groups(matcher.trace, grown[::-1]):
        try:
            found.append(matcher.take(fuse(matcher, group)))
        except NoMatchError as reason:
            matcher.miss(group[0].nodes[0], reason)
    return found


def _gated(matcher: Matcher, drafts: dict[str, Draft]) -> dict[str, Draft]:
    """Return the products with one in place of two whose features are multiplied."""
    for node in matcher.trace.graph.nodes:
        if node.kind == ("", "Mul") and any(name in drafts for name in node.inputs):
            gated = gate(matcher, drafts, node)
            if gated is not None:
                taken = {id(each) for each in gated.nodes}
                drafts = {name: draft for name, draft in drafts.items() if id(draft.nodes[0]) not in taken}
                drafts[gated.output] = gated
    return drafts


def _groups(trace: Trace, drafts: Iterable[Draft]) -> list[list[Draft]]:
    """Return products together that share their input, and formats of weight and output, and have no residuals."""
    groups: dict[tuple[Any, ...], list[Draft]] = {}
    for draft in drafts:
        alone = id(draft) if draft.residuals else 0
        dtypes = (trace.dtype(draft.tensors[0]), draft.part.low_bits, trace.dtype(draft.output))
        key = (draft.source, id(draft.norm) if draft.norm else 0, dtypes, alone)
        groups.setdefault(key, []).append(draft)
    return list(groups.values())


def _norms(matcher: Matcher) -> list[Fused]:
    """Return norms with the residual that is added to them. Those that products repeat are removed as unused later."""
    trace = matcher.trace
    found = []
    for node in trace.graph.nodes:
        if node.kind not in NORMS or not matcher.is_free(node) or node.inputs[0] not in matcher.hidden:
            continue
        nodes, output = [node], node.outputs[0]
        try:
            width = trace.shape(output)[-1]
            norm, tensors = matcher.norm(node, width)
            inputs = [matcher.row(node.inputs[0], width), *tensors]
        except NoMatchError as reason:
            matcher.miss(node, reason)
            continue
        add = trace.only_consumer(output)
        if add is not None and add.kind == ("", "Add") and matcher.is_free(add):
            others = [name for name in add.inputs if name != output]
            if len(others) == 1 and matcher.is_residual(others[0], output):
                inputs.append(matcher.row(others[0], width))
                nodes.append(add)
                output = add.outputs[0]
        spec = Normalize(norm, len(tensors) > 0, len(tensors) > 1, trace.dtype(output))
        found.append(matcher.take(Fused("normalize", spec, inputs, [output], nodes)))
    return found


def _node(fused: Fused) -> Node:
    """Return a fused operation as a node."""
    name = f"{fused.nodes[0].name} ({fused.operation})"
    operator, spec = OPERATIONS[fused.operation], {"spec": fused.spec}
    return Node(name, (DOMAIN, fused.operation), operator, spec, tuple(fused.inputs), tuple(fused.outputs))


def _replaced(nodes: Iterable[Node], fused: list[Fused]) -> list[Node]:
    """Return the fused operations and all nodes, without the outputs that operations compute.

    A value between the nodes of an operation that something else reads, too, is still computed for that.
    """
    computed = {name for each in fused for name in each.outputs}
    rest = [replace(node, outputs=tuple("" if name in computed else name for name in node.outputs)) for node in nodes]
    return [*rest, *map(_node, fused)]


def _reshaped(nodes: list[Node], trace: Trace) -> list[Node]:
    """Return the nodes with a reshape where another node, or the caller, reads rows [B, 1, N] in another shape."""
    rows = {node.outputs[0] for node in nodes if node.kind[0] == DOMAIN}
    rows |= {name for node in nodes if node.kind == (DOMAIN, "product") for name in node.outputs}
    read = {name for node in nodes if node.kind[0] != DOMAIN for name in node.inputs} | set(trace.graph.outputs)
    renamed = {}
    for name in rows & read:
        shape = trace.shape(name)
        if len(shape) != 3 or shape[:2] != (BATCH, 1):
            renamed[name] = f"{name}.rows"
    reshape = OPERATORS["", "Reshape"]
    result = []
    for node in nodes:
        if node.kind[0] != DOMAIN:
            result.append(node)
            continue
        inputs, outputs = (tuple(renamed.get(name, name) for name in names) for names in (node.inputs, node.outputs))
        result.append(replace(node, inputs=inputs, outputs=outputs))
        for name in (name for name in node.outputs if name in renamed):
            target = f"{name}.shape"
            trace.graph.constants[target] = torch.tensor([-1, *trace.shape(name)[1:]])
            inputs = (renamed[name], target)
            result.append(Node(f"{name} (Reshape)", ("", "Reshape"), reshape, {}, inputs, (name,)))
    return result


def needed(nodes: list[Node], outputs: Iterable[str]) -> list[Node]:
    """Return the nodes that a graph's outputs depend on, in the same order, with no outputs that nothing reads."""
    producer = {name: index for index, node in enumerate(nodes) for name in node.outputs if name}
    kept, read, pending = set[int](), set(outputs), [producer[name] for name in outputs if name in producer]
    while pending:
        index = pending.pop()
        if index not in kept:
            kept.add(index)
            read.update(nodes[index].inputs)
            pending += [producer[name] for name in nodes[index].inputs if name in producer]
    return [
        replace(node, outputs=tuple(name if name in read else "" for name in node.outputs))
        for index, node in enumerate(nodes)
        if index in kept
    ]


def _ordered(nodes: list[Node], graph: Graph) -> list[Node]:
    """Return the nodes, each after those that compute its inputs, else in the graph's order.

    Raises:
        AccelError: Operations depend on each other in a circle.
    """
    producer = {name: index for index, node in enumerate(nodes) for name in node.outputs if name}
    before = {index: {producer[name] for name in node.inputs if name in producer} for index, node in enumerate(nodes)}
    after: dict[int, list[int]] = {index: [] for index in before}
    for index, sources in before.items():
        for source in sources:
            after[source].append(index)
    place = {name: index for index, node in enumerate(graph.nodes) for name in node.outputs}
    rank = {index: max(place.get(name, 0) for name in nodes[index].outputs) for index in before}
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
    if len(ordered) != len(nodes):
        left = ", ".join(nodes[index].name for index, sources in before.items() if sources)
        raise AccelError(f"the plan's operations depend on each other: {left}")
    return ordered
