"""Small graphs in ONNX text, planned, and run by the plan and by ONNX Runtime."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx.parser
import torch
from torch import Tensor

from accel.engine.dtypes import DTYPES
from accel.engine.executor import Executor
from accel.engine.nodes import Node, read_graph
from accel.engine.planning.planner import DOMAIN, Plan, plan
from tests.engine.one_node import CPU, reference, to_onnx

HEADER = '<ir_version: 10, opset_import: ["" : 24, "com.microsoft" : 1]>'
LENGTHS = {"B": 4, "S": 9}  # others than those of the planner's examples


def write(body: str, weights: Mapping[str, Tensor], folder: Path) -> Path:
    """Write a graph with initializers to a file, and return its path."""
    model = onnx.parser.parse_model(f"{HEADER}\n{body}")
    model.graph.initializer.extend(to_onnx(name, weight) for name, weight in weights.items() if name in body)
    path = folder / "graph.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def inputs_of(path: Path) -> dict[str, tuple[torch.dtype, tuple[int | str, ...]]]:
    """Return a graph's inputs with dtypes and shapes."""
    found = {}
    for value in onnx.load(path).graph.input:
        kind = value.type.tensor_type
        axes = tuple(axis.dim_param or axis.dim_value for axis in kind.shape.dim)
        found[value.name] = (DTYPES[kind.elem_type], axes)
    return found


def planned(body: str, weights: Mapping[str, Tensor], folder: Path) -> Plan:
    """Return the plan of a graph whose batch axis is `B`."""
    path = write(body, weights, folder)
    shapes = {name: axes for name, (_, axes) in inputs_of(path).items()}
    return plan(read_graph(path, {}), shapes, "B", {})


def compared(
    body: str,
    weights: Mapping[str, Tensor],
    folder: Path,
    feeds: Mapping[str, Tensor] | None = None,
    rtol: float = 1e-5,
) -> Plan:
    """Return a graph's plan, whose outputs must be those of ONNX Runtime, in the first run and in the next.

    Args:
        body: The graph.
        weights: Name -> initializer; those that the graph doesn't name are left out.
        folder: Folder for the file.
        feeds: Inputs; others are random numbers.
        rtol: Tolerance, of the largest magnitude of an output.
    """
    result = planned(body, weights, folder)
    path, generator = folder / "graph.onnx", torch.Generator().manual_seed(5)
    values = dict(feeds or {})
    for name, (dtype, axes) in inputs_of(path).items():
        shape = [LENGTHS.get(axis, axis) if isinstance(axis, str) else axis for axis in axes]
        if name not in values:
            values[name] = torch.randn(shape, generator=generator).to(dtype)
    expected = reference(path, values)
    executor = Executor(result.graph, CPU)
    for _ in range(2):
        found = executor.run({name: value.clone() for name, value in values.items()})
        assert set(found) == set(expected)
        for name, value in expected.items():
            assert found[name].dtype is value.dtype, name
            assert found[name].shape == value.shape, name
            difference = (found[name].float() - value.float()).abs().max()
            assert difference <= rtol * value.float().abs().max(), f"{name} differs by {difference}"
    return result


def operations(result: Plan) -> list[str]:
    """Return the names of a plan's fused operations, in order."""
    return [node.kind[1] for node in result.graph.nodes if node.kind[0] == DOMAIN]


def specs(result: Plan) -> list[Any]:
    """Return the specifications of a plan's fused operations, in order."""
    return [node.attributes["spec"] for node in result.graph.nodes if node.kind[0] == DOMAIN]


def others(result: Plan) -> list[str]:
    """Return the operators of the nodes that run in torch at every step, in order."""

    def runs(node: Node) -> bool:
        return node.kind[0] != DOMAIN and any(name in result.graph.runtime for name in node.outputs)

    return [node.kind[1] for node in result.graph.nodes if runs(node)]
