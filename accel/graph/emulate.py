"""FP16 as it would come out on hardware that has it, on a provider that has not.

ONNX Runtime's CPU provider computes FP16 graphs in FP32 and drops the casts between, so overflow and rounding never
show there. Here every operator is FP32 on purpose, and every value that should be FP16 is rounded to it and back.
"""

import onnx_ir as ir
from onnx_ir import convenience

from accel.graph.control import has_subgraph
from accel.graph.convert import HALF
from accel.graph.plan import ANY_TYPE
from accel.graph.probe import FLOAT


def emulate_half(model: ir.Model) -> None:
    """In place, subgraphs included: FP32 operators, with a rounding to FP16 after each that was FP16.

    Ports and weights keep their types, so the emulated graph stands in for the other, over the same data file.
    """
    for graph in list(model.graphs()):
        widened: dict[ir.Value, ir.Value] = {}
        for node in list(graph):
            if node.op_type in ANY_TYPE or has_subgraph(node):
                continue
            for position, value in enumerate(node.inputs):
                if value is not None and value.dtype == HALF:
                    if value not in widened:
                        widened[value] = _cast(graph, value, FLOAT, node)
                    node.replace_input_with(position, widened[value])
            for output in node.outputs:
                if output.dtype == HALF:
                    _round(graph, node, output)
            for attribute in list(node.attributes.values()):
                if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == HALF:
                    content = attribute.as_tensor().numpy().astype("float32")
                    node.attributes[attribute.name] = ir.AttrTensor(attribute.name, ir.tensor(content))


def _cast(graph: ir.Graph, value: ir.Value, dtype: ir.DataType, before: ir.Node) -> ir.Value:
    output = ir.Value(name=f"{value.name}.{graph.name}.wide", type=ir.TensorType(dtype), shape=value.shape)
    node = ir.node("Cast", [value], attributes={"to": int(dtype)}, outputs=[output], name=output.name)
    graph.insert_before(before, node)
    return output


def _round(graph: ir.Graph, node: ir.Node, output: ir.Value) -> None:
    """Let `node` write FP32 under another name, and a `Cast` write what it wrote before."""
    rounded = ir.Value(name=output.name, type=output.type, shape=output.shape)
    convenience.replace_all_uses_with(output, rounded, replace_graph_outputs=True)
    output.name, output.type = f"{output.name}.wide", ir.TensorType(FLOAT)
    cast = ir.node("Cast", [output], attributes={"to": int(HALF)}, outputs=[rounded], name=f"{rounded.name}.round")
    graph.insert_after(node, cast)
