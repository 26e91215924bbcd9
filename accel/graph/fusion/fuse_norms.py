"""Fuse RMS norms that are written as chains of elementwise nodes.

The fused node is ONNX Runtime's `SimplifiedLayerNormalization`, which ONNX Runtime defines in the standard domain, with
kernels on CPU and CUDA. It computes in FP32 whatever the type of its input (`stash_type`), so it needs none of the care
that a chain needs in FP16: the squares can't overflow, nor the mean vanish under the root.
Operator: https://github.com/microsoft/onnxruntime/blob/main/onnxruntime/core/graph/contrib_ops/contrib_defs.cc
(onnxscript's rule for it knows one spelling of the chain, and takes any factor for the weight.)
"""

from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir import convenience
from onnx_ir.passes import PassResult

from accel.graph.passes import GraphPass, NoMatchError, remove_unused
from accel.graph.precision.formats import FLOAT
from accel.graph.shapes import dims, is_vector, made_by, scalar

NORM = "SimplifiedLayerNormalization"


@dataclass
class Normalized:
    """x / sqrt(mean(x * x) + epsilon), and the nodes that compute it."""

    x: ir.Value
    epsilon: float
    nodes: set[ir.Node]


@dataclass
class Radicand:
    """A value of which a root is taken, and the nodes that compute the root, or one over it."""

    value: ir.Value | None
    nodes: list[ir.Node]


class FuseNorms(GraphPass):
    """Fuse `weight * x / sqrt(mean(x * x) + epsilon)` over the last axis, in any of its spellings.

    The weight has one axis, as long as the last one of x. A chain of which another node reads a part stays.
    """

    name = "fuse_norms"
    description = "Fuse RMS norms into one node each"

    def call(self, model: ir.Model) -> PassResult:
        """Fuse those of the main graph."""
        modified = False
        for node in list(model.graph):
            if node.op_type != "Mul" or node.domain != "":
                continue
            for value, weight in (tuple(node.inputs), tuple(reversed(node.inputs))):
                normalized = _match(value)
                if normalized is None or weight is None:
                    continue
                try:
                    _check(normalized, weight, node)
                except NoMatchError as error:
                    self.log_miss(node, error)
                    continue
                _fuse(model.graph, node, normalized, weight)
                modified = True
                break
        return remove_unused(model, modified)


def _check(normalized: Normalized, weight: ir.Value, last: ir.Node) -> None:
    """Raise `NoMatchError` if the kernel can't compute it, or another node needs a value in between."""
    shape = dims(normalized.x)
    if not shape:
        raise NoMatchError("the shape of x is unknown")
    if not is_vector(weight, shape[-1]):
        raise NoMatchError(f"the factor has shape {dims(weight)}, expected ({shape[-1]},)")
    if {normalized.x.dtype, weight.dtype} != {FLOAT}:
        raise NoMatchError(f"x and its factor are {normalized.x.dtype} and {weight.dtype}, expected FLOAT")
    inside = normalized.nodes | {last}
    for node in normalized.nodes:
        for value in node.outputs:
            if value.is_graph_output() or not inside.issuperset(value.consumers()):
                raise NoMatchError(f"{value.name} is read outside the norm")


def _fuse(graph: ir.Graph, last: ir.Node, normalized: Normalized, weight: ir.Value) -> None:
    """Replace the chain that ends in `last`."""
    attributes = {"axis": -1, "epsilon": normalized.epsilon, "stash_type": int(FLOAT)}
    output = ir.Value(type=ir.TensorType(FLOAT), shape=normalized.x.shape)
    norm = ir.node(NORM, [normalized.x, weight], attributes=attributes, outputs=[output], name=last.name)
    convenience.replace_nodes_and_values(graph, last, [last], [norm], last.outputs, norm.outputs)


def _match(value: ir.Value | None) -> Normalized | None:
    """Match a value computed as x times an inverse root, or as x divided by a root."""
    node = made_by(value, "Mul", "Div")
    if node is None:
        return None
    first, second = node.inputs
    if node.op_type == "Div":
        factors = [(first, _root(second))]
    else:
        factors = [(first, _inverse_root(second)), (second, _inverse_root(first))]
    for x, radicand in factors:
        if x is None or radicand is None:
            continue
        normalized = _mean_square(radicand.value, x)
        if normalized is not None:
            normalized.nodes |= {node, *radicand.nodes}
            return normalized
    return None


def _root(value: ir.Value | None) -> Radicand | None:
    """Match sqrt(v) or v ** 0.5."""
    node = made_by(value, "Sqrt", "Pow")
    if node is None or (node.op_type == "Pow" and scalar(node.inputs[1]) != 0.5):
        return None
    return Radicand(node.inputs[0], [node])


def _inverse_root(value: ir.Value | None) -> Radicand | None:
    """Match 1 / sqrt(v) or v ** -0.5."""
    node = made_by(value, "Reciprocal", "Div", "Pow")
    if node is None:
        return None
    if node.op_type == "Pow":
        return Radicand(node.inputs[0], [node]) if scalar(node.inputs[1]) == -0.5 else None
    if node.op_type == "Div" and scalar(node.inputs[0]) != 1.0:
        return None
    radicand = _root(node.inputs[-1])
    return Radicand(radicand.value, [*radicand.nodes, node]) if radicand is not None else None


def _mean_square(variance: ir.Value | None, x: ir.Value) -> Normalized | None:
    """Match mean(x * x) + epsilon over the last axis, which is kept."""
    add = made_by(variance, "Add")
    if add is None:
        return None
    for average, addend in (tuple(add.inputs), tuple(reversed(add.inputs))):
        mean, epsilon = made_by(average, "ReduceMean"), scalar(addend)
        if mean is None or epsilon is None or epsilon < 0 or not _keeps_last_axis(mean):
            continue
        square = made_by(mean.inputs[0], "Pow", "Mul")
        if square is None or square.inputs[0] is not x:
            continue
        squares_x = square.inputs[1] is x if square.op_type == "Mul" else scalar(square.inputs[1]) == 2.0
        if squares_x:
            return Normalized(x, epsilon, {add, mean, square})
    return None


def _keeps_last_axis(mean: ir.Node) -> bool:
    """Return whether a `ReduceMean` reduces the last axis to length 1."""
    shape = dims(mean.inputs[0])
    axis = scalar(mean.inputs[1]) if len(mean.inputs) > 1 else None
    return shape is not None and axis in (-1, len(shape) - 1) and mean.attributes.get_int("keepdims", 1) == 1
