"""The executor: what it computes once, what it writes in place, and what it refuses."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from onnx.helper import make_node

from accel.engine import executor as engine
from accel.engine.executor import Executor
from accel.engine.nodes import read_graph
from accel.errors import AccelError
from tests.engine.graphs import write_graph
from tests.engine.one_node import CPU, ints, normal, to_onnx

CACHE = ("B", 2, "S", 3)
STEP = {"past": (torch.float32, CACHE), "new": (torch.float32, ("B", 2, 1, 3)), "at": (torch.int64, ["B"])}
WRITE = make_node("TensorScatter", ["past", "new", "at"], ["present"], "write", axis=2)
DOUBLE = make_node("Add", ["present", "present"], ["double"], "double")


def step(rows: int = 2) -> dict[str, torch.Tensor]:
    """Return inputs of the graphs of one write."""
    return {"past": normal(rows, 2, 5, 3), "new": normal(rows, 2, 1, 3), "at": torch.arange(rows) + 1}


def written(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the cache after the write."""
    expected = inputs["past"].clone()
    for row, position in enumerate(inputs["at"].tolist()):
        expected[row, :, position] = inputs["new"][row, :, 0]
    return expected


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the nodes in the order in which they run."""
    seen: list[str] = []
    original = engine._call

    def record(node: Any, in_place: Any) -> Callable[..., Any]:
        call = original(node, in_place)

        def run(*inputs: Any) -> Any:
            seen.append(node.name.split(" ")[0])
            return call(*inputs)

        return run

    monkeypatch.setattr(engine, "_call", record)
    return seen


def test_a_bound_cache_is_written_in_place(tmp_path: Path) -> None:
    """Neither the cache nor its copy is allocated, and later nodes read the new entries."""
    run = Executor(read_graph(write_graph(tmp_path, [WRITE, DOUBLE], STEP, ["present", "double"]), {}), CPU)
    inputs = step()
    expected, cache, double = written(inputs), inputs["past"], torch.empty(2, 2, 5, 3)
    for _ in range(2):
        found = run.run(inputs, {"present": cache, "double": double})
        assert found["present"] is cache
        assert found["double"] is double
        assert torch.equal(cache, expected)
        assert torch.equal(double, 2 * expected)
        inputs["new"].add_(1)
        inputs["at"].add_(1)
        expected = written(inputs)


def test_other_caches_are_not(tmp_path: Path) -> None:
    """Without a tensor to write to, or with another one, the input stays as it is."""
    run = Executor(read_graph(write_graph(tmp_path, [WRITE], STEP, ["present"]), {}), CPU)
    inputs, target = step(), torch.zeros(2, 2, 5, 3)
    before, expected = inputs["past"].clone(), written(inputs)
    for outputs in ({}, {"present": target}, {}, {"present": target}):
        target.zero_()
        found = run.run(inputs, outputs)["present"]
        assert torch.equal(found, expected)
        assert (found is target) is bool(outputs)
        assert torch.equal(inputs["past"], before)
    run.run(inputs, {"present": inputs["past"]})  # of the same shapes, but in place
    assert torch.equal(inputs["past"], expected)


@pytest.mark.parametrize("late", [True, False], ids=["after", "before"])
def test_a_cache_that_another_node_reads(late: bool, tmp_path: Path) -> None:
    """A node that reads the cache as it was must not see the new entries, not even through a view."""
    view = make_node("Transpose", ["past"], ["turned"], perm=[0, 1, 3, 2])
    reader = make_node("Relu", ["turned"], ["old"])
    nodes = [view, WRITE, reader] if late else [view, reader, WRITE]
    run = Executor(read_graph(write_graph(tmp_path, nodes, STEP, ["present", "old"]), {}), CPU)
    for _ in range(2):
        inputs = step()
        old, expected = inputs["past"].mT.relu(), written(inputs)
        found = run.run(inputs, {"present": inputs["past"]})
        assert torch.equal(found["old"], old)
        assert torch.equal(inputs["past"], expected)


ONCE, ALWAYS = ["shape", "length", "range", "numbers"], ["add", "product"]
ALL_STAY = ((2, ONCE + ALWAYS), (2, ALWAYS), (5, ONCE + ALWAYS), (2, ALWAYS), (5, ALWAYS))
TWO_STAY = ((2, ONCE + ALWAYS), (5, ONCE + ALWAYS), (7, ONCE + ALWAYS), (5, ALWAYS), (2, ONCE + ALWAYS))


@pytest.mark.parametrize(("max_programs", "runs"), [(None, ALL_STAY), (2, TWO_STAY)])
def test_nodes_on_constants_and_shapes_run_once(
    max_programs: int | None, runs: Sequence[tuple[int, list[str]]], tmp_path: Path, calls: list[str]
) -> None:
    """Constants are folded when the graph is opened, shapes once for all inputs of the same shapes that stay."""
    nodes = [
        make_node("Transpose", ["w"], ["turned"], "weight"),
        make_node("Shape", ["x"], ["lengths"], "shape"),
        make_node("Gather", ["lengths", "one"], ["length"], "length"),
        make_node("Range", ["zero", "length", "step"], ["range"], "range"),
        make_node("Cast", ["range"], ["numbers"], "numbers", to=1),
        make_node("Add", ["x", "numbers"], ["sum"], "add"),
        make_node("MatMul", ["sum", "turned"], ["y"], "product"),
    ]
    scalars = [to_onnx(name, torch.tensor(value)) for name, value in (("zero", 0), ("one", 1), ("step", 1))]
    weight = normal(4, 3)
    path = write_graph(tmp_path, nodes, {"x": (torch.float32, ["B", 3])}, ["y"], [to_onnx("w", weight), *scalars])
    run = Executor(read_graph(path, {}), CPU, max_programs)
    assert calls == ["weight"]
    calls.clear()
    for rows, expected in runs:
        x = normal(rows, 3)
        found = run.run({"x": x, "ignored": x})
        assert calls == expected
        calls.clear()
        torch.testing.assert_close(found["y"], (x + torch.arange(3)) @ weight.T)


def test_values_are_dropped_after_their_last_use(tmp_path: Path) -> None:
    """No more than two of a chain's values are alive at once."""
    names = ["x", *(f"v{index}" for index in range(6)), "y"]
    nodes = [make_node("Neg", [first], [second]) for first, second in pairwise(names)]
    nodes.insert(3, make_node("Shape", ["v1"], ["length"]))
    run = Executor(read_graph(write_graph(tmp_path, nodes, {"x": (torch.float32, [2])}, ["y", "length"]), {}), CPU)
    feeds = {"x": normal(2)}
    run.run(feeds)
    (program,) = run._programs.values()
    values = dict(feeds)
    most = 0
    for node in program.steps:
        node.run(values)
        most = max(most, len(values))
    assert most <= 2
    assert list(values) == ["y"]


def test_outputs_that_no_step_computes(tmp_path: Path) -> None:
    """Outputs may be constants, follow from shapes, or be inputs."""
    nodes = [make_node("Shape", ["x"], ["length"]), make_node("Neg", ["w"], ["negative"])]
    path = write_graph(
        tmp_path, nodes, {"x": (torch.float32, ["N"])}, ["length", "negative", "x"], [to_onnx("w", ints(3))]
    )
    run, target = Executor(read_graph(path, {}), CPU), ints(0)
    for length in (2, 3, 2):
        found = run.run({"x": normal(length)}, {"negative": target})
        assert found["length"].tolist() == [length]
        assert found["negative"] is target
        assert target.tolist() == [-3]
        assert found["x"].shape == (length,)
        target.zero_()


def test_outputs_that_nothing_reads(tmp_path: Path) -> None:
    """They may have names, as may the outputs of nodes that only they depend on, or that the engine can't make."""
    nodes = [
        make_node("TopK", ["x", "k"], ["values", "indices"]),
        make_node("Cast", ["indices"], ["unused"], to=1),
        make_node("SkipLayerNormalization", ["values", "values", "w"], ["y", "m", "d", "s"], domain="com.microsoft"),
    ]
    weights = [to_onnx("k", ints(3)), to_onnx("w", torch.ones(3))]
    run = Executor(read_graph(write_graph(tmp_path, nodes, {"x": (torch.float32, [1, 2, 5])}, ["y"], weights), {}), CPU)
    x = normal(1, 2, 5)
    expected = torch.nn.functional.layer_norm(2 * x.topk(3).values, (3,))
    for _ in range(2):
        torch.testing.assert_close(run.run({"x": x})["y"], expected)


def test_shapes_that_depend_on_data(tmp_path: Path) -> None:
    """What is selected may be of another number in every run."""
    nodes = [
        make_node("NonZero", ["x"], ["indices"]),
        make_node("Shape", ["indices"], ["count"], start=1),
        make_node("Expand", ["one", "count"], ["ones"]),
        make_node("Transpose", ["indices"], ["turned"]),
        make_node("GatherND", ["x", "turned"], ["selected"]),
        make_node("Add", ["ones", "selected"], ["y"]),
    ]
    path = write_graph(tmp_path, nodes, {"x": (torch.float32, [4])}, ["y"], [to_onnx("one", torch.ones(1))])
    run = Executor(read_graph(path, {}), CPU)
    assert run.obstacle is not None
    for values in ([1.0, 0.0, 2.0, 0.0], [0.0] * 4, [5.0, 6.0, 7.0, 8.0]):
        found = run.run({"x": torch.tensor(values)})["y"]
        assert found.tolist() == [value + 1 for value in values if value]


def test_gradients_are_not_recorded(tmp_path: Path) -> None:
    run = Executor(read_graph(write_graph(tmp_path, [WRITE], STEP, ["present"]), {}), CPU)
    inputs = step()
    inputs["past"].requires_grad_()
    assert not run.run(inputs)["present"].requires_grad


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"at": None}, "the input 'at' is missing. Inputs: past, new, at"),
        ({"at": ints(1, 2).int()}, "the input 'at' is of torch.int32 on cpu, not of torch.int64 on cpu"),
        ({"new": torch.empty(2, 2, 1, 3, device="meta")}, "the input 'new' is of torch.float32 on meta, not of"),
        ({"new": normal(2, 2, 1, 4)}, r"node write \(TensorScatter\) can't run: Expected index"),
    ],
)
def test_what_is_refused(changes: dict[str, torch.Tensor | None], message: str, tmp_path: Path) -> None:
    run = Executor(read_graph(write_graph(tmp_path, [WRITE], STEP, ["present"]), {}), CPU)
    feeds = {name: value for name, value in (step() | changes).items() if value is not None}
    with pytest.raises(AccelError, match=message):
        run.run(feeds)
    assert torch.equal(run.run(step())["present"], written(step()))  # usable after an error


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({"past": normal(2, 2, 5, 3)}, "there is no output 'past'. Outputs: present"),
        (
            {"present": normal(3, 2, 2, 5, 3)},
            r"the output 'present' has the shape \[2, 2, 5, 3\], not \[3, 2, 2, 5, 3\]",
        ),
    ],
    ids=["name", "shape"],
)
def test_tensors_to_write_to(outputs: dict[str, torch.Tensor], message: str, tmp_path: Path) -> None:
    run = Executor(read_graph(write_graph(tmp_path, [WRITE], STEP, ["present"]), {}), CPU)
    with pytest.raises(AccelError, match=message):
        run.run(step(), outputs)
