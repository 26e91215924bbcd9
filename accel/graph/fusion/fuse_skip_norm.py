"""A residual's sum and the norm behind it become one node, which gives both.

The nodes are ONNX Runtime's `SkipLayerNormalization` and `SkipSimplifiedLayerNormalization`:
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.SkipLayerNormalization
They compute in FP32 inside, as the plan takes for granted. Where the CUDA kernel has the choice, in versions of ONNX
Runtime before 1.31, that is the provider option `enable_skip_layer_norm_strict_mode`, which runtime=cuda sets.
(onnxscript has rules for them too, but writes one of the two operators into a domain where no runtime has it, and takes
two unknown lengths for equal.)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir import convenience
from onnx_ir.passes.common import RemoveUnusedNodesPass

from accel.graph.fusion.fuse_norms import NORM
from accel.graph.precision.formats import FLOAT
from accel.graph.shapes import Dims, dims, is_vector, made_by, used_once

DOMAIN = "com.microsoft"
FUSED = {"LayerNormalization": "SkipLayerNormalization", NORM: "SkipSimplifiedLayerNormalization"}
RANK = 3  # of what the kernels take


@dataclass
class Residual:
    """norm(first + bias + second), where the bias may be absent."""

    add: ir.Node
    first: ir.Value
    second: ir.Value
    bias: ir.Value | None = None


def fuse_skip_norm(models: Sequence[ir.Model]) -> None:
    """In place: a sum of two values of one shape, a norm over its last axis, and the bias of a product before the sum.

    Where other nodes read the sum too, it comes from the same node. A sum that broadcasts is left alone: the kernel
    would read the smaller operand in another way, or refuse it.
    """
    for model in models:
        for norm in list(model.graph):
            found = _residual(norm) if norm.op_type in FUSED and norm.domain == "" else None
            if found is not None:
                _fuse(model.graph, norm, found)
                model.graph.opset_imports.setdefault(DOMAIN, 1)
        RemoveUnusedNodesPass()(model)


def _residual(norm: ir.Node) -> Residual | None:
    add = made_by(norm.inputs[0], "Add")
    shape = dims(norm.inputs[0])
    if add is None or shape is None or len(shape) != RANK or add.graph is not norm.graph:
        return None
    weights = [value for value in norm.inputs[1:] if value is not None]
    if not _over_last(norm) or not all(_is_weight(value, shape[-1]) for value in weights):
        return None
    first, second = add.inputs
    if first is None or second is None or first.dtype != FLOAT or not dims(first) == dims(second) == shape:
        return None
    for value, other in ((first, second), (second, first)):
        biased = _biased(value, shape)
        if biased is not None:
            return Residual(add, biased[0], other, biased[1])
    return Residual(add, first, second)


def _over_last(norm: ir.Node) -> bool:
    if norm.attributes.get_int("axis", -1) not in (-1, RANK - 1) or norm.attributes.get_int("stash_type", 1) != 1:
        return False
    return not any(value.uses() or value.is_graph_output() for value in norm.outputs[1:])  # mean, deviation


def _biased(value: ir.Value, shape: Dims) -> tuple[ir.Value, ir.Value] | None:
    """X and b of a value that is x + b, where b is a weight of one axis and nobody else reads the sum."""
    add = made_by(value, "Add")
    for x, bias in () if add is None or not used_once(value) else (tuple(add.inputs), tuple(reversed(add.inputs))):
        if x is not None and bias is not None and _is_weight(bias, shape[-1]) and dims(x) == shape:
            return x, bias
    return None


def _is_weight(value: ir.Value, length: int | str) -> bool:
    """Known from the start, so that the fused node can stand where the sum stood."""
    return value.is_initializer() and value.dtype == FLOAT and is_vector(value, length)


def _fuse(graph: ir.Graph, norm: ir.Node, found: Residual) -> None:
    old, total = norm.outputs[0], found.add.outputs[0]
    made = ir.Value(name=old.name, type=ir.TensorType(FLOAT), shape=total.shape)
    added = ir.Value(name=total.name, type=ir.TensorType(FLOAT), shape=total.shape)
    inputs: list[ir.Value | None] = [found.first, found.second, *norm.inputs[1:]]
    if found.bias is not None:
        inputs += [None] * (norm.op_type == "LayerNormalization" and len(norm.inputs) < 3)  # no beta
        inputs.append(found.bias)
    outputs = [made]
    if len(total.uses()) > 1 or total.is_graph_output():
        outputs += [ir.Value(name=""), ir.Value(name=""), added]  # the mean and the deviation are not wanted
    epsilon = norm.attributes.get_float("epsilon", 1e-5)
    fused = ir.node(
        FUSED[norm.op_type],
        inputs,
        attributes={"epsilon": epsilon},
        domain=DOMAIN,
        outputs=outputs,
        name=norm.name,
    )
    graph.insert_before(found.add, fused)
    convenience.replace_all_uses_with(old, made, replace_graph_outputs=True)
    graph.remove(norm, safe=True)
    if len(outputs) > 1:
        convenience.replace_all_uses_with(total, added, replace_graph_outputs=True)
    graph.remove(found.add, safe=True)
