"""A graph as the executor reads it: nodes with their operators and attributes, and the values that it has from start.

Nodes are of three kinds. Those that compute constants from constants run once. Those that compute only from the shapes
of the inputs run once for these shapes. All others run in every step: they compute at run time.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from accel.engine.dtypes import dtype_of, to_torch
from accel.engine.operators import find_operator
from accel.engine.registry import Operator
from accel.errors import AccelError

if TYPE_CHECKING:
    import onnx_ir as ir

SHAPE = ("", "Shape")
MIN_OPSET = 18  # the first in which all operators have the inputs and attributes that the functions take


@dataclass(frozen=True)
class Node:
    """A node.

    Attributes:
        name: Its name and operator, for messages.
        kind: Domain and name of its operator.
        operator: The operator.
        attributes: Attribute -> value, for the operator's function.
        inputs: Names of its inputs; empty for one that is left out.
        outputs: Names of its outputs; empty for one that nothing reads.
    """

    name: str
    kind: tuple[str, str]
    operator: Operator
    attributes: Mapping[str, Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Graph:
    """A graph.

    Attributes:
        nodes: Its nodes in an order in which they can run, without those of `Constant`.
        inputs: Input -> dtype.
        outputs: Names of its outputs.
        constants: Initializers and constants, by name. Those from the ONNX file are on the CPU.
        runtime: Names of the values that depend on the inputs' values, not only on their shapes.
        unknown: Those of them whose shapes depend on values.
        obstacle: Reason why runs of the graph can't be captured as a CUDA graph: a node whose output's shape depends on
            data. None if they can.
    """

    nodes: list[Node]
    inputs: dict[str, torch.dtype]
    outputs: list[str]
    constants: dict[str, Tensor]
    runtime: set[str] = field(default_factory=set)
    unknown: set[str] = field(default_factory=set)
    obstacle: str | None = None


@dataclass(frozen=True)
class ValueSpec:
    """What a graph says of an input or output.

    Attributes:
        axes: Lengths of its axes, or their symbols where the length isn't fixed; None for an axis that has neither.
        dtype: Type of its elements.
    """

    axes: tuple[int | str | None, ...]
    dtype: torch.dtype


def read_graph(path: Path, weights: Mapping[str, Tensor]) -> Graph:
    """Read a graph.

    Args:
        path: The ONNX file. Its external data file is not read.
        weights: Initializer in the external data file -> tensor.

    Raises:
        AccelError: The engine doesn't support an operator, an attribute or an element type in it, its opset is too old,
            or a weight is neither in the file nor in `weights`.
    """
    import onnx_ir as ir  # here, because it takes long and only a model that runs on the engine needs it

    model = ir.load(path)
    opset = model.opset_imports.get("", MIN_OPSET)
    if opset < MIN_OPSET:
        raise AccelError(f"{path.name} has opset {opset}: the engine needs {MIN_OPSET} or later")
    constants = {name: _initializer(value, weights) for name, value in model.graph.initializers.items() if value.uses()}
    nodes = []
    for node in model.graph:
        if node.op_type == "Constant" and node.domain == "":
            constants[node.outputs[0].name or ""] = _constant(node)
        else:
            nodes.append(_node(node))
    nodes = [node for node in nodes if any(node.outputs)]
    inputs = {
        value.name or "": dtype_of(None if value.dtype is None else int(value.dtype), value.name or "")
        for value in model.graph.inputs
        if value.name not in model.graph.initializers
    }
    graph = Graph(nodes, inputs, [value.name or "" for value in model.graph.outputs], constants)
    return classify(graph)


def value_specs(path: Path) -> tuple[dict[str, ValueSpec], dict[str, ValueSpec]]:
    """Return what a graph says of its inputs and of its outputs, by name.

    Raises:
        AccelError: The engine doesn't support an element type.
    """
    import onnx_ir as ir

    graph = ir.load(path).graph
    initializers = graph.initializers
    inputs = {value.name or "": _spec(value) for value in graph.inputs if value.name not in initializers}
    return inputs, {value.name or "": _spec(value) for value in graph.outputs}


def graph_inputs(path: Path) -> dict[str, tuple[int | str | None, ...]]:
    """Return the axes of a graph's inputs: see `ValueSpec`."""
    return {name: spec.axes for name, spec in value_specs(path)[0].items()}


def _spec(value: "ir.Value") -> ValueSpec:
    """Return what a graph says of a value."""
    axes = tuple(axis if isinstance(axis, int) else axis.value for axis in value.shape or ())
    return ValueSpec(axes, dtype_of(None if value.dtype is None else int(value.dtype), value.name or ""))


def _initializer(value: "ir.Value", weights: Mapping[str, Tensor]) -> Tensor:
    """Return the tensor of an initializer."""
    import onnx_ir as ir

    name = value.name or ""
    if name in weights:
        return weights[name]
    if value.const_value is None or isinstance(value.const_value, ir.ExternalTensor):
        raise AccelError(f"the weight {name} is not in the ONNX file, and was not handed over")
    return to_torch(value.const_value, name)


def _constant(node: "ir.Node") -> Tensor:
    """Return the tensor of a `Constant` node."""
    import onnx_ir as ir

    ((name, attribute),) = node.attributes.items()
    if attribute.type == ir.AttributeType.TENSOR:
        return to_torch(attribute.as_tensor(), f"node {node.name}")
    if name in ("value_int", "value_ints"):
        return torch.tensor(attribute.value, dtype=torch.int64)
    if name in ("value_float", "value_floats"):
        return torch.tensor(attribute.value, dtype=torch.float32)
    raise AccelError(f"node {node.name} (Constant): the attribute {name!r} is not supported")


def _node(node: "ir.Node") -> Node:
    """Return a node, checked against its operator's function."""
    name = f"{node.name} ({node.op_type})"
    operator = find_operator(node.domain, node.op_type, node.name or "")
    signature = inspect.signature(operator.function)
    for attribute in node.attributes:
        if attribute not in operator.attributes:
            known = ", ".join(operator.attributes) or "none"
            raise AccelError(f"node {name}: the attribute {attribute!r} is not supported. Supported: {known}")
    if len(node.inputs) > operator.max_inputs:
        names = ", ".join(signature.parameters)
        raise AccelError(f"node {name}: {len(node.inputs)} inputs are not supported. Supported: {names}")
    inputs = tuple((value.name or "") if value is not None else "" for value in node.inputs)
    outputs = tuple((value.name or "") if value.uses() or value.is_graph_output() else "" for value in node.outputs)
    values = {key: attribute.value for key, attribute in node.attributes.items()}
    return Node(name, (node.domain, node.op_type), operator, values, inputs, outputs)


def classify(graph: Graph) -> Graph:
    """Return the graph with the sets of values that are known at run time only, or whose shapes are."""
    runtime, unknown = set(graph.inputs), set[str]()
    obstacle = None
    for node in graph.nodes:
        values = [name for name in node.inputs if name in runtime]
        shape_inputs = {node.inputs[index] for index in node.operator.host if index < len(node.inputs)}
        by_values = bool(shape_inputs & runtime) or (node.operator.data_dependent and bool(values))
        if by_values and obstacle is None:
            obstacle = f"node {node.name} has an output shape that depends on its input's values"
        if node.kind == SHAPE:
            values = [name for name in values if name in unknown]
        elif by_values or unknown.intersection(node.inputs):
            unknown.update(node.outputs)
        if values:
            runtime.update(node.outputs)
    return Graph(graph.nodes, graph.inputs, graph.outputs, graph.constants, runtime - {""}, unknown - {""}, obstacle)
