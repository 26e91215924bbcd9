"""Derive the prefill graph of a decoder-only model from its decode graph: decoding with a past of length 0."""

from collections.abc import Collection

import numpy as np
import onnx_ir as ir
from onnx_ir import convenience
from onnx_ir.passes.common import IdentityEliminationPass

from accel.graph.build import add_initializer, add_node
from accel.graph.passes import NoMatchError, remove_unused


def without_past(decode: ir.Model, caches: Collection[str], past: str) -> ir.Model:
    """Return a copy of a decode graph without its cache inputs: it computes what `decode` does where they are empty.

    Args:
        decode: Decode graph as exported. Unchanged; the copy refers to the same weights.
        caches: Names of its cache inputs.
        past: Symbol of their length axis.

    Raises:
        NoMatchError: A cache is read by anything but a concatenation along that axis or a query of one length.
    """
    model = decode.clone()
    graph = model.graph
    IdentityEliminationPass()(model)
    removed = [value for value in graph.inputs if value.name in caches]
    kept = [value for value in graph.inputs if value.name not in caches]
    for cache in removed:
        for node, index in list(cache.uses()):
            if node.op_type == "Concat" and len(node.inputs) == 2 and _length_axis(cache, past) == _axis(node, cache):
                rest = node.inputs[1 - index]
                identity = ir.node("Identity", [rest], name=node.name)
                convenience.replace_nodes_and_values(graph, node, [node], [identity], node.outputs, identity.outputs)
            elif node.op_type == "Shape":
                length = known_length(graph, node, cache, kept, past)
                convenience.replace_all_uses_with(node.outputs[0], length)
                graph.remove(node, safe=True)
            else:
                raise NoMatchError(f"{node.op_type} reads {cache.name}")
        graph.inputs.remove(cache)
    for node in graph.all_nodes():
        for value in node.outputs:
            value.shape = _at_zero(value.shape, past)
    IdentityEliminationPass()(model)
    remove_unused(model)
    return model


def _length_axis(cache: ir.Value, past: str) -> int | None:
    """Return the index of the length axis of `cache`, whose symbol is `past`; None if no axis has it."""
    symbols = [] if cache.shape is None else [getattr(dim, "value", None) for dim in cache.shape]
    return symbols.index(past) if past in symbols else None


def _axis(concat: ir.Node, value: ir.Value) -> int:
    """Return the axis, from 0, along which a `Concat` joins `value` to another."""
    rank = 0 if value.shape is None else len(value.shape)
    axis = concat.attributes.get_int("axis", 0)
    return axis + rank if axis < 0 else axis


def known_length(graph: ir.Graph, node: ir.Node, cache: ir.Value, inputs: Collection[ir.Value], past: str) -> ir.Value:
    """Return a vector with the one length that a `Shape` of an empty cache reads, without reading the cache.

    Args:
        graph: Graph, to which nodes or initializers may be added.
        node: The `Shape`.
        cache: Cache input that it reads.
        inputs: Other inputs, one of which may have the same length.
        past: Symbol whose length is 0.

    Raises:
        NoMatchError: The node reads several lengths, or no other input has the length.
    """
    start = node.attributes.get_int("start", 0)
    if cache.shape is None or node.attributes.get_int("end", len(cache.shape)) != start + 1:
        raise NoMatchError(f"Shape reads several lengths of {cache.name}")
    dim = cache.shape[start]
    if isinstance(dim, int) or dim.value == past:
        name = f"{node.outputs[0].name}.without_past"
        return add_initializer(graph, name, np.array([dim if isinstance(dim, int) else 0], np.int64))
    for value in inputs:
        for axis, other in enumerate(value.shape or ()):
            if other == dim:
                span = {"start": axis, "end": axis + 1}
                return add_node(graph, "Shape", [value], attributes=span, dtype=ir.DataType.INT64, before=node)
    raise NoMatchError(f"no other input has the length {dim} of {cache.name}")


def _at_zero(shape: ir.Shape | None, past: str) -> ir.Shape | None:
    """Return `shape` with 0 for the symbol `past`."""
    if shape is None:
        return None
    lengths: list[int | ir.SymbolicDim] = []
    for dim in shape:
        symbolic = not isinstance(dim, int) and dim.value is not None and past in dim.free_symbols()
        lengths.append(dim.evaluate({past: 0}) if symbolic else dim)  # type: ignore[union-attr]
    return ir.Shape(lengths)
