"""Makes a plan smaller: what trials show to be safe in 16 bits is dropped, and borders cost as few casts as can be.

A trial is the caller's: it says whether the graph, with some of the nodes dropped from the plan, still computes what it
should. Groups of nodes are dropped together and halved where that fails (delta debugging: A. Zeller, R. Hildebrandt,
Simplifying and Isolating Failure-Inducing Input, 2002, https://doi.org/10.1109/32.988498).

Where the nodes that must stay lie, the borders between them and the rest are a minimum cut (the two-label case of
Y. Boykov, O. Veksler, R. Zabih, Fast Approximate Energy Minimization via Graph Cuts, 2001): a value costs one cast
if any of its readers is of the other precision, however many they are.
"""

from collections.abc import Callable, Collection, Sequence

import networkx as nx
import onnx_ir as ir

from accel.graph.precision.formats import FLOAT
from accel.graph.precision.plan import (
    ANY_TYPE,
    CASTS,
    NOT_FINITE,
    OVERFLOW,
    UNDERFLOW,
    Plan,
    Reason,
    has_float,
    is_weight,
)

DROPPABLE = (UNDERFLOW, NOT_FINITE, OVERFLOW)  # rules that a trial may overrule, the likeliest first
WIDER = 0.01  # of a cast: what one more node in FP32 costs where nothing else decides
KEPT, LOWERED = "in FP32", "in 16 bits"  # the two ends of the cut


def groups(model: ir.Model, plan: Plan) -> list[list[str]]:
    """The nodes that trials may drop, those that one value keeps together, in the order of `TRIABLE` and the graph's.

    Nodes that read a weight beyond the format stay: the weight would not survive.
    """
    found: dict[tuple[int, str], list[str]] = {}
    for node in model.graph:
        name = node.outputs[0].name or ""
        reason = plan.nodes.get(name)
        fixed = any(value is not None and _beyond(plan, value.name or "") for value in node.inputs)
        if reason is not None and reason.rule in DROPPABLE and not fixed:
            found.setdefault((DROPPABLE.index(reason.rule), reason.value), []).append(name)
    return [found[key] for key in sorted(found, key=lambda key: key[0])]


def without(model: ir.Model, plan: Plan, names: Collection[str]) -> Plan:
    """`plan` with the nodes `names` lowered, and the weights and ports that no other kept node reads or writes."""
    nodes = {name: why for name, why in plan.nodes.items() if name not in names}
    touched = {
        value.name or ""
        for node in model.graph
        if _name(node) in nodes
        for value in (*node.inputs, *node.outputs)
        if value is not None
    }
    return Plan(
        nodes,
        weights={name: why for name, why in plan.weights.items() if name in touched or _beyond(plan, name)},
        specs={name: why for name, why in plan.specs.items() if name in touched},
        dropped={name: plan.nodes[name] for name in names},
    )


def _beyond(plan: Plan, name: str) -> bool:
    """Whether a weight itself is beyond the format; others stay in FP32 only because a kept node reads them."""
    return name in plan.weights and plan.weights[name].value == name


def droppable(groups: Sequence[Sequence[str]], passes: Callable[[list[str]], bool], trials: int) -> list[str]:
    """Names that can be dropped together, found with at most `trials` calls of `passes`.

    `passes` is given all the names that would be dropped at once.
    """
    dropped: list[str] = []
    left = trials

    def visit(part: Sequence[Sequence[str]]) -> None:
        nonlocal dropped, left
        if not part or left == 0:
            return
        left -= 1
        tried = [*dropped, *(name for group in part for name in group)]
        if passes(tried):
            dropped = tried
        elif len(part) > 1:
            middle = len(part) // 2
            visit(part[:middle])
            visit(part[middle:])

    visit(groups)
    return dropped


def minimize_casts(model: ir.Model, plan: Plan) -> dict[str, Reason]:
    """Nodes to keep in FP32 beside those of `plan`, because that saves casts. None of them reads or becomes a weight.

    Small constants and what is computed from constants are stored in either precision and count for nothing.
    """
    graph = model.graph
    nodes = [node for node in graph if has_float(node)]
    number = {node: place for place, node in enumerate(nodes)}
    if not plan.nodes:
        return {}
    cut = nx.DiGraph()
    for node, place in number.items():
        if _name(node) in plan.nodes:
            cut.add_edge(KEPT, place)
        elif any(value is not None and is_weight(value) for value in node.inputs):
            cut.add_edge(place, LOWERED)
        else:
            cut.add_edge(place, LOWERED, capacity=WIDER)
    for value in (*graph.inputs, *(output for node in nodes for output in node.outputs)):
        if value.dtype != FLOAT:
            continue
        producer = value.producer()
        readers = [number[user] for user in value.consumers() if user in number and user.op_type not in ANY_TYPE]
        spec = (value.name or "") in plan.specs
        source = KEPT if spec else LOWERED
        writer: int | str = source if producer is None else number[producer]
        ends: list[object] = [*readers]
        if value.is_graph_output():
            ends.append(source)
        if not ends:
            continue
        down, up = ("down", value.name), ("up", value.name)
        cut.add_edge(writer, down, capacity=1)  # paid where the writer is in FP32 and a reader isn't
        cut.add_edge(up, writer, capacity=1)  # paid where a reader is in FP32 and the writer isn't
        for end in ends:
            cut.add_edge(down, end)
            cut.add_edge(end, up)
    if KEPT not in cut or LOWERED not in cut:
        return {}
    _, (kept, _) = nx.minimum_cut(cut, KEPT, LOWERED)
    return {
        _name(node): Reason(CASTS, _name(node))
        for node, place in number.items()
        if place in kept and _name(node) not in plan.nodes
    }


def _name(node: ir.Node) -> str:
    return node.outputs[0].name or ""
