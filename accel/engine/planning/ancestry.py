"""The plan of a step that reads cache entries from the rows that computed them, for beam search without copies."""

from collections import Counter
from dataclasses import replace

import torch

from accel.engine.nodes import SHAPE, Graph, Node, classify
from accel.engine.operations.attention import Attention
from accel.engine.planning.plan import DOMAIN, Plan
from accel.engine.planning.trace import NoMatchError

ANCESTRY = "beam_ancestry"  # input that the plan has and the graph hasn't: see `BeamAncestry`


def by_ancestry(plan: Plan) -> Plan:
    """Return a plan whose attention reads every entry of a written cache from the row that the input `ANCESTRY` names.

    Cache indirection, as in TensorRT-LLM's beam search:
    https://github.com/NVIDIA/TensorRT-LLM/blob/release/0.5.0/docs/source/gpt_attention.md

    Fixed caches, those of cross-attention, are read as before: beams of one input share them.

    Raises:
        NoMatchError: Entries are also read in another way: by a node in torch, or by an attention that doesn't write
            them.
    """
    graph = plan.graph
    if not (set(_written(graph)) & set(graph.inputs)):
        raise NoMatchError("no attention writes a cache")
    _check_readers(graph)
    nodes = [_with_table(node) if _is_written(node) else node for node in graph.nodes]
    inputs = {**graph.inputs, ANCESTRY: torch.int32}
    return Plan(classify(replace(graph, nodes=nodes, inputs=inputs)), plan.trace, plan.misses)


def _written(graph: Graph) -> dict[str, Node]:
    """Return the values that a node writes into -> the node."""
    return {node.inputs[index]: node for node in graph.nodes for index in node.operator.writes}


def _is_written(node: Node) -> bool:
    """Return whether a node is an attention that writes its caches."""
    spec = node.attributes.get("spec")
    return node.kind[0] == DOMAIN and isinstance(spec, Attention) and spec.key is not None


def _check_readers(graph: Graph) -> None:
    """Raise `NoMatchError` if anything but the attention that writes a cache reads it, before or after."""
    readers = Counter(name for node in graph.nodes if node.kind != SHAPE for name in set(node.inputs))
    for cache, node in _written(graph).items():
        if cache not in graph.inputs:
            continue
        if not _is_written(node):
            raise NoMatchError(f"{cache} is written by {node.name}, not by a fused attention")
        written = node.outputs[node.operator.writes[node.inputs.index(cache)]]
        for name, own in ((cache, 1), (written, 0)):
            if readers[name] > own:
                raise NoMatchError(f"{name} is read by other nodes than {node.name}")


def _with_table(node: Node) -> Node:
    """Return an attention that reads its caches by the table."""
    spec = replace(node.attributes["spec"], ancestry=True)
    return replace(node, attributes={**node.attributes, "spec": spec}, inputs=(*node.inputs, ANCESTRY))
