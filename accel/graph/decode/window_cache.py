"""Let the static caches of layers with a sliding window be no longer than the window needs, and be filled in turn.

A token of such a layer sees the last W keys alone (https://arxiv.org/abs/2004.05150), so its cache may keep the last
L >= W entries: that of position p in slot p modulo L. Keys are stored after their rotation, so the order of the slots
doesn't matter. The biases of the scores, which the graph computes for all positions, are gathered for the positions
whose entries the slots hold. So the graph's own mask still hides padding, and entries that the window has left behind.

Which layers have a window is read from the mask that each adds to its scores, not from the model's config: the mask is
what the graph computes, whatever a family calls its options. A layer whose mask isn't understood keeps all entries.
"""

import onnx_ir as ir
from onnx_ir.passes import PassResult

from accel.graph.build import add_node
from accel.graph.decode.window_layer import Use, WindowLayer, match, reads, shape_nodes, token_axis
from accel.graph.passes import GraphPass, remove_unused
from accel.graph.shapes import dims, integer, integers

INT64 = ir.DataType.INT64
AXIS = "window_{}"  # axis of such a cache, with the window's length


class WindowCache(GraphPass):
    """Give the static caches of layers with a window of W keys an axis of their own, `window_W`.

    It may have any length from the window's to the bucket's, which masks still have. The pass is for static decode
    graphs of one token. A layer keeps its caches as they are where no other input has the bucket's axis.
    """

    name = "window_cache"
    description = "Keep the cache entries that a sliding window needs"

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite every layer with a window in the main graph."""
        graph = model.graph
        layers: list[WindowLayer] = []
        softmaxes = [node for node in graph if node.op_type == "Softmax" and node.domain == ""]
        self.rewrite_each(softmaxes, lambda node: layers.append(match(node)))
        caches = {cache for layer in layers for cache in layer.caches}
        others = [value for value in graph.inputs if value not in caches]
        rings = Rings(graph)
        for layer in layers:
            source = next((value for value in others if layer.keys in (dims(value) or ())), None)
            if source is None:
                self.log_miss(layer.nodes[0], f"only caches with a window have the axis {layer.keys}")
            else:
                rings.rewrite(layer, source)
        return remove_unused(model) if rings.modified else PassResult(model, modified=False)


class Rings:
    """Caches that are filled in turn, in one graph.

    Args:
        graph: Changed in place.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.graph, self.modified = graph, False
        self._held: dict[str, ir.Value] = {}  # axis -> positions whose entries its slots hold
        self._gathered: dict[tuple[str, ir.Value], ir.Value] = {}  # axis and bias -> the bias of its slots

    def rewrite(self, layer: WindowLayer, source: ir.Value) -> None:
        """Let a layer fill its caches in turn; `source` is an input that has the bucket's axis."""
        bucket, ring = layer.keys, AXIS.format(layer.window)
        for cache, write in zip(layer.caches, layer.writes, strict=True):
            for shape in shape_nodes(cache):
                if reads(shape, token_axis(write)):
                    _read_axis(shape, source, (dims(source) or ()).index(bucket))
            write.attributes["mode"] = ir.AttrString("mode", "circular")
        for value in (*layer.caches, *(node.outputs[0] for node in layer.nodes)):
            lengths = [dim if isinstance(dim, int) else dim.value for dim in value.shape or ()]
            value.shape = ir.Shape([ring if length == bucket else length for length in lengths])
        for use, parts in layer.lengths:
            self._replace_lengths(layer, use, parts)
        for use in layer.biases:
            use.node.replace_input_with(use.index, self._of_slots(layer, ring, use))
        self.modified = True

    def _length(self, layer: WindowLayer, before: ir.Node) -> ir.Value:
        """Return the length of a layer's caches, [1], computed before a node."""
        axis = token_axis(layer.writes[0])
        attributes = {"start": axis, "end": axis + 1}
        return self._int64("Shape", [layer.caches[0]], [1], before, **attributes)

    def _int64(
        self, op_type: str, inputs: list[ir.Value | None], shape: list[int | str], before: ir.Node, **attributes: int
    ) -> ir.Value:
        """Insert a node that computes integers before another one, and return its output."""
        return add_node(
            self.graph, op_type, inputs, attributes=attributes, dtype=INT64, shape=ir.Shape(shape), before=before
        )

    def _replace_lengths(self, layer: WindowLayer, use: Use, parts: list[int]) -> None:
        """Put the caches' length into the shape of a view, which other layers may share."""
        concat = use.value.producer() if use.value is not None else None
        if concat is None:
            return
        lengths = list(concat.inputs)
        for part in parts:
            lengths[part] = self._length(layer, use.node)
        use.node.replace_input_with(use.index, self._int64("Concat", lengths, [len(lengths)], use.node, axis=0))

    def _of_slots(self, layer: WindowLayer, ring: str, use: Use) -> ir.Value:
        """Return the elements of a bias [batch, heads or 1, 1, bucket] for the entries that the slots hold."""
        bias = use.value
        if bias is None:
            raise ValueError("a bias is missing")
        if (ring, bias) not in self._gathered:
            if ring not in self._held:
                self._held[ring] = self._positions(layer, ring, use.node)
            batch, heads, *_ = dims(bias) or ("", 1)
            index = self._held[ring]  # [batch, 1, 1, ring]
            shape: list[int | str] = [batch, heads, 1, ring]
            if heads != 1:
                repeats = integers(self.graph, "shape", [1, int(heads), 1, 1])
                index = self._int64("Expand", [index, repeats], shape, use.node)
            self._gathered[ring, bias] = add_node(
                self.graph,
                "GatherElements",
                [bias, index],
                attributes={"axis": 3},
                dtype=bias.dtype,
                shape=ir.Shape(shape),
                before=use.node,
            )
        return self._gathered[ring, bias]

    def _positions(self, layer: WindowLayer, ring: str, before: ir.Node) -> ir.Value:
        """Return the positions whose entries the slots hold after the token's is written, [batch, 1, 1, ring].

        Slot s of L holds p - (p - s) mod L, the last position up to p that is written there. Before the first one is,
        that is s - L. `GatherElements` counts it from the bucket's end, where it is a position behind p, which the mask
        hides: the bucket is no shorter than L.
        """
        graph, (batch,) = self.graph, dims(layer.position) or ("",)
        zero, one, axes = integer(graph, 0), integer(graph, 1), integers(graph, "axes", [1])
        count = self._int64("Gather", [self._length(layer, before), zero], [], before, axis=0)
        slots = self._int64("Range", [zero, count, one], [ring], before)
        # Not `count`: shapes are on the host, and a copy to a GPU at every run couldn't be captured.
        last = self._int64("Gather", [slots, integers(graph, "index", [-1])], [1], before, axis=0)
        length = self._int64("Add", [last, one], [1], before)
        position = self._int64("Unsqueeze", [layer.position, axes], [batch, 1], before)
        ahead = self._int64("Sub", [position, slots], [batch, ring], before)
        since = self._int64("Mod", [ahead, length], [batch, ring], before)  # of the divisor's sign
        held = self._int64("Sub", [position, since], [batch, ring], before)
        return self._int64("Unsqueeze", [held, integers(graph, "axes", [1, 2])], [batch, 1, 1, ring], before)


def _read_axis(shape: ir.Node, source: ir.Value, axis: int) -> None:
    """Let a `Shape` node of one axis read an axis of another value."""
    shape.replace_input_with(0, source)
    shape.attributes["start"] = ir.AttrInt64("start", axis)
    shape.attributes["end"] = ir.AttrInt64("end", axis + 1)
