"""FP16 or bfloat16 as it would come out on hardware that has it, on a provider that has not.

ONNX Runtime's CPU provider computes FP16 graphs in FP32 and drops the casts between, so overflow and rounding never
show there; it has no kernels for bfloat16. Here every operator is FP32 on purpose, and every value that should have 16
bits is rounded to them and back.
"""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from onnx_ir import convenience

from accel.graph.control import has_subgraph
from accel.graph.precision.formats import FLOAT, FP16, Format
from accel.graph.precision.observer import float_values
from accel.graph.precision.plan import ANY_TYPE, Plan


def emulate_half(model: ir.Model, format: Format = FP16) -> None:
    """In place, subgraphs included: FP32 operators, with a rounding to `format` after each that was in it.

    Ports and weights keep their types, so the emulated graph stands in for the other, over the same data file.
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
                        widened[value] = _cast(graph, value, FLOAT, node)
                    node.replace_input_with(position, widened[value])
            for output in node.outputs:
                if output.dtype == half:
                    _round(graph, node, output, half)
            for attribute in list(node.attributes.values()):
                if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == half:
                    content = attribute.as_tensor().numpy().astype("float32")
                    node.attributes[attribute.name] = ir.AttrTensor(attribute.name, ir.tensor(content))


def _cast(graph: ir.Graph, value: ir.Value, dtype: ir.DataType, before: ir.Node) -> ir.Value:
    output = ir.Value(name=f"{value.name}.{graph.name}.wide", type=ir.TensorType(dtype), shape=value.shape)
    node = ir.node("Cast", [value], attributes={"to": int(dtype)}, outputs=[output], name=output.name)
    graph.insert_before(before, node)
    return output


def _round(graph: ir.Graph, node: ir.Node, output: ir.Value, half: ir.DataType) -> None:
    """Let `node` write FP32 under another name, and a `Cast` write what it wrote before."""
    rounded = ir.Value(name=output.name, type=output.type, shape=output.shape)
    convenience.replace_all_uses_with(output, rounded, replace_graph_outputs=True)
    output.name, output.type = f"{output.name}.wide", ir.TensorType(FLOAT)
    cast = ir.node("Cast", [output], attributes={"to": int(half)}, outputs=[rounded], name=f"{rounded.name}.round")
    graph.insert_after(node, cast)


def round_values(model: ir.Model, plan: Plan, format: Format, headroom: Mapping[str, float]) -> None:
    """In place: an FP32 graph whose values are rounded as `plan` would have them, ports and weights left as they are.

    It computes what `convert_half` and `emulate_half` make of the graph, but takes and gives FP32 and reads the weights
    where they lie, so that plans can be tried without writing any. `headroom`: value -> by how much `format` falls
    short there, a power of two, so that what comes that near its limit overflows.
    """
    graph = model.graph
    values = [*float_values(graph), *(v for v in graph.initializers.values() if v.dtype == FLOAT and v.uses())]
    scales: dict[float, ir.Value] = {}
    for value in values:
        name, producer = value.name or "", value.producer()
        if producer is not None:
            wide = (producer.outputs[0].name or "") in plan.nodes
        else:
            wide = name in (plan.weights if value.is_initializer() else plan.specs)
        users = [
            (node, place)
            for node, place in value.uses()
            if not (has_subgraph(node) or (wide and (node.op_type in ANY_TYPE or _kept(node, plan))))
        ]
        at_end = value.is_graph_output() and not (wide and name in plan.specs)
        if not users and not at_end:
            continue
        rounded = _there_and_back(graph, value, format, headroom.get(name, 1.0), scales)
        for node, place in users:
            node.replace_input_with(place, rounded)
        if at_end:
            for place, output in enumerate(tuple(graph.outputs)):
                if output is value:
                    value.name, rounded.name = f"{name}.wide", name
                    graph.outputs[place] = rounded


def _kept(node: ir.Node, plan: Plan) -> bool:
    return (node.outputs[0].name or "") in plan.nodes


def _there_and_back(
    graph: ir.Graph, value: ir.Value, format: Format, headroom: float, scales: dict[float, ir.Value]
) -> ir.Value:
    """`value` rounded to `format`, as FP32; with headroom, scaled up before and down after."""
    steps: list[tuple[str, float | ir.DataType]] = [("Cast", format.dtype), ("Cast", FLOAT)]
    if headroom != 1:
        steps = [("Mul", headroom), *steps, ("Mul", 1 / headroom)]
    last, place = value, value.producer()
    for number, (op, argument) in enumerate(steps):
        kind = argument if isinstance(argument, ir.DataType) else FLOAT
        output = ir.Value(name=f"{value.name}.rounded.{number}", type=ir.TensorType(kind), shape=value.shape)
        if isinstance(argument, ir.DataType):
            node = ir.node(op, [last], attributes={"to": int(argument)}, outputs=[output])
        else:
            node = ir.node(op, [last, _scalar(graph, argument, scales)], outputs=[output])
        if place is not None:
            graph.insert_after(place, node)
        else:
            graph.insert_before(graph[0], node)
        last, place = output, node
    return last


def _scalar(graph: ir.Graph, number: float, known: dict[float, ir.Value]) -> ir.Value:
    if number not in known:
        name = f"rounded.scale.{number}"
        known[number] = ir.val(name, const_value=ir.tensor(np.array(number, np.float32), name=name))
        graph.register_initializer(known[number])
    return known[number]
