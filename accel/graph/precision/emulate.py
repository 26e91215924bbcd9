"""Emulation of FP16 and bfloat16 with FP32 operators, for providers that don't compute in these formats.

ONNX Runtime's CPU provider computes FP16 graphs in FP32 and drops the casts between, so overflow and rounding errors
don't show there; it has no kernels for bfloat16. In an emulated graph every operator computes in FP32, and every value
that should have 16 bits is cast to them and back.
"""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from onnx_ir import convenience

from accel.graph.build import add_cast, add_initializer, add_node
from accel.graph.control import has_subgraph
from accel.graph.precision.formats import FLOAT, FP16, Format
from accel.graph.precision.observer import float_values
from accel.graph.precision.plan import ANY_TYPE, Plan, node_key


def emulate_half(model: ir.Model, format: Format = FP16) -> None:
    """Compute in FP32 what a graph computes in `format`, and round each result to it; in place, in subgraphs as well.

    Inputs, outputs and weights keep their types, so the emulated graph can replace the original over the same external
    data file.
    """
    half = format.dtype
    for graph in list(model.graphs()):
        widened: dict[ir.Value, ir.Value] = {}
        for node in list(graph):
            if node.op_type in ANY_TYPE or has_subgraph(node):
                continue
            for position, value in enumerate(node.inputs):
                if value is not None and value.dtype == half:
                    if value not in widened:
                        widened[value] = add_cast(graph, value, FLOAT, f"{value.name}.{graph.name}.wide", before=node)
                    node.replace_input_with(position, widened[value])
            for output in node.outputs:
                if output.dtype == half:
                    _round_output(graph, node, output, half)
            for attribute in list(node.attributes.values()):
                if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == half:
                    content = attribute.as_tensor().numpy().astype("float32")
                    node.attributes[attribute.name] = ir.AttrTensor(attribute.name, ir.tensor(content))


def _round_output(graph: ir.Graph, node: ir.Node, output: ir.Value, half: ir.DataType) -> None:
    """Make `node` write FP32 under another name, and insert a `Cast` that writes the 16-bit value in its place."""
    rounded = ir.Value(name=output.name, type=output.type, shape=output.shape)
    convenience.replace_all_uses_with(output, rounded, replace_graph_outputs=True)
    output.name, output.type = f"{output.name}.wide", ir.TensorType(FLOAT)
    cast = ir.node("Cast", [output], attributes={"to": int(half)}, outputs=[rounded], name=f"{rounded.name}.round")
    graph.insert_after(node, cast)


def round_values(model: ir.Model, plan: Plan, format: Format, headroom: Mapping[str, float]) -> None:
    """Round the values of an FP32 graph as if it were converted by `plan`; in place, in the main graph alone.

    The graph computes what `convert_half` and then `emulate_half` would make of it, but its inputs, outputs and weights
    stay FP32, so that a plan can be tried without writing any weights.

    Args:
        model: FP32 graph with known types, its masks clamped.
        plan: Plan to try.
        format: Format of everything that the plan doesn't keep in FP32.
        headroom: Value name -> power of two by which the format's range is reduced for that value, so that magnitudes
            within the overflow margin overflow.
    """
    graph = model.graph
    values = float_values(graph)
    values += [value for value in graph.initializers.values() if value.dtype == FLOAT and value.uses()]
    scales: dict[float, ir.Value] = {}
    for value in values:
        name = value.name or ""
        kept = _is_kept(value, plan)  # a kept value is rounded only where something reads it in 16 bits
        uses = [
            (consumer, position)
            for consumer, position in value.uses()
            if not has_subgraph(consumer) and not (kept and _reads_float(consumer, plan))
        ]
        round_output = value.is_graph_output() and not (kept and name in plan.specs)
        if not uses and not round_output:
            continue
        rounded = _insert_rounding(graph, value, format, headroom.get(name, 1.0), scales)
        for consumer, position in uses:
            consumer.replace_input_with(position, rounded)
        if round_output:
            for position, output in enumerate(tuple(graph.outputs)):
                if output is value:
                    value.name, rounded.name = f"{name}.wide", name
                    graph.outputs[position] = rounded


def _is_kept(value: ir.Value, plan: Plan) -> bool:
    """Return whether the plan keeps a node output, initializer or graph input in FP32."""
    producer = value.producer()
    if producer is not None:
        return node_key(producer) in plan.nodes
    return (value.name or "") in (plan.weights if value.is_initializer() else plan.specs)


def _reads_float(node: ir.Node, plan: Plan) -> bool:
    """Return whether a node reads FP32 inputs without a cast to 16 bits."""
    return node.op_type in ANY_TYPE or node_key(node) in plan.nodes


def _insert_rounding(
    graph: ir.Graph, value: ir.Value, format: Format, headroom: float, scales: dict[float, ir.Value]
) -> ir.Value:
    """Insert casts of `value` to `format` and back, multiplied by the headroom before and divided by it after.

    Returns:
        The rounded value, in FP32.
    """
    name = f"{value.name}.rounded"
    result = value
    if headroom != 1:
        result = _multiply(graph, result, _scale(graph, headroom, scales), f"{name}.up")
    result = add_cast(graph, result, format.dtype, f"{name}.half", behind=result)
    result = add_cast(graph, result, FLOAT, f"{name}.float", behind=result)
    if headroom != 1:
        result = _multiply(graph, result, _scale(graph, 1 / headroom, scales), f"{name}.down")
    return result


def _multiply(graph: ir.Graph, value: ir.Value, factor: ir.Value, name: str) -> ir.Value:
    """Insert the product of an FP32 value and a scalar behind the value."""
    return add_node(graph, "Mul", [value, factor], name, dtype=FLOAT, shape=value.shape, behind=value)


def _scale(graph: ir.Graph, factor: float, scales: dict[float, ir.Value]) -> ir.Value:
    """Return the initializer that holds `factor`, registered at first use."""
    if factor not in scales:
        scales[factor] = add_initializer(graph, f"rounded.scale.{factor}", np.array(factor, np.float32))
    return scales[factor]
