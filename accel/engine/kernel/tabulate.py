"""Values that depend on nothing but a row's position or token, looked up in tables in place of computed at every token.

A bias by distance, masks of later positions, learned positions and the angles of rotations take several small launches
a token, and are the same whenever a row is at the same position. Their rows for all positions are computed once, by the
graph's own nodes. The embedding of a token is looked up in the weight itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from accel.engine.executor import Executor
from accel.engine.kernel.lookups import Lookup, Lookups
from accel.engine.nodes import SHAPE, Graph, Node, classify

POSITION, POSITION_IDS = "position", "position_ids"  # inputs: cache entry of each row's token, and its position; int64
MAX_BYTES = 32 * 2**20  # size of a table; a bias by distance of 16 heads and 1,024 positions in 16 bits has as much
VIEWS = {("", kind) for kind in ("Unsqueeze", "Squeeze", "Reshape", "Transpose", "Identity", "Expand")}  # no launches


@dataclass(frozen=True)
class Tabulated:
    """A graph of which some values are looked up.

    Attributes:
        graph: The nodes that are left. The values that are looked up are inputs of it.
        lookups: Name of a value -> its lookup.
        look_up: Looks up all values at the present positions and tokens.
    """

    graph: Graph
    lookups: Mapping[str, Lookup]
    look_up: Lookups


def tabulate(
    graph: Graph, tensors: Mapping[str, Tensor], device: torch.device, positions: int, tables: dict[str, Tensor]
) -> Tabulated:
    """Let values that depend on positions only be looked up where that saves launches, and embeddings.

    A table is made by running the nodes for all positions, a few rows at a time, and only kept if the rows don't depend
    on each other: beside other rows they must be the same, bit for bit.

    Args:
        graph: Nodes that run before the kernel.
        tensors: Inputs of the graph, at constant addresses.
        device: Their device.
        positions: Number of positions that a row may have, from 0 on; 0: unknown, and only embeddings are looked up.
        tables: Tables made so far, by name and number of positions; those made now are added.
    """
    lookups = _embeddings(graph, tensors, device)
    worth = 1 if lookups else 2  # launches: all that is looked up takes one
    for index in (POSITION, POSITION_IDS):
        names = _candidates(graph, index, worth) if positions and index in graph.inputs else []
        keys = {name: f"{name} at {positions} positions" for name in names}
        missing = [name for name in names if keys[name] not in tables]
        if missing:
            made = _tables(graph, missing, tensors, device, positions, index)
            tables.update({keys[name]: table for name, table in made.items()})
        for name in names:
            if keys[name] in tables:
                table = tables[keys[name]]
                lookups[name] = Lookup(table, tensors[index], table[tensors[index].flatten()])
    return Tabulated(_without(graph, lookups), lookups, Lookups(list(lookups.values()), device))


def _embeddings(graph: Graph, tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Lookup]:
    """Return the lookups of rows of weights by an input with one index a row."""
    lookups = {}
    for node in graph.nodes:
        if node.kind != ("", "Gather") or node.attributes.get("axis", 0):
            continue
        weight, index = graph.constants.get(node.inputs[0]), tensors.get(node.inputs[1])
        if weight is None or index is None or weight.device != index.device or not weight.is_contiguous():
            continue
        if index.dtype is torch.int64 and index.numel() == len(index) and node.outputs[0] not in graph.unknown:
            lookups[node.outputs[0]] = Lookup(weight, index, weight[index])
    return lookups


def _candidates(graph: Graph, index: str, worth: int) -> list[str]:
    """Return the values to look up by an input: outputs, or what nodes read that depend on more than this input.

    Each takes `worth` launches or more to compute.
    """
    depends = _dependencies(graph)
    on_position = {name for name, inputs in depends.items() if inputs == {index}} - {index}
    read = set(graph.outputs)
    for node in graph.nodes:
        if node.kind != SHAPE and not set(node.outputs) & on_position:
            read.update(node.inputs)
    return [name for name in sorted(on_position & read & graph.runtime) if _launches(graph, name) >= worth]


def _dependencies(graph: Graph) -> dict[str, set[str]]:
    """Return the inputs whose values, not only their shapes, each value depends on."""
    depends = {name: {name} for name in graph.inputs}
    for node in graph.nodes:
        inputs = [] if node.kind == SHAPE else [depends[name] for name in node.inputs if name in depends]
        depends.update({name: set().union(*inputs) for name in node.outputs if name})
    return depends


def _launches(graph: Graph, name: str) -> int:
    """Return how many nodes that launch something a value is computed by."""
    return sum(node.kind not in VIEWS and bool(set(node.outputs) & graph.runtime) for node in _computing(graph, {name}))


def _computing(graph: Graph, names: set[str]) -> list[Node]:
    """Return the nodes that compute some values, in order."""
    needed, nodes = set(names), []
    for node in reversed(graph.nodes):
        if needed & set(node.outputs):
            nodes.append(node)
            needed.update(node.inputs)
    return nodes[::-1]


def _without(graph: Graph, found: Mapping[str, Lookup]) -> Graph:
    """Return the graph with some values as inputs, and only the nodes that the other outputs need."""
    outputs = [name for name in graph.outputs if name not in found]
    kept = replace(graph, nodes=[node for node in graph.nodes if not set(node.outputs) & set(found)])
    inputs = {**graph.inputs, **{name: lookup.value.dtype for name, lookup in found.items()}}
    return classify(replace(graph, nodes=_computing(kept, set(outputs)), inputs=inputs, outputs=outputs))


def _tables(
    graph: Graph, names: list[str], tensors: Mapping[str, Tensor], device: torch.device, positions: int, index: str
) -> dict[str, Tensor]:
    """Return the tables by an input of those values that can have one."""
    alone = classify(replace(graph, nodes=_computing(graph, set(names)), outputs=names))
    executor, rows = Executor(alone, device), len(tensors[index])
    groups = -(-positions // rows)
    in_order = torch.arange(groups * rows, device=device).clamp(max=positions - 1)
    tables: dict[str, Tensor] = {}

    def at(chosen: Tensor) -> dict[str, Tensor]:
        feeds = {name: tensors[name] for name in alone.inputs}
        return executor.run({**feeds, index: chosen.view_as(tensors[index])})

    for group, chosen in enumerate(in_order.view(groups, rows)):
        for name, value in at(chosen).items():
            if group == 0 and len(value) == rows and value[0].nbytes * positions <= MAX_BYTES:
                tables[name] = value.new_empty(positions, *value.shape[1:])
            if name in tables:
                tables[name][chosen] = value
    for chosen in in_order.view(rows, groups).T if rows > 1 else ():  # first and last positions side by side
        for name, value in at(chosen).items():
            if name in tables and not torch.equal(tables[name][chosen], value):
                del tables[name]
    return tables
