"""Read lengths from shapes in the rank in which they are used, instead of reshaping scalars and vectors."""

import onnx_ir as ir
from onnx_ir import convenience
from onnx_ir.passes import PassResult

from accel.graph.passes import GraphPass, remove_unused
from accel.graph.shapes import dims, integer, integers, made_by, scalar

ARITHMETIC = ("Add", "Sub", "Mul")


class DirectLengths(GraphPass):
    """Compute each length as a scalar or as a vector of one element from the start, never as a view of the other.

    The exporter squeezes each length to a scalar, and reshapes it to a vector again for the next shape. Lengths are
    computed on the host. On CUDA, ONNX Runtime 1.31 reuses a shape's memory while such a view of it has yet to be
    read: GPT-2, BLOOM and Llama got the batch size in place of the number of tokens.
    A known defect: https://github.com/microsoft/onnxruntime/issues/32083
    """

    name = "direct_lengths"
    description = "Read lengths from shapes without views"

    def call(self, model: ir.Model) -> PassResult:
        """Replace vectors made from scalars, then the scalars that are squeezed from shapes."""
        modified = False
        graph = model.graph
        vectors: dict[ir.Value, ir.Value] = {}
        for node in list(graph):
            vector = _vector(graph, node.inputs[0], vectors) if _makes_vector(node) else None
            if vector is not None:
                convenience.replace_all_uses_with(node.outputs[0], vector)
                modified = True
        for node in list(graph):
            if node.op_type == "Squeeze" and node.domain == "" and _is_one_length(node.inputs[0]):
                _gather(graph, node)
                modified = True
        return remove_unused(model, modified)


def _makes_vector(node: ir.Node) -> bool:
    """Return whether `node` turns a scalar into a vector of one element for other nodes."""
    return (
        node.domain == ""
        and node.op_type in ("Reshape", "Unsqueeze")
        and dims(node.inputs[0]) == ()
        and dims(node.outputs[0]) == (1,)
        and not node.outputs[0].is_graph_output()
    )


def _is_one_length(value: ir.Value | None) -> bool:
    """Return whether `value` is one axis of a shape, as a vector."""
    return made_by(value, "Shape") is not None and dims(value) == (1,)


def _squeezed_length(scalar_length: ir.Value | None) -> ir.Value | None:
    """Return the vector that a `Squeeze` of one axis of a shape reads."""
    squeeze = made_by(scalar_length, "Squeeze")
    return squeeze.inputs[0] if squeeze is not None and _is_one_length(squeeze.inputs[0]) else None


def _has_vector(length: ir.Value | None) -> bool:
    """Return whether a scalar is squeezed from a shape, or computed from such scalars and constants."""
    if _squeezed_length(length) is not None:
        return True
    node = made_by(length, *ARITHMETIC)
    return node is not None and all(scalar(term) is not None or _has_vector(term) for term in node.inputs)


def _vector(graph: ir.Graph, length: ir.Value | None, vectors: dict[ir.Value, ir.Value]) -> ir.Value | None:
    """Return a scalar as a vector of one element; None, and no new node, unless `_has_vector`.

    Args:
        graph: Graph that gets the nodes for it.
        length: Scalar.
        vectors: Scalar -> vector, for those computed before; gets the new ones.
    """
    if length is None or not _has_vector(length):
        return None
    if length in vectors:
        return vectors[length]
    node = made_by(length, *ARITHMETIC)
    if node is None:
        return _squeezed_length(length)
    terms = []
    for term in node.inputs:
        number = scalar(term)
        terms.append(_vector(graph, term, vectors) if number is None else integers(graph, "length", [int(number)]))
    vector = ir.Value(name=f"{length.name}.vector", type=length.type, shape=ir.Shape([1]))
    graph.insert_after(node, ir.node(node.op_type, terms, outputs=[vector], name=vector.name))
    vectors[length] = vector
    return vector


def _gather(graph: ir.Graph, squeeze: ir.Node) -> None:
    """Replace a squeezed length by one that a `Gather` copies out of the shape."""
    output = ir.Value(shape=ir.Shape([]))
    gather = ir.node("Gather", [squeeze.inputs[0], integer(graph, 0)], {"axis": 0}, outputs=[output], name=squeeze.name)
    convenience.replace_nodes_and_values(graph, squeeze, [squeeze], [gather], squeeze.outputs, [output])
