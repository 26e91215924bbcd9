"""Merge strategies two_branch and three_branch: whole graphs as the branches of an ONNX `If`, every weight stored once.

The condition is a boolean input, or whether there is exactly one new token. Weights become initializers of the outer
graph, which both branches can read. Lengths, axes and scalars stay in the branch that reads them: ONNX Runtime keeps
the outer graph's initializers on the device, and would copy one that an operator needs on the host at every run.
ONNX specification: https://onnx.ai/onnx/operators/onnx__If.html
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir import convenience

from accel.graph.build import add_node
from accel.graph.weights import fingerprint, initializers

SMALL = 8  # elements: initializers up to this size (lengths, axes, scalars) stay in their branch


def merge_if(when_true: ir.Model, when_false: ir.Model, flag: str) -> ir.Model:
    """Merge two models into one that runs the first or the second, depending on a boolean input.

    The merged model has the inputs of both, by name, and the outputs of `when_false`. An output that `when_true` lacks
    has length 0 on every dynamic axis when the flag is true; the caller then keeps the value it has.

    Args:
        when_true: Model to run if the flag is true. Unusable afterwards: its nodes become part of the result.
        when_false: Model to run if the flag is false. Unusable afterwards.
        flag: Name of the boolean input.

    Raises:
        ValueError: An input, output or opset of one model contradicts the other's, or an input has the flag's name.
    """
    inputs = join_inputs(when_false.graph.inputs, when_true.graph.inputs, flag)
    return _merge(when_true, when_false, inputs, [], inputs[flag], ("with_past", "without_past"))


def fork_if(single: ir.Model, several: ir.Model, symbol: str) -> ir.Model:
    """Merge two models into one that runs the first where an axis has length 1, and else the second.

    Args:
        single: Model for length 1, derived from `several`: same outputs, and no other inputs. Unusable afterwards.
        several: Model for any length. Unusable afterwards.
        symbol: Symbolic dimension of the axis in the inputs of `several`, such as that of new tokens.

    Raises:
        ValueError: No input of `several` has such an axis, or the models contradict each other: see `merge_if`.
    """
    inputs = _join(several.graph.inputs)
    input_name, axis = _find_axis(several, symbol)
    # The condition: whether the length, a vector of one element, is 1.
    length = ir.node("Shape", [inputs[input_name]], {"start": axis, "end": axis + 1}, name="length")
    one = ir.node("Constant", [], {"value": ir.tensor(np.ones(1, np.int64))}, name="one")
    is_one = ir.node("Equal", [length.outputs[0], one.outputs[0]], name="is_one")
    nodes = [length, one, is_one]
    for node in nodes:
        node.outputs[0].name = node.name
    return _merge(single, several, inputs, nodes, is_one.outputs[0], ("one_token", "tokens"))


def _find_axis(model: ir.Model, symbol: str) -> tuple[str, int]:
    """Return the name of the first input with the dimension `symbol`, and the axis.

    Raises:
        ValueError: No input has it.
    """
    for value in model.graph.inputs:
        for axis, dim in enumerate(value.shape or ()):
            if not isinstance(dim, int) and dim.value == symbol:
                return value.name or "", axis
    raise ValueError(f"no input has an axis {symbol!r}")


def _merge(
    when_true: ir.Model,
    when_false: ir.Model,
    inputs: Mapping[str, ir.Value],
    condition_nodes: Sequence[ir.Node],
    condition: ir.Value,
    branch_names: tuple[str, str],
) -> ir.Model:
    """Return a model that consists of an `If` whose branches are the two models.

    Args:
        when_true: Model that becomes the branch `then_branch`.
        when_false: Model that becomes the branch `else_branch`.
        inputs: Inputs of the merged graph by name.
        condition_nodes: Nodes that compute the condition from the inputs.
        condition: Condition of the `If`.
        branch_names: Names of the two branches, which prefix all names inside.
    """
    true_outputs = [output.name or "" for output in when_true.graph.outputs]
    outputs = {output.name or "": output for output in when_false.graph.outputs}
    for name in (*true_outputs, *outputs):
        if name not in outputs:
            raise ValueError(f"output {name!r} of the first branch is missing from the second")
        if name in inputs:
            raise ValueError(f"output {name!r} is also an input; a merged graph needs another name for one of them")
    if_outputs = [_if_output(value) for value in outputs.values()]
    # Values are renamed from here on: outputs are identified by their position in `true_outputs` and `outputs`.
    shared_weights = share_weights((when_false, when_true), smallest=SMALL + 1)
    branches = {
        "then_branch": _make_branch(when_true, branch_names[0], true_outputs, outputs, inputs),
        "else_branch": _make_branch(when_false, branch_names[1], list(outputs), outputs, inputs),
    }
    hoisted = _hoist_constants(branches.values())
    if_node = ir.node("If", [condition], attributes=branches, outputs=if_outputs, name="decoder")
    graph = ir.Graph(
        list(inputs.values()),
        if_node.outputs,
        nodes=[*condition_nodes, *hoisted, if_node],
        initializers=shared_weights,
        opset_imports=join_opsets(when_true, when_false),
        name="merged",
    )
    return ir.Model(graph, ir_version=max(when_true.ir_version, when_false.ir_version), producer_name="accel")


def join_inputs(first: Iterable[ir.Value], second: Iterable[ir.Value], flag: str) -> dict[str, ir.Value]:
    """Return new inputs for a merged graph, by name: those of both graphs, and a boolean scalar last.

    Args:
        first: Inputs of one graph.
        second: Inputs of the other graph. Where both have an input, its symbolic dimensions are named as here.
        flag: Name of the boolean input.

    Raises:
        ValueError: Two inputs of one name differ in dtype, rank or a fixed dimension, or the flag's name is taken.
    """
    joined = _join([*first, *second])
    if flag in joined:
        raise ValueError(
            f"the flag can't be named {flag!r}: the graphs have an input of that name; choose any name but "
            f"{', '.join(sorted(joined))}"
        )
    joined[flag] = ir.Value(name=flag, type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
    return joined


def _join(values: Iterable[ir.Value]) -> dict[str, ir.Value]:
    """Return a new value for each name, like the last of the values of that name, which must agree."""
    joined: dict[str, ir.Value] = {}
    for value in values:
        name = value.name or ""
        other = joined.get(name, value)
        if other.dtype != value.dtype or _fixed_dims(other) != _fixed_dims(value):
            raise ValueError(
                f"input {name!r} is {other.dtype}{other.shape} in one graph and {value.dtype}{value.shape} in the other"
            )
        joined[name] = ir.Value(name=name, type=value.type, shape=value.shape)
    return joined


def _fixed_dims(value: ir.Value) -> list[int | None] | None:
    """Return the shape with None for symbolic dimensions, whose names may differ between graphs; None if unknown."""
    return None if value.shape is None else [dim if isinstance(dim, int) else None for dim in value.shape]


def join_opsets(first: ir.Model, second: ir.Model) -> dict[str, int]:
    """Return the opset versions that two models import, by domain.

    Raises:
        ValueError: They import different versions of one opset.
    """
    opsets = dict(first.opset_imports)
    for domain, version in second.opset_imports.items():
        if opsets.setdefault(domain, version) != version:
            raise ValueError(
                f"opset {domain or 'ai.onnx'!r} is {opsets[domain]} in one graph and {version} in the other"
            )
    return opsets


def share_weights(models: Sequence[ir.Model], smallest: int = 0) -> list[ir.Value]:
    """Take initializers out of their graphs, in place, and replace those of equal content by one value.

    Args:
        models: Models to take initializers from, subgraphs included.
        smallest: Size in elements below which initializers stay where they are.

    Returns:
        One value for each distinct content, under a name that no other value has. The caller registers them in an
        outer graph.

    Raises:
        ValueError: An initializer has the name of a graph input, which could override it.
    """
    shared: dict[tuple[str, tuple[int, ...], str], ir.Value] = {}
    names = {value.name or "" for model in models for node in model.graph.all_nodes() for value in node.outputs}
    for model in models:
        input_names = {value.name for value in model.graph.inputs}
        for value in initializers(model):
            graph = value.graph
            if graph is None or value.name in input_names:
                raise ValueError(f"initializer {value.name!r} is also an input; give it a name of its own")
            if value.const_value is not None and value.const_value.size < smallest:
                continue
            graph.initializers.pop(value.name or "")
            key = fingerprint(value)
            if key in shared:
                convenience.replace_all_uses_with(value, shared[key], replace_graph_outputs=True)
                continue
            value.name = _unused_name(value.name or "weight", names)
            shared[key] = value
            names.add(value.name)
    return list(shared.values())


def _unused_name(name: str, taken: set[str]) -> str:
    """Return `name`, or if it is taken `name.2`, `name.3` and so on."""
    number = 1
    candidate = name
    while candidate in taken:
        number += 1
        candidate = f"{name}.{number}"
    return candidate


def _make_branch(
    model: ir.Model,
    name: str,
    own_outputs: Sequence[str],
    outputs: Mapping[str, ir.Value],
    inputs: Mapping[str, ir.Value],
) -> ir.Graph:
    """Turn a model's graph into a branch of an `If`: without inputs, and with the outputs of the `If`.

    Args:
        model: Model whose graph becomes the branch.
        name: Name of the branch.
        own_outputs: Original names of the graph's outputs, in their order.
        outputs: Outputs of the `If`, by name. Those that the graph lacks get length 0 on dynamic axes.
        inputs: Inputs of the outer graph, by name, which replace the graph's own.
    """
    graph = model.graph
    for value in graph.inputs:
        convenience.replace_all_uses_with(value, inputs[value.name or ""], replace_graph_outputs=True)
    graph.inputs.clear()
    positions = {output: position for position, output in enumerate(own_outputs)}
    branch_outputs: list[ir.Value] = []
    for output, like in outputs.items():
        if output not in positions:
            empty = empty_constant(like)
            graph.append(empty)
            branch_outputs.append(empty.outputs[0])
            continue
        value = graph.outputs[positions[output]]
        if value.producer() is None or value.graph is not graph or value in branch_outputs:
            # A branch must compute what it returns, and return each value once.
            value = add_node(graph, "Identity", [value], f"{output}.identity", dtype=value.dtype)
        branch_outputs.append(value)
    graph.outputs.clear()
    graph.outputs.extend(branch_outputs)
    graph.name = name
    _prefix_names(graph, name)
    return graph


def _hoist_constants(branches: Iterable[ir.Graph]) -> list[ir.Node]:
    """Remove nodes that read outer initializers alone, such as the transpose of a tied embedding, from their branches.

    Returns:
        Nodes to insert into the outer graph: one for each distinct computation.
    """
    hoisted: dict[tuple[object, ...], ir.Node] = {}
    for branch in branches:
        for node in list(branch):
            if not node.inputs or not all(value is not None and _is_outer(value, branch) for value in node.inputs):
                continue
            attributes = tuple(sorted((name, str(attribute.value)) for name, attribute in node.attributes.items()))
            key = (node.domain, node.op_type, tuple(node.inputs), attributes, len(node.outputs))
            first = hoisted.setdefault(key, node)
            branch.remove(node)
            if first is not node:
                convenience.replace_all_uses_with(node.outputs, first.outputs)
    return list(hoisted.values())


def _is_outer(value: ir.Value, branch: ir.Graph) -> bool:
    """Return whether `value` is an initializer outside the branch."""
    return value.is_initializer() and value.graph is not branch


def empty_constant(like: ir.Value) -> ir.Node:
    """Return a `Constant` node of the dtype and rank of a value, with length 0 on its dynamic axes.

    Raises:
        ValueError: The value's dtype or rank is unknown, or all its dimensions are fixed.
    """
    if like.shape is None or like.dtype is None:
        raise ValueError(f"output {like.name!r} is missing from one graph and of unknown type or rank in the other")
    shape = [dim if isinstance(dim, int) else 0 for dim in like.shape]
    if 0 not in shape:
        raise ValueError(f"output {like.name!r} is missing from one graph and has no dynamic axis in the other")
    tensor = ir.tensor(np.zeros(shape, like.dtype.numpy()), dtype=like.dtype)
    value = ir.Value(name=f"{like.name}.absent", type=like.type, shape=ir.Shape(shape))
    return ir.node("Constant", [], attributes={"value": tensor}, outputs=[value])


def _if_output(like: ir.Value) -> ir.Value:
    """Return an output for the `If`; each dynamic axis gets a new symbol, as its length may differ between branches."""
    shape = None
    if like.shape is not None:
        dims = [dim if isinstance(dim, int) else f"{like.name}.{axis}" for axis, dim in enumerate(like.shape)]
        shape = ir.Shape(dims)
    return ir.Value(name=like.name, type=like.type, shape=shape)


def _prefix_names(graph: ir.Graph, prefix: str) -> None:
    """Put `<prefix>/` before all names in a branch and its subgraphs, so that no two names in the model clash."""
    for number, node in enumerate(graph.all_nodes()):
        node.name = f"{prefix}/{node.name or f'{node.op_type}_{number}'}"
        for output in node.outputs:
            if output.name:  # an omitted optional output has none
                output.name = f"{prefix}/{output.name}"
    for inner in (graph, *graph.subgraphs()):
        for value in list(inner.initializers.values()):
            value.name = f"{prefix}/{value.name}"
