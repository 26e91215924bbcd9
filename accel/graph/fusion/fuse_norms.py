"""A norm by the root of the mean square, written as a chain of elementwise nodes, becomes one node.

The node is ONNX Runtime's `SimplifiedLayerNormalization`, which stands in the standard domain there and has kernels on
CPU and CUDA. It computes in FP32 whatever the type of its input (`stash_type`), so it needs none of the care that a
chain needs in FP16: the squares can't overflow, nor the mean vanish under the root.
Operator: https://github.com/microsoft/onnxruntime/blob/main/onnxruntime/core/graph/contrib_ops/contrib_defs.cc
(onnxscript's rule for it knows one spelling of the chain, and takes any factor for the weight.)
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir import convenience
from onnx_ir.passes.common import RemoveUnusedNodesPass

from accel.graph.precision.formats import FLOAT
from accel.graph.shapes import dims, is_vector, made_by, scalar

NORM = "SimplifiedLayerNormalization"


@dataclass
class Chain:
    """x / sqrt(mean(x * x) + epsilon), and the nodes that compute it."""

    x: ir.Value
    epsilon: float
    nodes: set[ir.Node]


def fuse_norms(models: Sequence[ir.Model]) -> None:
    """In place: `weight * x / sqrt(mean(x * x) + epsilon)` over the last axis, in any of its spellings, is one node.

    The weight has one axis, as long as the last one of x. A chain of which another node reads a part is left alone.
    """
    for model in models:
        for node in list(model.graph):
            if node.op_type == "Mul" and node.domain == "":
                for normed, weight in (tuple(node.inputs), tuple(reversed(node.inputs))):
                    chain = _chain(normed)
                    if chain is not None and weight is not None and _fits(chain, weight, node):
                        _fuse(node, chain, weight)
                        break
        RemoveUnusedNodesPass()(model)


def _fits(chain: Chain, weight: ir.Value, last: ir.Node) -> bool:
    shape = dims(chain.x)
    if not shape or not is_vector(weight, shape[-1]) or {chain.x.dtype, weight.dtype} != {FLOAT}:
        return False
    inside = chain.nodes | {last}
    return not any(
        value.is_graph_output() or not inside.issuperset(value.consumers())
        for node in chain.nodes
        for value in node.outputs
    )


def _fuse(node: ir.Node, chain: Chain, weight: ir.Value) -> None:
    old, graph = node.outputs[0], node.graph
    made = ir.Value(name=old.name, type=ir.TensorType(FLOAT), shape=chain.x.shape)
    attributes = {"axis": -1, "epsilon": chain.epsilon, "stash_type": int(FLOAT)}
    norm = ir.node(NORM, [chain.x, weight], attributes=attributes, outputs=[made], name=node.name)
    if graph is not None:
        graph.insert_before(node, norm)
        convenience.replace_all_uses_with(old, made, replace_graph_outputs=True)
        graph.remove(node, safe=True)


def _chain(normed: ir.Value | None) -> Chain | None:
    """The chain that ends in `normed`: x times an inverse root, or x divided by a root."""
    node = made_by(normed, "Mul", "Div")
    if node is None:
        return None
    first, second = node.inputs
    found = (
        [(first, _root(second))] if node.op_type == "Div" else [(first, _inverse(second)), (second, _inverse(first))]
    )
    for x, under in found:
        if x is not None and under is not None:
            variance, nodes = under
            for chain in _mean_square(variance, x):
                chain.nodes |= {node, *nodes}
                return chain
    return None


Under = tuple[ir.Value | None, list[ir.Node]]  # what stands under a root, and the nodes of the root


def _root(value: ir.Value | None) -> Under | None:
    """sqrt(v), v ** 0.5"""
    node = made_by(value, "Sqrt", "Pow")
    if node is None or (node.op_type == "Pow" and scalar(node.inputs[1]) != 0.5):
        return None
    return node.inputs[0], [node]


def _inverse(value: ir.Value | None) -> Under | None:
    """1 / sqrt(v), v ** -0.5"""
    node = made_by(value, "Reciprocal", "Div", "Pow")
    if node is None:
        return None
    if node.op_type == "Pow":
        return (node.inputs[0], [node]) if scalar(node.inputs[1]) == -0.5 else None
    if node.op_type == "Div" and scalar(node.inputs[0]) != 1.0:
        return None
    under = _root(node.inputs[-1])
    return (under[0], [*under[1], node]) if under is not None else None


def _mean_square(variance: ir.Value | None, x: ir.Value) -> Iterator[Chain]:
    """mean(x * x) + epsilon over the last axis, which is kept."""
    add = made_by(variance, "Add")
    for average, epsilon in () if add is None else (tuple(add.inputs), tuple(reversed(add.inputs))):
        mean, number = made_by(average, "ReduceMean"), scalar(epsilon)
        if add is None or mean is None or number is None or number < 0 or not _over_last(mean):
            continue
        square = made_by(mean.inputs[0], "Pow", "Mul")
        if square is None or square.inputs[0] is not x:
            continue
        if square.inputs[1] is x if square.op_type == "Mul" else scalar(square.inputs[1]) == 2.0:
            yield Chain(x, number, {add, mean, square})


def _over_last(mean: ir.Node) -> bool:
    shape = dims(mean.inputs[0])
    axes = scalar(mean.inputs[1]) if len(mean.inputs) > 1 else None
    return shape is not None and axes in (-1, len(shape) - 1) and mean.attributes.get_int("keepdims", 1) == 1
