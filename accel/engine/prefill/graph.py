"""Make the graph of a prefill out of the plan of a decode step.

A plan computes rows of one token each, and only attention tells rows from sequences. So the tokens of all prompts
become rows of one large batch, attention reads the keys and values of its own sequence in place of a cache, and all
else is computed as in a step. Behind the last attention, only the rows whose logits are kept go on.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from accel.engine.nodes import SHAPE, Graph, Node, classify
from accel.engine.operations.attention import Attention
from accel.engine.operations.normalize import Normalize
from accel.engine.operations.product import Product
from accel.engine.planning.plan import DOMAIN, Plan
from accel.engine.planning.planner import needed
from accel.engine.planning.trace import BATCH, NoMatchError
from accel.engine.prefill.operations import prefill_attention, prefill_normalize, prefill_product
from accel.engine.registry import OPERATORS, Operator

IDS, POSITION, POSITION_IDS, MASK = "input_ids", "position", "position_ids", "attention_mask"
PROMPTS = "prompts"  # ids [B, N], whose shape says which rows are a sequence
SEEN = "seen"  # bool [B, 1, N, N], the keys that each query sees, where padding hides some
KEPT_ROWS = "kept_rows"  # rows whose logits are computed, int64 [K]
ROW_INPUTS = (IDS, POSITION, POSITION_IDS)  # inputs with one number for each row
LEAST_FUSED = 0.99  # of the bytes of all products; angles of positions may be a small one in torch
MOST_NUMBERS = 1 << 15  # for each row, in torch
FIXED_INPUTS = 6  # of an attention: query, key, value, position and both caches

FUNCTIONS = {
    Product: Operator(prefill_product, frozenset(), False, {}),
    Normalize: Operator(prefill_normalize, frozenset(), False, {}),
    Attention: Operator(prefill_attention, frozenset(), False, {}),
}


@dataclass(frozen=True)
class Prefill:
    """What computes prompts.

    Attributes:
        graph: Graph over `ROW_INPUTS`, as far as it needs them, `PROMPTS`, `KEPT_ROWS` and, where prompts are padded,
            `SEEN`. Its outputs are those of the plan: logits [K, 1, V] and caches [B, KV, N, D].
        bias: Graph of attention's biases, over the inputs of the plan. None if there are none. Prompts are computed
            without them, so they must hide padding and nothing else.
        caches: Attention's key and value cache, as inputs of the plan -> the outputs that replace them.
    """

    graph: Graph
    bias: Graph | None
    caches: Mapping[str, str]


def prefill_of(plan: Plan, padded: bool) -> Prefill:
    """Return what computes prompts of the model of a decode step.

    Args:
        plan: The plan of the step.
        padded: Prompts may be padded.

    Raises:
        NoMatchError: The plan has something that prompts don't have, or that one large batch would make slow: nodes
            in torch that hold weights or attention, weights of few bits, cross-attention, scores with a soft cap.
    """
    _check(plan)
    attentions = [node for node in plan.graph.nodes if isinstance(node.attributes.get("spec"), Attention)]
    if not attentions:
        raise NoMatchError("there is no attention")
    caches = dict(pair for node in attentions for pair in zip(node.inputs[4:6], node.outputs[1:], strict=True))
    nodes = [_replaced(node, caches, padded) for node in plan.graph.nodes]
    nodes = needed(list(_with_selection(plan, nodes, attentions[-1].name)), plan.graph.outputs)
    read = {name for node in nodes for name in node.inputs}
    others = [name for name in plan.graph.inputs if name in read and name not in ROW_INPUTS]
    if others:
        raise NoMatchError(f"{', '.join(others)} is read by other nodes than attention")
    _check_sizes(plan, nodes)
    inputs = {name: dtype for name, dtype in plan.graph.inputs.items() if name in ROW_INPUTS and name in read}
    inputs |= {PROMPTS: torch.int64, KEPT_ROWS: torch.int64, **({SEEN: torch.bool} if padded else {})}
    graph = classify(replace(plan.graph, nodes=nodes, inputs=inputs))
    return Prefill(graph, _bias_graph(plan, attentions), caches)


def _check(plan: Plan) -> None:
    """Raise `NoMatchError` if a plan isn't fused as a whole, or attends or multiplies in a way that prompts don't."""
    coverage = plan.coverage()
    if coverage["fused_share"] < LEAST_FUSED or coverage["torch_softmaxes"]:
        raise NoMatchError("products or attention run in torch")
    for node in plan.graph.nodes:
        spec = node.attributes.get("spec")
        if isinstance(spec, Attention) and (spec.key is None or spec.softcap or spec.ancestry):
            raise NoMatchError(f"{node.name} attends to a fixed cache, or caps its scores")
        if isinstance(spec, Product) and any(part.low_bits is not None for part in spec.parts):
            raise NoMatchError(f"{node.name} has weights of few bits")


def _check_sizes(plan: Plan, nodes: Collection[Node]) -> None:
    """Raise `NoMatchError` if a node in torch makes much for each row, such as a table that it repeats for each."""
    values = plan.trace.values
    for node in (node for node in nodes if node.kind[0] != DOMAIN):
        made = [values[name] for name in node.outputs if name in values]
        if any(value.shape[:1] == (BATCH,) and value.numel() > BATCH * MOST_NUMBERS for value in made):
            raise NoMatchError(f"{node.name} makes more than {MOST_NUMBERS} numbers for each token")
        if plan.graph.unknown.intersection(node.outputs):
            raise NoMatchError(f"how much {node.name} makes depends on data")


def _replaced(node: Node, caches: Collection[str], padded: bool) -> Node:
    """Return a node as it computes the rows of whole prompts.

    Args:
        node: A node of the plan.
        caches: Inputs that are caches, which prompts don't have.
        padded: Prompts may be padded.
    """
    spec, inputs = node.attributes.get("spec"), node.inputs
    if node.kind == SHAPE and (node.attributes.get("start", 0), node.attributes.get("end")) == (0, 1):
        return replace(node, inputs=(IDS,)) if inputs[0] in caches else node  # the number of rows
    if spec is None:
        return node
    if isinstance(spec, Attention):
        rest = inputs[FIXED_INPUTS : len(inputs) - len(_biases(node))]
        inputs = (*inputs[:3], PROMPTS, SEEN if padded else "", *rest)
    return replace(node, operator=FUNCTIONS[type(spec)], inputs=inputs)


def _with_selection(plan: Plan, nodes: list[Node], last: str) -> Iterator[Node]:
    """Yield the nodes, with a selection of the kept rows behind the last attention for each value that is read later.

    Args:
        plan: The plan.
        nodes: Its nodes, for whole prompts.
        last: Name of the last attention.
    """
    at = next(index for index, node in enumerate(nodes) if node.name == last)
    earlier = {name for node in nodes[: at + 1] for name in node.outputs} & plan.graph.runtime
    later = {name for node in nodes[at + 1 :] for name in node.inputs}
    yield from nodes[: at + 1]
    gather = OPERATORS["", "Gather"]
    kept = {}
    for name in (name for node in nodes[: at + 1] for name in node.outputs if name in earlier & later):
        if plan.trace.shape(name.removesuffix(".rows"))[:1] != (BATCH,):
            raise NoMatchError(f"{name}, which is read behind the last attention, has no axis of rows")
        kept[name] = f"{name}.kept"
        yield Node(f"{name} (kept)", ("", "Gather"), gather, {"axis": 0}, (name, KEPT_ROWS), (kept[name],))
    for node in nodes[at + 1 :]:
        yield replace(node, inputs=tuple(kept.get(name, name) for name in node.inputs))


def _bias_graph(plan: Plan, attentions: Collection[Node]) -> Graph | None:
    """Return the graph of all attentions' biases: see `Prefill.bias`.

    Raises:
        NoMatchError: They depend on more than the mask and the position.
    """
    graph = plan.graph
    names = list(dict.fromkeys(name for node in attentions for name in _biases(node)))
    if not names:
        return None
    nodes = needed(graph.nodes, names)
    read = {name for node in nodes for name in node.inputs} & set(graph.inputs)
    values = {name for node in nodes if node.kind != SHAPE for name in node.inputs} & read
    if values - {MASK, POSITION}:
        raise NoMatchError(f"a bias depends on {', '.join(sorted(values - {MASK, POSITION}))}")
    inputs = {name: dtype for name, dtype in graph.inputs.items() if name in read}
    return classify(replace(graph, nodes=nodes, inputs=inputs, outputs=names))


def _biases(node: Node) -> tuple[str, ...]:
    """Return the names of an attention's biases, its last inputs."""
    return node.inputs[len(node.inputs) - len(node.attributes["spec"].biases) :]
