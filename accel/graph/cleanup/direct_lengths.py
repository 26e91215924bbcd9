"""Take lengths out of shapes as they are needed, instead of making one from the other by views."""

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir import convenience
from onnx_ir.passes.common import RemoveUnusedNodesPass

from accel.graph.shapes import dims, integer, integers, made_by, scalar

SUMS = ("Add", "Sub", "Mul")


def direct_lengths(models: Sequence[ir.Model]) -> None:
    """In place: a length is a vector of one element or a scalar from the start, and no view of another.

    The exporter squeezes each length to a scalar and reshapes it to a vector again for the next shape. Lengths are
    computed on the host. On CUDA, ONNX Runtime 1.31 gives a shape's memory away while such a view of it is still to be
    read: GPT-2, BLOOM and Llama were given their batch for the number of tokens.
    A known defect: https://github.com/microsoft/onnxruntime/issues/32083
    """
    for model in models:
        vectors: dict[ir.Value, ir.Value] = {}
        for node in list(model.graph):
            if _widens(node):
                vector = _vector(model.graph, node.inputs[0], vectors)
                if vector is not None:
                    convenience.replace_all_uses_with(node.outputs[0], vector, replace_graph_outputs=True)
        for node in list(model.graph):
            if node.op_type == "Squeeze" and node.domain == "" and _one_length(node.inputs[0]):
                _pick(model.graph, node)
        RemoveUnusedNodesPass()(model)


def _widens(node: ir.Node) -> bool:
    """Whether `node` makes a scalar a vector of one element."""
    return (
        node.domain == ""
        and node.op_type in ("Reshape", "Unsqueeze")
        and dims(node.inputs[0]) == ()
        and dims(node.outputs[0]) == (1,)
    )


def _one_length(value: ir.Value | None) -> bool:
    """Whether `value` is one axis of a shape."""
    return made_by(value, "Shape") is not None and dims(value) == (1,)


def _vector(graph: ir.Graph, length: ir.Value | None, vectors: dict[ir.Value, ir.Value]) -> ir.Value | None:
    """A scalar `length` as a vector of one element; None if it comes from elsewhere. `vectors`: those made so far."""
    if length is None:
        return None
    if length in vectors:
        return vectors[length]
    squeezed = made_by(length, "Squeeze")
    if squeezed is not None and _one_length(squeezed.inputs[0]):
        return squeezed.inputs[0]
    total = made_by(length, *SUMS)
    if total is None:
        return None
    terms = [_constant(graph, term) or _vector(graph, term, vectors) for term in total.inputs]
    if None in terms:
        return None
    made = ir.Value(name=f"{length.name}.vector", type=length.type, shape=ir.Shape([1]))
    graph.insert_after(total, ir.node(total.op_type, terms, outputs=[made], name=made.name))
    vectors[length] = made
    return made


def _constant(graph: ir.Graph, value: ir.Value | None) -> ir.Value | None:
    number = scalar(value)
    return None if number is None else integers(graph, "length", [int(number)])


def _pick(graph: ir.Graph, squeeze: ir.Node) -> None:
    """Replace a squeezed length by one that is copied out of the shape."""
    old = squeeze.outputs[0]
    picked = ir.Value(name=old.name, type=old.type, shape=ir.Shape([]))
    inputs = [squeeze.inputs[0], integer(graph, 0)]
    graph.insert_before(squeeze, ir.node("Gather", inputs, {"axis": 0}, outputs=[picked], name=squeeze.name))
    convenience.replace_all_uses_with(old, picked, replace_graph_outputs=True)
    graph.remove(squeeze, safe=True)
