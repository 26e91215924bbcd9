"""Split of a decoder graph that computes cross-attention caches into one that returns them and one that takes them.

A decoder traced with empty cross-attention caches computes keys and values of the encoder's output and appends them to
the empty ones. Prefill is that graph with the appended tensors as outputs, decode the one with them as inputs. Either
is a copy that refers to the same weights.
"""

from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir
from onnx_ir import convenience
from onnx_ir.passes.common import IdentityEliminationPass

from accel.graph.decode.without_past import known_length
from accel.graph.passes import NoMatchError, remove_unused

Shapes = Mapping[str, Sequence[int | str]]
"""Cache input -> length of each axis, or its name where the length isn't fixed."""


def with_cross_outputs(joint: ir.Model, caches: Mapping[str, str], shapes: Shapes) -> ir.Model:
    """Return a copy of a graph that returns the cross-attention caches, which it computes, behind its other outputs.

    Args:
        joint: Graph traced with empty cross-attention caches. Unchanged.
        caches: Cache input, which is removed -> name of the output.
        shapes: Shapes of the caches.

    Raises:
        NoMatchError: A cache is read by anything but one concatenation with what the graph computes and by nodes that
            read its batch size or other lengths that another input has.
    """
    model = joint.clone()
    IdentityEliminationPass()(model)
    kept = [value for value in model.graph.inputs if value.name not in caches]
    for cache, concat, readers in _appended(model.graph, caches):
        for node in readers:
            length = known_length(model.graph, node, cache, kept, "")
            convenience.replace_all_uses_with(node.outputs[0], length)
            model.graph.remove(node, safe=True)
        computed = concat.inputs[1]
        if computed is None or computed.producer() is None or computed.is_graph_output():
            raise NoMatchError(f"{cache.name} is not computed")
        convenience.replace_all_uses_with(concat.outputs[0], computed)
        model.graph.remove(concat, safe=True)
        model.graph.inputs.remove(cache)
        computed.name, computed.shape = caches[str(cache.name)], ir.Shape(shapes[str(cache.name)])
        model.graph.outputs.append(computed)
    return model


def with_cross_inputs(joint: ir.Model, shapes: Shapes) -> ir.Model:
    """Return a copy of a graph that takes the cross-attention caches and doesn't compute them.

    Args:
        joint: Graph traced with empty cross-attention caches. Unchanged.
        shapes: Shapes of the caches.

    Raises:
        NoMatchError: A cache is read by anything but one concatenation with what the graph computes and by nodes that
            read its shape.
    """
    model = joint.clone()
    IdentityEliminationPass()(model)
    for cache, concat, _ in _appended(model.graph, shapes):
        cache.shape = ir.Shape(shapes[str(cache.name)])
        convenience.replace_all_uses_with(concat.outputs[0], cache)
        model.graph.remove(concat, safe=True)
    remove_unused(model)
    return model


def _appended(graph: ir.Graph, caches: Mapping[str, object]) -> Iterator[tuple[ir.Value, ir.Node, Sequence[ir.Node]]]:
    """Yield each cache input in `caches`, the `Concat` that joins it to what is computed, and each `Shape` of it."""
    for cache in [value for value in graph.inputs if value.name in caches]:
        uses = list(cache.uses())
        shapes = [use.node for use in uses if use.node.op_type == "Shape"]
        concats = [use.node for use in uses if use.node.op_type == "Concat" and use.idx == 0]
        if len(concats) != 1 or len(concats[0].inputs) != 2 or len(uses) != len(shapes) + 1:
            raise NoMatchError(f"{', '.join(use.node.op_type for use in uses) or 'nothing'} reads {cache.name}")
        yield cache, concats[0], shapes
