"""Let the caches of a decode graph be longer than their content: the number of past tokens comes from the mask."""

from collections.abc import Collection

import onnx_ir as ir
from onnx_ir import convenience
from onnx_ir.passes import PassResult

from accel.graph.build import add_node
from accel.graph.passes import GraphPass, remove_unused

PAST, PRESENT = (3, 4), (1, 2)  # inputs and outputs of `GroupQueryAttention` that are caches


class SpareRoom(GraphPass):
    """Read the number of past tokens from the widths of mask and ids, if only `GroupQueryAttention` reads the caches.

    Args:
        past: Symbol of the axis of past tokens.
        mask: Name of the attention mask, [batch, past + new].
        ids: Name of the new tokens' ids, [batch, new].
    """

    name = "spare_room"
    description = "Take the number of past tokens from the mask"

    def __init__(self, past: str, mask: str, ids: str) -> None:
        super().__init__()
        self.past, self.mask, self.ids = past, mask, ids

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite the main graph."""
        graph = model.graph
        inputs = {value.name: value for value in graph.inputs}
        caches = [value for value in graph.inputs if self._length_axis(value) is not None]
        lengths = [node for cache in caches for node in cache.consumers() if self._reads_length(node, cache)]
        if self.mask not in inputs or self.ids not in inputs or not lengths:
            return PassResult(model, modified=False)
        others = [node for cache in caches for node in cache.consumers() if node not in lengths]
        if any(node.op_type not in ("GroupQueryAttention", "Shape") for node in others):
            return PassResult(model, modified=False)
        int64, span = ir.DataType.INT64, {"start": 1, "end": 2}
        for node in lengths:
            width, new = (
                add_node(graph, "Shape", [inputs[name]], attributes=span, dtype=int64, before=node)
                for name in (self.mask, self.ids)
            )
            past = add_node(graph, "Sub", [width, new], dtype=int64, shape=ir.Shape([1]), before=node)
            convenience.replace_nodes_and_values(graph, node, [node], [], node.outputs, [past])
        return remove_unused(model)

    def _length_axis(self, value: ir.Value) -> int | None:
        """Return the axis of past tokens; None if `value` has none."""
        for axis, dim in enumerate(value.shape or ()):
            if not isinstance(dim, int) and dim.value == self.past:
                return axis
        return None

    def _reads_length(self, node: ir.Node, cache: ir.Value) -> bool:
        """Return whether a node reads the number of past tokens from the shape of a cache."""
        if node.op_type != "Shape":
            return False
        rank = len(cache.shape or ())
        start, end = node.attributes.get_int("start", 0) % rank, node.attributes.get_int("end", rank)
        return start <= (self._length_axis(cache) or 0) < (end if end >= 0 else end + rank)


def has_spare_room(graph: ir.Graph, caches: Collection[str]) -> bool:
    """Return whether the caches of a decode graph may be longer than their content, and extended in place.

    Args:
        graph: Decode graph.
        caches: Names of its cache inputs.
    """
    inputs = [value for value in graph.inputs if value.name in caches]
    for cache in inputs:
        for node, index in cache.uses():
            if node.op_type == "Shape" and node.attributes.get_int("end", 0) == 1:
                continue  # the batch size
            if node.op_type != "GroupQueryAttention" or index not in PAST:
                return False
            if not node.outputs[PRESENT[PAST.index(index)]].is_graph_output():
                return False
    return bool(inputs) and all(cache.uses() for cache in inputs)
