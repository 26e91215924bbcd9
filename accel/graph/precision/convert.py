"""Conversion of FP32 graphs to mixed precision: a 16-bit format everywhere except where a plan keeps FP32."""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from accel.graph.build import add_cast, add_initializer
from accel.graph.precision.formats import FLOAT, FORMATS, FP16, Format
from accel.graph.precision.observer import infer_types
from accel.graph.precision.plan import ANY_TYPE, Plan, clamp_masks, is_weight, node_key
from accel.graph.weights import set_origin, tensor_content


def convert_half(model: ir.Model, plan: Plan, format: Format = FP16) -> None:
    """Convert the main graph's float values to `format`, in place, except what the plan keeps in FP32.

    Casts are inserted only where a value is read in the other precision, one for each value and precision.

    Args:
        model: FP32 graph. Masks are clamped; nodes inside subgraphs stay as they are.
        plan: Nodes, weights, inputs and outputs that stay in FP32.
        format: Format of everything else.
    """
    infer_types(model)
    clamp_masks(model, format)
    graph = model.graph
    half = format.dtype
    nodes = list(graph)  # before casts are inserted
    casts = CastInserter(graph)
    spec_dtypes: dict[ir.Value, ir.DataType] = {}
    for value in (*graph.inputs, *graph.outputs):
        if value.dtype == FLOAT:
            spec_dtypes[value] = FLOAT if (value.name or "") in plan.specs else half
    for value in graph.inputs:
        if value in spec_dtypes:
            value.type = ir.TensorType(spec_dtypes[value])
    for value in graph.initializers.values():
        if is_weight(value) and (value.name or "") not in plan.weights:
            _lower_weight(value, half)
    for node in nodes:
        if node_key(node) not in plan.nodes:
            for output in node.outputs:
                if output.dtype == FLOAT:
                    output.type = ir.TensorType(half)
            _lower_attributes(node, half)
    for node in nodes:
        if node.op_type in ANY_TYPE:
            continue
        dtype = FLOAT if node_key(node) in plan.nodes else half
        for position, operand in enumerate(node.inputs):
            if operand is not None and operand.dtype in (FLOAT, half) and operand.dtype != dtype:
                node.replace_input_with(position, casts.get(operand, dtype))
    for position, output in enumerate(tuple(graph.outputs)):
        if output in spec_dtypes and output.dtype != spec_dtypes[output]:
            name = output.name
            output.name = f"{name}.computed"
            graph.outputs[position] = casts.get(output, spec_dtypes[output])
            graph.outputs[position].name = name
    _remove_unused_initializers(graph)


class CastInserter:
    """Casts of a graph's values to the other precision, at most one for each value and type."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.converted: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def get(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Return `value` as `dtype`; insert a `Cast` if there is no cheaper way and none was inserted before."""
        key = (value, dtype)
        if key not in self.converted:
            self.converted[key] = self._constant(value, dtype) or self._cast(value, dtype)
        return self.converted[key]

    def _constant(self, value: ir.Value, dtype: ir.DataType) -> ir.Value | None:
        """Store a small constant a second time, which is cheaper than a node; return None for any other value."""
        tensor = value.const_value
        if tensor is None or not value.is_initializer() or is_weight(value):
            return None
        content = tensor.numpy().astype(dtype.numpy())
        return add_initializer(self.graph, f"{value.name}.{dtype.name.lower()}", content)

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Insert a `Cast` behind the node that computes `value`, or return the operand of the `Cast` that it undoes."""
        producer = value.producer()
        origin = producer.inputs[0] if producer is not None and producer.op_type == "Cast" else None
        if origin is not None and origin.dtype == dtype != FLOAT:
            return origin  # 16 -> 32 -> 16 bits is exact: both casts can go
        return add_cast(self.graph, value, dtype, f"{value.name}.to.{dtype.name.lower()}", behind=value)


def _lower_weight(weight: ir.Value, half: ir.DataType) -> None:
    """Convert an initializer when it is written, so that only one weight at a time is held in memory."""
    tensor = weight.const_value
    if tensor is None:
        return

    def convert() -> ir.TensorProtocol:
        with np.errstate(over="ignore"):  # a plan may let a weight overflow on purpose
            return ir.tensor(tensor_content(tensor).astype(half.numpy()))

    weight.const_value = ir.LazyTensor(convert, dtype=half, shape=ir.Shape(tensor.shape.numpy()), name=weight.name)
    set_origin(weight.const_value, ("cast", half), [tensor])
    weight.type = ir.TensorType(half)


def _lower_attributes(node: ir.Node, half: ir.DataType) -> None:
    """Convert FP32 in a node's attributes: the target type of a `Cast`, the tensor of a constant."""
    attributes: Mapping[str, ir.Attr] = node.attributes
    if node.op_type == "Cast" and attributes["to"].as_int() == int(FLOAT):
        node.attributes["to"] = ir.AttrInt64("to", int(half))
    constant = attributes.get("value")
    if constant is not None and constant.type == ir.AttributeType.TENSOR and constant.as_tensor().dtype == FLOAT:
        content = constant.as_tensor().numpy().astype(half.numpy())
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(content))


def _remove_unused_initializers(graph: ir.Graph) -> None:
    """Remove initializers that were replaced by a copy in the other precision."""
    for value in list(graph.initializers.values()):
        if not value.uses() and not value.is_graph_output():
            graph.initializers.pop(value.name or "")


def half_share(model: ir.Model) -> dict[str, float]:
    """Measure how much of a converted graph is in 16 bits. Subgraphs are not counted.

    Returns:
        `nodes` and `weight_bytes`: the part of the float nodes and of the float weights' bytes that is in 16 bits, from
        0 to 1; `fp32_nodes`: the number of nodes in FP32; `fp32_bytes`: the bytes of weights in FP32; `casts`: the
        number of `Cast` nodes with a float result.
    """
    halves = {format.dtype for format in FORMATS.values() if format.dtype != FLOAT}
    floats = {FLOAT, *halves}
    nodes = fp32_nodes = casts = 0
    for node in model.graph:
        dtypes = {output.dtype for output in node.outputs}
        if not dtypes & floats:
            continue
        if node.op_type == "Cast":
            casts += 1
            continue
        nodes += 1
        if not dtypes & halves:
            fp32_nodes += 1
    weight_bytes = fp32_bytes = 0
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype in floats:
            weight_bytes += tensor.nbytes
            if tensor.dtype == FLOAT:
                fp32_bytes += tensor.nbytes
    return {
        "nodes": 1 - fp32_nodes / max(1, nodes),
        "weight_bytes": 1 - fp32_bytes / max(1, weight_bytes),
        "fp32_nodes": fp32_nodes,
        "fp32_bytes": fp32_bytes,
        "casts": casts,
    }
