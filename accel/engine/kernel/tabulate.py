"""Values that depend on nothing but each row's position, looked up in tables in place of computed at every token.

A bias by distance, masks of later positions and learned positions take several small launches a token, and are the same
whenever a row is at the same position. Their rows for all positions are computed once, by the graph's own nodes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from accel.engine.executor import Executor
from accel.engine.nodes import SHAPE, Graph, Node, classify

POSITION = "position"  # input: position of each row's token, int64 [rows]
MAX_BYTES = 32 * 2**20  # size of a table; a bias by distance of 16 heads and 1,024 positions in 16 bits has as much
VIEWS = {("", kind) for kind in ("Unsqueeze", "Squeeze", "Reshape", "Transpose", "Identity", "Expand")}  # no launches


@dataclass(frozen=True)
class Lookup:
    """A value that is looked up.

    Attributes:
        table: Its rows for all positions, [positions, ...].
        value: Its rows at the present positions, [rows, ...], at a constant address.
    """

    table: Tensor
    value: Tensor


@dataclass(frozen=True)
class Tabulated:
    """A graph of which some values are looked up.

    Attributes:
        graph: The nodes that are left. The values that are looked up are inputs of it.
        lookups: Name of a value -> its lookup.
        position: The positions, int64 [rows], at a constant address.
    """

    graph: Graph
    lookups: Mapping[str, Lookup]
    position: Tensor

    def look_up(self) -> None:
        """Look up all values at the present positions."""
        for lookup in self.lookups.values():
            torch.index_select(lookup.table, 0, self.position, out=lookup.value)


def tabulate(
    graph: Graph, tensors: Mapping[str, Tensor], device: torch.device, positions: int, tables: dict[str, Tensor]
) -> Tabulated:
    """Let values that depend on positions only be looked up, where that saves launches.

    A table is made by running the nodes for all positions, a few rows at a time, and only kept if the rows don't depend
    on each other: in reverse order they must give the same, bit for bit.

    Args:
        graph: Nodes that run before the kernel.
        tensors: Inputs of the graph.
        device: Their device.
        positions: Number of positions that a row may have, from 0 on; 0: unknown, and nothing is looked up.
        tables: Tables made so far, by name and number of positions; those made now are added.
    """
    names = _candidates(graph) if positions and POSITION in graph.inputs else []
    if not names:
        return Tabulated(graph, {}, torch.empty(0, dtype=torch.int64))
    position = tensors[POSITION]
    keys = {name: f"{name} at {positions} positions" for name in names}
    missing = [name for name in names if keys[name] not in tables]
    if missing:
        made = _tables(graph, missing, tensors, device, positions)
        tables.update({keys[name]: table for name, table in made.items()})
    found = {name: tables[key] for name, key in keys.items() if key in tables}
    lookups = {name: Lookup(table, table.index_select(0, position)) for name, table in found.items()}
    return Tabulated(_without(graph, found), lookups, position)


def _candidates(graph: Graph) -> list[str]:
    """Return the values to look up: outputs, or what nodes read that depend on more than positions."""
    depends = _dependencies(graph)
    on_position = {name for name, inputs in depends.items() if inputs == {POSITION}} - {POSITION}
    read = set(graph.outputs)
    for node in graph.nodes:
        if node.kind != SHAPE and not set(node.outputs) & on_position:
            read.update(node.inputs)
    return [name for name in sorted(on_position & read & graph.runtime) if _launches(graph, name) > 1]


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


def _without(graph: Graph, found: Mapping[str, Tensor]) -> Graph:
    """Return the graph with some values as inputs, and only the nodes that the other outputs need."""
    outputs = [name for name in graph.outputs if name not in found]
    kept = replace(graph, nodes=[node for node in graph.nodes if not set(node.outputs) & set(found)])
    inputs = {**graph.inputs, **{name: table.dtype for name, table in found.items()}}
    return classify(replace(graph, nodes=_computing(kept, set(outputs)), inputs=inputs, outputs=outputs))


def _tables(
    graph: Graph, names: list[str], tensors: Mapping[str, Tensor], device: torch.device, positions: int
) -> dict[str, Tensor]:
    """Return the tables of those values that can have one."""
    alone = classify(replace(graph, nodes=_computing(graph, set(names)), outputs=names))
    executor, rows = Executor(alone, device), len(tensors[POSITION])

    def at(chosen: Tensor) -> dict[str, Tensor]:
        return executor.run({**{name: tensors[name] for name in alone.inputs}, POSITION: chosen})

    tables: dict[str, Tensor] = {}
    for start in range(0, positions, rows):
        chosen = torch.arange(start, start + rows, device=device).clamp(max=positions - 1)
        values = at(chosen)
        reversed_values = at(chosen.flip(0)) if rows > 1 else values
        for name in list(tables) if start else names:
            value = values[name]
            if not start and len(value) == rows and value[0].nbytes * positions <= MAX_BYTES:
                tables[name] = value.new_empty(positions, *value.shape[1:])
            if name in tables and torch.equal(value, reversed_values[name].flip(0)):
                tables[name][start : start + rows] = value[: positions - start]
            else:
                tables.pop(name, None)
    return tables
