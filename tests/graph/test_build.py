"""Insertion of nodes and initializers."""

import numpy as np
import onnx_ir as ir

from accel.graph.build import CONTRIB, add_cast, add_initializer, add_node
from tests.graph.text import parse

TEXT = "g (float[n, 3] x) => (float[n, 3] y) { h = Neg(x)\n y = Abs(h) }"


def test_nodes_are_inserted_where_asked() -> None:
    """Before a node, behind the one that computes a value, at the start behind a graph input, else at the end."""
    graph = parse(TEXT).graph
    x, h = graph.inputs[0], graph[0].outputs[0]
    add_node(graph, "Relu", [h], "before", before=graph[1])
    add_node(graph, "Sqrt", [h], "behind", behind=h)
    add_cast(graph, x, ir.DataType.FLOAT16, "start", behind=x)
    add_node(graph, "Gelu", [x], "end", domain=CONTRIB)
    assert [node.op_type for node in graph] == ["Cast", "Neg", "Sqrt", "Relu", "Abs", "Gelu"]
    assert [node.domain for node in graph] == [""] * 5 + [CONTRIB]


def test_outputs_have_the_given_name_type_and_shape() -> None:
    graph = parse(TEXT).graph
    output = add_cast(graph, graph.inputs[0], ir.DataType.FLOAT16, "half", behind=graph.inputs[0])
    assert (output.name, output.dtype, output.shape) == ("half", ir.DataType.FLOAT16, graph.inputs[0].shape)
    producer = output.producer()
    assert producer is not None
    assert (producer.name, producer.attributes["to"].as_int()) == ("half", ir.DataType.FLOAT16)
    value = add_initializer(graph, "pair", np.array([1, 2]))
    assert graph.initializers["pair"] is value
    assert (value.dtype, value.shape) == (ir.DataType.INT64, ir.Shape([2]))
