"""Two graphs with the same outputs become the branches of one ONNX `If`, with every weight stored once.

The condition is a boolean input, or whether there is one new token. Each weight is an initializer of the outer graph,
which both branches see. Lengths, axes and scalars stay in the branch that reads them: ONNX Runtime keeps the outer
graph's initializers on the device, and copies one that an operator wants on the host at every run.
ONNX specification: https://onnx.ai/onnx/operators/onnx__If.html
"""

from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir import convenience

from accel.graph.weights import fingerprint, initializers

SMALL = 8  # elements: lengths, axes, scalars


def merge_if(when_true: ir.Model, when_false: ir.Model, flag: str) -> ir.Model:
    """One model that runs `when_true` if the input `flag` holds, else `when_false`.

    Inputs are the union by name; outputs are those of `when_false`. An output that `when_true` lacks comes out of it
    with length 0 on every dynamic axis, and the caller keeps what it had. Both models are taken apart.
    Raises `ValueError` if an input, output or opset of one contradicts the other's, or `flag` is taken.
    """
    inputs = join_inputs(when_false.graph.inputs, when_true.graph.inputs, flag)
    return _choose(when_true, when_false, inputs, [], inputs[flag], ("with_past", "without_past"))


def fork_if(single: ir.Model, several: ir.Model, symbol: str) -> ir.Model:
    """One model that runs `single` where the axis `symbol` has length 1, else `several`; both are taken apart.

    `single` is made of `several`: it has the same outputs, and no other inputs. Raises `ValueError` if no input of
    `several` has the axis.
    """
    inputs = _union(several.graph.inputs)
    places = (
        (inputs[value.name or ""], axis)
        for value in several.graph.inputs
        for axis, dim in enumerate(value.shape or ())
        if not isinstance(dim, int) and dim.value == symbol
    )
    counted, axis = next(places, (None, 0))
    if counted is None:
        raise ValueError(f"no input has an axis {symbol!r}")
    length = ir.node("Shape", [counted], {"start": axis, "end": axis + 1}, name="length")
    one = ir.node("Constant", [], {"value": ir.tensor(np.ones(1, np.int64))}, name="one")
    is_one = ir.node("Equal", [length.outputs[0], one.outputs[0]], name="is_one")
    nodes = [length, one, is_one]
    for node in nodes:
        node.outputs[0].name = node.name
    return _choose(single, several, inputs, nodes, is_one.outputs[0], ("one_token", "tokens"))


def _choose(
    when_true: ir.Model,
    when_false: ir.Model,
    inputs: dict[str, ir.Value],
    before: Sequence[ir.Node],
    condition: ir.Value,
    names: tuple[str, str],
) -> ir.Model:
    """An `If` on `condition`, which the nodes `before` make of `inputs`; `names` of its branches."""
    made = {output.name or "": output for output in when_true.graph.outputs}
    types = {output.name or "": output for output in when_false.graph.outputs}
    for name in (*made, *types):
        if name not in types:
            raise ValueError(f"output {name!r} of the first branch is missing from the second")
        if name in inputs:
            raise ValueError(f"output {name!r} is also an input; a merged graph needs another name for one of them")
    results = [_output(value) for value in types.values()]
    # This may rename: from here on, outputs are known by position.
    initial = share_weights((when_false, when_true), smallest=SMALL + 1)
    branches = {
        "then_branch": _branch(when_true, names[0], list(made), types, inputs),
        "else_branch": _branch(when_false, names[1], list(types), types, inputs),
    }
    hoisted = _hoist(branches.values())
    node = ir.node("If", [condition], attributes=branches, outputs=results, name="decoder")
    graph = ir.Graph(
        list(inputs.values()),
        node.outputs,
        nodes=[*before, *hoisted, node],
        initializers=initial,
        opset_imports=join_opsets(when_true, when_false),
        name="merged",
    )
    return ir.Model(graph, ir_version=max(when_true.ir_version, when_false.ir_version), producer_name="accel")


def join_inputs(first: Iterable[ir.Value], second: Iterable[ir.Value], flag: str) -> dict[str, ir.Value]:
    """The union by name, as fresh values, and the flag last. Dynamic axes go by their names in `second`."""
    joined = _union([*first, *second])
    if flag in joined:
        raise ValueError(f"flag {flag!r} is already an input; choices: any name but {', '.join(sorted(joined))}")
    return joined | {flag: ir.Value(name=flag, type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))}


def _union(values: Iterable[ir.Value]) -> dict[str, ir.Value]:
    joined: dict[str, ir.Value] = {}
    for value in values:
        name = value.name or ""
        known = joined.get(name, value)
        if known.dtype != value.dtype or _fixed(known) != _fixed(value):
            raise ValueError(
                f"input {name!r} is {known.dtype}{known.shape} in one graph and {value.dtype}{value.shape} in the other"
            )
        joined[name] = ir.Value(name=name, type=value.type, shape=value.shape)
    return joined


def _fixed(value: ir.Value) -> list[int | None] | None:
    """The dimensions that are numbers. Dynamic ones may go by another name in each graph."""
    return None if value.shape is None else [dim if isinstance(dim, int) else None for dim in value.shape]


def join_opsets(first: ir.Model, second: ir.Model) -> dict[str, int]:
    opsets = dict(first.opset_imports)
    for domain, version in second.opset_imports.items():
        if opsets.setdefault(domain, version) != version:
            raise ValueError(
                f"opset {domain or 'ai.onnx'!r} is {opsets[domain]} in one graph and {version} in the other"
            )
    return opsets


def share_weights(models: Sequence[ir.Model], smallest: int = 0) -> list[ir.Value]:
    """Move initializers of `smallest` elements or more out of their graphs; equal ones become one value.

    Returns those that are left.
    """
    kept: dict[tuple[str, tuple[int, ...], str], ir.Value] = {}
    names = {value.name or "" for model in models for node in model.graph.all_nodes() for value in node.outputs}
    for model in models:
        outer = {value.name for value in model.graph.inputs}
        for value in initializers(model):
            graph = value.graph
            if graph is None or value.name in outer:
                raise ValueError(f"initializer {value.name!r} is also an input; give it a name of its own")
            if value.const_value is not None and value.const_value.size < smallest:
                continue
            graph.initializers.pop(value.name or "")
            mark = fingerprint(value)
            if mark in kept:
                convenience.replace_all_uses_with(value, kept[mark], replace_graph_outputs=True)
                continue
            value.name = _unused(value.name or "weight", names)
            kept[mark] = value
            names.add(value.name)
    return list(kept.values())


def _unused(name: str, taken: set[str]) -> str:
    number = 1
    candidate = name
    while candidate in taken:
        number += 1
        candidate = f"{name}.{number}"
    return candidate


def _branch(
    model: ir.Model, name: str, made: Sequence[str], types: dict[str, ir.Value], inputs: dict[str, ir.Value]
) -> ir.Graph:
    """The graph as a branch: no inputs of its own, the outputs of `types` in that order, every value named for it.

    `made` names the graph's own outputs, by position.
    """
    graph = model.graph
    for value in graph.inputs:
        convenience.replace_all_uses_with(value, inputs[value.name or ""], replace_graph_outputs=True)
    graph.inputs.clear()
    found = {output: position for position, output in enumerate(made)}
    wanted: list[ir.Value] = []
    for output in types:
        if output in found:
            value = graph.outputs[found[output]]
            if value.producer() is None or value.graph is not graph or value in wanted:
                value = _append(graph, "Identity", [value])  # a branch must produce what it returns, each value once
        else:
            node = absent(types[output])
            graph.append(node)
            value = node.outputs[0]
        wanted.append(value)
    graph.outputs.clear()
    graph.outputs.extend(wanted)
    graph.name = name
    _prefix(graph, name)
    return graph


def _append(graph: ir.Graph, op: str, values: Sequence[ir.Value]) -> ir.Value:
    node = ir.node(op, list(values))
    node.outputs[0].name = f"{values[0].name}.{op.lower()}"
    node.outputs[0].type = values[0].type
    graph.append(node)
    return node.outputs[0]


def _hoist(branches: Iterable[ir.Graph]) -> list[ir.Node]:
    """Take out of the branches what they compute from weights alone, such as the transpose of a tied embedding.

    Equal ones are computed once. Returns the nodes for the outer graph.
    """
    kept: dict[tuple[object, ...], ir.Node] = {}
    for branch in branches:
        for node in list(branch):
            if not node.inputs or not all(value is not None and _is_outer(value, branch) for value in node.inputs):
                continue
            attributes = tuple(sorted((name, str(attribute.value)) for name, attribute in node.attributes.items()))
            mark = (node.domain, node.op_type, tuple(node.inputs), attributes, len(node.outputs))
            first = kept.setdefault(mark, node)
            branch.remove(node)
            if first is not node:
                convenience.replace_all_uses_with(node.outputs, first.outputs)
    return list(kept.values())


def _is_outer(value: ir.Value, branch: ir.Graph) -> bool:
    return value.is_initializer() and value.graph is not branch


def absent(like: ir.Value) -> ir.Node:
    """A constant of the type and rank of `like`, of length 0 on its dynamic axes."""
    if like.shape is None or like.dtype is None:
        raise ValueError(f"output {like.name!r} is missing from one graph and of unknown type or rank in the other")
    shape = [dim if isinstance(dim, int) else 0 for dim in like.shape]
    if 0 not in shape:
        raise ValueError(f"output {like.name!r} is missing from one graph and has no dynamic axis in the other")
    tensor = ir.tensor(np.zeros(shape, like.dtype.numpy()), dtype=like.dtype)
    value = ir.Value(name=f"{like.name}.absent", type=like.type, shape=ir.Shape(shape))
    return ir.node("Constant", [], attributes={"value": tensor}, outputs=[value])


def _output(like: ir.Value) -> ir.Value:
    """An `If` output: the branches' lengths may differ, so every dynamic axis gets a symbol of its own."""
    shape = None
    if like.shape is not None:
        shape = ir.Shape(
            [dim if isinstance(dim, int) else f"{like.name}.{axis}" for axis, dim in enumerate(like.shape)]
        )
    return ir.Value(name=like.name, type=like.type, shape=shape)


def _prefix(graph: ir.Graph, prefix: str) -> None:
    """Put `<prefix>/` before every name made in `graph` or below, so that no two of the merged graph clash."""
    for number, node in enumerate(graph.all_nodes()):
        node.name = f"{prefix}/{node.name or f'{node.op_type}_{number}'}"
        for output in node.outputs:
            if output.name:
                output.name = f"{prefix}/{output.name}"
    for inner in (graph, *graph.subgraphs()):
        for value in list(inner.initializers.values()):
            value.name = f"{prefix}/{value.name}"
