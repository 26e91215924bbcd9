"""FP32 graph -> mixed precision: FP16 or bfloat16 everywhere but where the plan says otherwise."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from accel.graph.precision.formats import FLOAT, FORMATS, FP16, Format
from accel.graph.precision.observer import infer_types
from accel.graph.precision.plan import ANY_TYPE, Plan, clamp_masks, is_weight


def convert_half(model: ir.Model, plan: Plan, format: Format = FP16) -> None:
    """In place: float values become `format` except weights, ports and node outputs that the plan keeps.

    A `Cast` stands only where a value of 16 bits meets a kept node or the other way round, once per value and type.
    """
    infer_types(model)
    clamp_masks(model, format)
    graph = model.graph
    half = format.dtype
    nodes = list(graph)
    casts = Casts(graph)
    wanted = {value: _io_dtype(value, plan, half) for value in (*graph.inputs, *graph.outputs) if value.dtype == FLOAT}
    for value in graph.inputs:
        if value in wanted:
            value.type = ir.TensorType(wanted[value])
    for value in list(graph.initializers.values()):
        if is_weight(value) and (value.name or "") not in plan.weights:
            _halve(value, half)
    for node in nodes:
        kept = (node.outputs[0].name or "") in plan.nodes
        for output in node.outputs:
            if output.dtype == FLOAT and not kept:
                output.type = ir.TensorType(half)
        if not kept:
            _halve_attributes(node, half)
    for node in nodes:
        needed = FLOAT if (node.outputs[0].name or "") in plan.nodes else half
        if node.op_type in ANY_TYPE:
            continue
        for position, given in enumerate(node.inputs):
            if given is not None and given.dtype in (FLOAT, half) and given.dtype != needed:
                node.replace_input_with(position, casts(given, needed))
    for position, output in enumerate(tuple(graph.outputs)):
        if output in wanted and output.dtype != wanted[output]:
            name = output.name
            output.name = f"{name}.computed"
            graph.outputs[position] = casts(output, wanted[output])
            graph.outputs[position].name = name
    _drop_unused(graph)


class Casts:
    """Makes each value available in the other precision, once."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def __call__(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        if (value, dtype) not in self.made:
            self.made[value, dtype] = self._constant(value, dtype) or self._cast(value, dtype)
        return self.made[value, dtype]

    def _constant(self, value: ir.Value, dtype: ir.DataType) -> ir.Value | None:
        """A small constant is stored in either type: cheaper than a node."""
        tensor = value.const_value
        if tensor is None or not value.is_initializer() or is_weight(value):
            return None
        name = f"{value.name}.{dtype.name.lower()}"
        content = tensor.numpy().astype(dtype.numpy())
        made = ir.val(name, const_value=ir.tensor(content, name=name))
        self.graph.register_initializer(made)
        return made

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        source = value.producer()
        origin = source.inputs[0] if source is not None and source.op_type == "Cast" else None
        if origin is not None and origin.dtype == dtype != FLOAT:
            return origin  # 16 -> 32 -> 16 bits loses nothing: the pair cancels
        output = ir.Value(name=f"{value.name}.to.{dtype.name.lower()}", type=ir.TensorType(dtype), shape=value.shape)
        node = ir.node("Cast", [value], attributes={"to": int(dtype)}, outputs=[output], name=output.name)
        if source is not None:
            self.graph.insert_after(source, node)
        else:
            self.graph.insert_before(self.graph[0], node)
        return output


def _io_dtype(value: ir.Value, plan: Plan, half: ir.DataType) -> ir.DataType:
    return FLOAT if (value.name or "") in plan.specs else half


def _halve(value: ir.Value, half: ir.DataType) -> None:
    tensor = value.const_value
    if tensor is None:
        return

    def lowered() -> ir.TensorProtocol:
        with np.errstate(over="ignore"):  # a plan that lets a weight overflow means it
            return ir.tensor(tensor.numpy().astype(half.numpy()))

    value.const_value = ir.LazyTensor(
        lowered,
        dtype=half,
        shape=ir.Shape(tensor.shape.numpy()),
        name=value.name,
    )
    value.type = ir.TensorType(half)


def _halve_attributes(node: ir.Node, half: ir.DataType) -> None:
    """Types that a node carries itself: the target of a `Cast`, the value of a constant."""
    attributes: Mapping[str, ir.Attr] = node.attributes
    if node.op_type == "Cast" and attributes["to"].as_int() == int(FLOAT):
        node.attributes["to"] = ir.AttrInt64("to", int(half))
    constant: Any = attributes.get("value")
    if constant is not None and constant.type == ir.AttributeType.TENSOR and constant.as_tensor().dtype == FLOAT:
        content = constant.as_tensor().numpy().astype(half.numpy())
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(content))


def _drop_unused(graph: ir.Graph) -> None:
    for value in list(graph.initializers.values()):
        if not value.uses() and not value.is_graph_output():
            graph.initializers.pop(value.name or "")


def half_share(model: ir.Model) -> dict[str, float]:
    """What a mix is made of: `nodes` and `weight_bytes` in 16 bits, as shares from 0 to 1 of the float ones;
    `fp32_nodes`, `fp32_bytes` of weights, and `casts`, counted.
    """
    halves = {format.dtype for format in FORMATS.values()} - {FLOAT}
    nodes = [node for node in model.graph if any(output.dtype in (FLOAT, *halves) for output in node.outputs)]
    work = [node for node in nodes if node.op_type != "Cast"]
    kept = [node for node in work if not any(output.dtype in halves for output in node.outputs)]
    weights = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    total = sum(tensor.nbytes for tensor in weights if tensor.dtype in (FLOAT, *halves))
    wide = sum(tensor.nbytes for tensor in weights if tensor.dtype == FLOAT)
    return {
        "nodes": 1 - len(kept) / max(1, len(work)),
        "weight_bytes": 1 - wide / max(1, total),
        "fp32_nodes": len(kept),
        "fp32_bytes": wide,
        "casts": len(nodes) - len(work),
    }
