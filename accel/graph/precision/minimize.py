"""Reduction of precision plans: fewer nodes in FP32 as far as sensitivity trials allow, and then fewer casts.

A trial is a function of the caller that returns whether the graph, with some nodes dropped from its plan, is still
accurate enough. Groups of nodes are dropped together, and halved where that fails (delta debugging: A. Zeller,
R. Hildebrandt, Simplifying and Isolating Failure-Inducing Input, 2002, https://doi.org/10.1109/32.988498).

The nodes in FP32 besides those are chosen by a minimum cut (the two-label case of Y. Boykov, O. Veksler, R. Zabih, Fast
Approximate Energy Minimization via Graph Cuts, 2001): a value costs one cast if any node that reads it has the other
precision, no matter how many do.
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
    node_key,
)

DROPPABLE = (UNDERFLOW, NOT_FINITE, OVERFLOW)  # rules that a trial may overrule, those most often too careful first
FP32_COST = 0.01  # of one more node in FP32, in casts: decides between choices with equally many casts
KEPT, LOWERED = "in FP32", "in 16 bits"  # source and sink of the cut


def droppable_groups(model: ir.Model, plan: Plan) -> list[list[str]]:
    """Return the nodes that trials may drop, grouped by the rule and value that keep them.

    Nodes that read a weight beyond the format's range are not among them.

    Returns:
        Node names as in `plan.nodes`, groups in the order of `DROPPABLE` and then of the graph.
    """
    grouped: dict[tuple[int, str], list[str]] = {}
    for node in model.graph:
        name = node_key(node)
        reason = plan.nodes.get(name)
        if reason is None or reason.rule not in DROPPABLE:
            continue
        if any(value is not None and _out_of_range(plan, value.name or "") for value in node.inputs):
            continue
        grouped.setdefault((DROPPABLE.index(reason.rule), reason.value), []).append(name)
    return [grouped[key] for key in sorted(grouped, key=lambda key: key[0])]


def drop_nodes(model: ir.Model, plan: Plan, names: Collection[str]) -> Plan:
    """Return a plan that lowers some of the nodes that `plan` keeps in FP32.

    Weights, inputs and outputs that only those nodes read or write are lowered, too, except weights beyond the format's
    range.

    Args:
        model: Graph that the plan is for.
        plan: Plan to reduce; not changed.
        names: Nodes to lower, as in `plan.nodes`.
    """
    nodes = {name: reason for name, reason in plan.nodes.items() if name not in names}
    used: set[str] = set()  # values that the nodes still in FP32 read or write
    for node in model.graph:
        if node_key(node) in nodes:
            used.update(value.name or "" for value in (*node.inputs, *node.outputs) if value is not None)
    weights = {name: reason for name, reason in plan.weights.items() if name in used or _out_of_range(plan, name)}
    specs = {name: reason for name, reason in plan.specs.items() if name in used}
    return Plan(nodes, weights, specs, dropped={name: plan.nodes[name] for name in names})


def _out_of_range(plan: Plan, name: str) -> bool:
    """Return whether `name` is a weight beyond the format's range; others are kept only for a node that reads them."""
    return name in plan.weights and plan.weights[name].value == name


def find_droppable(groups: Sequence[Sequence[str]], passes: Callable[[list[str]], bool], trials: int) -> list[str]:
    """Search for as many groups of nodes as possible that can be dropped together.

    Args:
        groups: Groups of node names, those to try first in front.
        passes: Trial of all names that would be dropped at once; returns whether the graph is still accurate enough.
        trials: Largest number of calls of `passes`.

    Returns:
        Names of the nodes to drop. `passes` was called with exactly these and returned True, unless there are none.
    """
    dropped: list[str] = []
    remaining = trials

    def search(part: Sequence[Sequence[str]]) -> None:
        """Try to drop all of `part` in addition to what is dropped already, else each half of it."""
        nonlocal dropped, remaining
        if not part or remaining == 0:
            return
        remaining -= 1
        candidate = [*dropped, *(name for group in part for name in group)]
        if passes(candidate):
            dropped = candidate
        elif len(part) > 1:
            middle = len(part) // 2
            search(part[:middle])
            search(part[middle:])

    search(groups)
    return dropped


def minimize_casts(model: ir.Model, plan: Plan) -> dict[str, Reason]:
    """Return nodes to keep in FP32 in addition to those of `plan`, because that saves casts.

    None of them reads a weight. Constants and values computed from constants alone cost no cast: they are stored in
    either precision.

    Args:
        model: FP32 graph with known types.
        plan: Plan with the nodes that must stay in FP32, and the inputs and outputs.
    """
    if not plan.nodes:
        return {}
    numbers = {node: number for number, node in enumerate(node for node in model.graph if has_float(node))}
    cut = nx.DiGraph()
    for node, number in numbers.items():
        if node_key(node) in plan.nodes:
            cut.add_edge(KEPT, number)  # no capacity: infinite
        elif any(value is not None and is_weight(value) for value in node.inputs):
            cut.add_edge(number, LOWERED)
        else:
            cut.add_edge(number, LOWERED, capacity=FP32_COST)
    values = list(model.graph.inputs)
    for node in numbers:
        values += node.outputs
    for value in values:
        if value.dtype == FLOAT:
            _add_casts(cut, value, numbers, plan)
    if KEPT not in cut or LOWERED not in cut:
        return {}
    _, (kept, _) = nx.minimum_cut(cut, KEPT, LOWERED)
    added = {}
    for node, number in numbers.items():
        if number in kept and node_key(node) not in plan.nodes:
            added[node_key(node)] = Reason(CASTS, node_key(node))
    return added


def _add_casts(cut: nx.DiGraph, value: ir.Value, numbers: dict[ir.Node, int], plan: Plan) -> None:
    """Add the cost of a cast of `value` to the flow network: 1 for each direction in which some reader needs one.

    Args:
        cut: Flow network; its vertices are the numbers of nodes, `KEPT`, `LOWERED`, and two for each value.
        value: Graph input or node output.
        numbers: Number of each node in the network.
        plan: Plan with the inputs and outputs in FP32.
    """
    spec = KEPT if (value.name or "") in plan.specs else LOWERED  # precision of a graph input or output
    producer = value.producer()
    writer = spec if producer is None else numbers[producer]
    readers: list[int | str] = [
        numbers[consumer] for consumer in value.consumers() if consumer in numbers and consumer.op_type not in ANY_TYPE
    ]
    if value.is_graph_output():
        readers.append(spec)
    if not readers:
        return
    to_half, to_float = ("to 16 bits", value.name), ("to FP32", value.name)
    cut.add_edge(writer, to_half, capacity=1)  # paid if the writer is in FP32 and a reader isn't
    cut.add_edge(to_float, writer, capacity=1)  # paid if a reader is in FP32 and the writer isn't
    for reader in readers:
        cut.add_edge(to_half, reader)
        cut.add_edge(reader, to_float)
