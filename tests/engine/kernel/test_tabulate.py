"""Values that are looked up are those that the graph computes, at any position of any row."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from accel.engine import step
from accel.engine.executor import Executor
from accel.engine.kernel import tabulate as module
from accel.engine.kernel.program import split
from accel.engine.kernel.tabulate import POSITION, POSITION_IDS, tabulate
from accel.engine.nodes import Graph, Node, classify
from accel.engine.operators import find_operator
from accel.runtime import layout
from tests.engine.planning.test_families import plan_of
from tests.engine.test_families import CPU, LENGTHS, Make, Steps, families, make

__all__ = ["make"]  # the fixture


def node(kind: str, inputs: tuple[str, ...], output: str) -> Node:
    """Return a node of a standard operator."""
    return Node(output, ("", kind), find_operator("", kind, output), {}, inputs, (output,))


def squares(more: list[Node], outputs: list[str], constants: dict[str, Tensor] | None = None) -> Graph:
    """Return a graph that squares the position, adds one, and then has more nodes."""
    nodes = [node("Mul", (POSITION, POSITION), "square"), node("Add", ("square", "one"), "next"), *more]
    inputs = {POSITION: torch.int64, "x": torch.int64}
    return classify(Graph(nodes, inputs, outputs, {"one": torch.tensor([1]), **(constants or {})}))


def test_what_depends_on_positions_only_is_looked_up() -> None:
    """Up to where something else comes in; what only the lookup needed is gone."""
    graph = squares([node("Mul", ("next", "x"), "product")], ["product"])
    tensors = {POSITION: torch.tensor([4, 0, 2]), "x": torch.tensor([3, 5, 7])}
    tables: dict[str, Tensor] = {}
    found = tabulate(graph, tensors, CPU, 7, tables)
    assert [each.name for each in found.graph.nodes] == ["product"]
    assert found.lookups["next"].table.tolist() == [1, 2, 5, 10, 17, 26, 37]
    assert found.lookups["next"].value.tolist() == [17, 1, 5]
    address = found.lookups["next"].value.data_ptr()
    tensors[POSITION].copy_(torch.tensor([6, 6, 1]))
    found.look_up()
    assert found.lookups["next"].value.data_ptr() == address
    feeds = {"next": found.lookups["next"].value, **tensors}
    assert Executor(found.graph, CPU).run(feeds)["product"].tolist() == [111, 185, 14]
    two = {POSITION: torch.tensor([3, 5]), "x": torch.tensor([1, 1])}
    assert (
        tabulate(graph, two, CPU, 7, tables).lookups["next"].table.data_ptr() == tables[next(iter(tables))].data_ptr()
    )


@pytest.mark.parametrize(
    ("more", "outputs"),
    [
        ([node("CumSum", ("next", "axis"), "sums"), node("Mul", ("sums", "x"), "y")], ["y"]),  # rows depend on others
        ([node("ReduceMax", ("next",), "most"), node("Mul", ("most", "x"), "y")], ["y"]),  # ... on the largest of all
        ([node("Mul", ("square", "x"), "y")], ["y"]),  # one launch in place of one
    ],
)
def test_what_is_not_looked_up(more: list[Node], outputs: list[str]) -> None:
    graph = squares(more, outputs, {"axis": torch.tensor(0)})
    tensors = {POSITION: torch.tensor([4, 0, 2]), "x": torch.tensor([3, 5, 7])}
    found = tabulate(graph, tensors, CPU, 7, {})
    assert found.lookups == {}
    assert Executor(found.graph, CPU).run(tensors)["y"].tolist() == Executor(graph, CPU).run(tensors)["y"].tolist()


@pytest.mark.parametrize(("positions", "limit"), [(0, module.MAX_BYTES), (7, 7 * 8 - 1)])
def test_nothing_is_looked_up_without_a_bound_or_beyond_it(
    positions: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", limit)
    graph = squares([node("Mul", ("next", "x"), "product")], ["product"])
    tensors = {POSITION: torch.tensor([4, 0, 2]), "x": torch.tensor([3, 5, 7])}
    assert tabulate(graph, tensors, CPU, positions, {}).lookups == {}


def test_positions_have_the_names_that_graphs_give_them() -> None:
    assert (step.BUCKET, POSITION, POSITION_IDS) == (layout.BUCKET, layout.POSITION, layout.POSITION_IDS)


def test_positions_of_a_mask_have_tables_of_their_own() -> None:
    """What depends on both kinds of positions is computed from the values of both."""
    squares_of_ids = [node("Mul", (POSITION_IDS, POSITION_IDS), "square2"), node("Add", ("square2", "one"), "next2")]
    rest = [node("Reshape", ("next2", "flat"), "flat2"), node("Mul", ("next", "flat2"), "product")]
    graph = squares([*squares_of_ids, *rest], ["product"], {"flat": torch.tensor([-1])})
    graph = classify(replace(graph, inputs={POSITION: torch.int64, POSITION_IDS: torch.int64}))
    tensors = {POSITION: torch.tensor([4, 0, 2]), POSITION_IDS: torch.tensor([[3], [0], [1]])}
    found = tabulate(graph, tensors, CPU, 7, {})
    assert found.lookups.keys() == {"next", "flat2"}
    tensors[POSITION_IDS].copy_(torch.tensor([[2], [5], [6]]))
    found.look_up()
    assert found.lookups["flat2"].value.tolist() == [5, 26, 37]
    feeds = tensors | {name: lookup.value for name, lookup in found.lookups.items()}
    assert Executor(found.graph, CPU).run(feeds)["product"].tolist() == [17 * 5, 26, 5 * 37]


def test_an_embedding_is_looked_up_in_the_weight() -> None:
    weight = torch.arange(12.0).view(4, 3)
    graph = squares([node("Gather", ("weight", "x"), "embedded")], ["embedded", "next"], {"weight": weight})
    tensors = {POSITION: torch.tensor([4, 0]), "x": torch.tensor([[3], [1]])}
    found = tabulate(graph, tensors, CPU, 0, {})
    assert found.lookups["embedded"].table.data_ptr() == weight.data_ptr()
    tensors["x"].copy_(torch.tensor([[-1], [0]]))
    found.look_up()
    assert found.lookups["embedded"].value.tolist() == [[[9, 10, 11]], [[0, 1, 2]]]


@families("t5", "whisper", "gemma2", "bart", "llama", "phi3-longrope")
def test_families(make: Make) -> None:
    """What the kernel reads of earlier nodes is the same, bit for bit, at any positions of a padded batch."""
    path = make("precision=fp32").static_decode
    before, _ = split(plan_of(path))
    tensors = {name: tensor for name, tensor in Steps(path).inputs.items() if name in before.inputs}
    rows, positions = len(tensors[POSITION]), LENGTHS["bucket"]
    found = tabulate(before, tensors, CPU, positions, {})
    assert found.lookups, "each of these families computes a mask or a bias from the position in several launches"
    plain, rest = Executor(before, CPU), Executor(found.graph, CPU)
    looked_up = {name: lookup.value for name, lookup in found.lookups.items()}
    for position in range(0, positions, 3):
        tensors[POSITION].copy_((position + torch.arange(rows) * 5) % positions)
        if POSITION_IDS in tensors:
            tensors[POSITION_IDS].copy_((position + torch.arange(rows)[:, None] * 3) % positions)
        found.look_up()
        values = looked_up | rest.run({**tensors, **looked_up})
        for name, expected in plain.run(tensors).items():
            assert torch.equal(values[name], expected), name
