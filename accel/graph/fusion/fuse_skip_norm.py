"""Fuse the sum of a residual connection with the norm behind it.

The fused nodes are ONNX Runtime's `SkipLayerNormalization` and `SkipSimplifiedLayerNormalization`, which return both
the norm and the sum:
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.SkipLayerNormalization
They compute in FP32 inside, as the precision plan assumes. Where the CUDA kernel has the choice, in versions of ONNX
Runtime before 1.31, that is the provider option `enable_skip_layer_norm_strict_mode`, which runtime=cuda sets.
(onnxscript has rules for them too, but writes one of the two operators into a domain where no runtime has it, and takes
two unknown lengths for equal.)
"""

from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir import convenience
from onnx_ir.passes import PassResult

from accel.graph.build import CONTRIB
from accel.graph.fusion.fuse_norms import NORM
from accel.graph.passes import GraphPass, NoMatchError, remove_unused
from accel.graph.precision.formats import FLOAT
from accel.graph.shapes import Dims, dims, is_vector, made_by, used_once

FUSED = {"LayerNormalization": "SkipLayerNormalization", NORM: "SkipSimplifiedLayerNormalization"}
RANK = 3  # of the kernels' inputs: [batch, tokens, features]


@dataclass
class Residual:
    """norm(first + bias + second), where the bias may be absent."""

    add: ir.Node
    first: ir.Value
    second: ir.Value
    bias: ir.Value | None = None


class FuseSkipNorm(GraphPass):
    """Fuse a sum of two values of one shape, the norm over its last axis, and the bias of a product before the sum.

    Where other nodes read the sum too, it comes from the same node. A sum that broadcasts stays: the kernel would read
    the smaller operand in another way, or refuse it.
    """

    name = "fuse_skip_norm"
    description = "Fuse residual sums with the norms behind them"

    def call(self, model: ir.Model) -> PassResult:
        """Fuse those of the main graph."""
        norms = (node for node in list(model.graph) if node.op_type in FUSED and node.domain == "")
        residuals = (node for node in norms if made_by(node.inputs[0], "Add") is not None)  # a stack's first has none
        modified = self.rewrite_each(residuals, lambda norm: _fuse(model.graph, norm, _match(norm)))
        if modified:
            model.graph.opset_imports.setdefault(CONTRIB, 1)
        return remove_unused(model, modified)


def _match(norm: ir.Node) -> Residual:
    """Match a norm of a sum; raise `NoMatchError` if the kernel can't compute it."""
    add, shape = made_by(norm.inputs[0], "Add"), dims(norm.inputs[0])
    if shape is None or len(shape) != RANK:
        raise NoMatchError(f"the sum has shape {shape}, expected {RANK} axes")
    if add is None or add.graph is not norm.graph:
        raise NoMatchError("the sum is computed in another graph")
    _check_attributes(norm)
    for value in norm.inputs[1:]:
        if value is not None and not _is_weight(value, shape[-1]):
            raise NoMatchError(f"{value.name} of shape {dims(value)} is not a weight of shape ({shape[-1]},)")
    first, second = add.inputs
    if first is None or second is None or first.dtype != FLOAT or not dims(first) == dims(second) == shape:
        raise NoMatchError(f"addends of shapes {dims(first)} and {dims(second)} broadcast, or are not FLOAT")
    for value, other in ((first, second), (second, first)):
        biased = _split_bias(value, shape)
        if biased is not None:
            return Residual(add, biased[0], other, biased[1])
    return Residual(add, first, second)


def _check_attributes(norm: ir.Node) -> None:
    """Raise `NoMatchError` unless a norm is over the last axis, in FP32, with nothing but the norm wanted."""
    axis, stash_type = norm.attributes.get_int("axis", -1), norm.attributes.get_int("stash_type", 1)
    if axis not in (-1, RANK - 1) or stash_type != 1:
        raise NoMatchError(f"axis is {axis} and stash_type {stash_type}, expected -1 and 1")
    if any(value.uses() or value.is_graph_output() for value in norm.outputs[1:]):
        raise NoMatchError("the mean or the deviation is read")


def _split_bias(value: ir.Value, shape: Dims) -> tuple[ir.Value, ir.Value] | None:
    """Return x and b of a value computed as x + b, where b is a weight of one axis and no other node reads the sum."""
    add = made_by(value, "Add")
    if add is None or not used_once(value):
        return None
    for x, bias in (tuple(add.inputs), tuple(reversed(add.inputs))):
        if x is not None and bias is not None and _is_weight(bias, shape[-1]) and dims(x) == shape:
            return x, bias
    return None


def _is_weight(value: ir.Value, length: int | str) -> bool:
    """Return whether `value` is a vector known before the run, so that the fused node can replace the sum."""
    return value.is_initializer() and value.dtype == FLOAT and is_vector(value, length)


def _fuse(graph: ir.Graph, norm: ir.Node, residual: Residual) -> None:
    """Replace the sum and the norm by one node."""
    total = residual.add.outputs[0]
    inputs: list[ir.Value | None] = [residual.first, residual.second, *norm.inputs[1:]]
    if residual.bias is not None:
        if norm.op_type == "LayerNormalization" and len(norm.inputs) < 3:
            inputs.append(None)  # no beta
        inputs.append(residual.bias)
    old_values = [norm.outputs[0]]
    outputs = [ir.Value(type=ir.TensorType(FLOAT), shape=total.shape)]
    if len(total.uses()) > 1 or total.is_graph_output():
        old_values.append(total)
        outputs += [ir.Value(name=""), ir.Value(name=""), ir.Value()]  # mean and deviation are left out
    fused = ir.node(
        FUSED[norm.op_type],
        inputs,
        attributes={"epsilon": norm.attributes.get_float("epsilon", 1e-5)},
        domain=CONTRIB,
        outputs=outputs,
        name=norm.name,
    )
    new_values = [outputs[0], outputs[-1]][: len(old_values)]
    convenience.replace_nodes_and_values(graph, residual.add, [norm, residual.add], [fused], old_values, new_values)
