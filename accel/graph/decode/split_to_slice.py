"""Cut parts of different sizes one by one."""

import onnx_ir as ir
from onnx_ir import convenience
from onnx_ir.passes import PassResult

from accel.graph.passes import GraphPass, remove_unused
from accel.graph.shapes import integers


class SplitToSlice(GraphPass):
    """Replace a `Split` into parts of different sizes by a `Slice` for each part that is used.

    On CUDA, ONNX Runtime (1.31) copies the sizes of such a `Split` from host memory to the device in four copies per
    run. They take longer than cutting the parts, and a captured CUDA graph reads the same host memory when it is
    replayed, whatever it holds by then.
    """

    name = "split_to_slice"
    description = "Slice parts of different sizes"

    def call(self, model: ir.Model) -> PassResult:
        """Replace them in the main graph."""
        modified = False
        for node in list(model.graph):
            sizes = _sizes(node) if node.op_type == "Split" and node.domain == "" else ()
            if len(set(sizes)) > 1:
                _slice(model.graph, node, sizes)
                modified = True
        return remove_unused(model, modified)


def _sizes(split: ir.Node) -> tuple[int, ...]:
    """Return the lengths of the parts, empty if they are not constant."""
    sizes = split.inputs[1].const_value if len(split.inputs) > 1 and split.inputs[1] is not None else None
    return tuple(sizes.numpy().tolist()) if sizes is not None else ()


def _slice(graph: ir.Graph, split: ir.Node, sizes: tuple[int, ...]) -> None:
    """Replace a `Split` by one `Slice` per part."""
    axis = integers(graph, "axis", [split.attributes.get_int("axis", 0)])
    slices = []
    start = 0
    for part, size in zip(split.outputs, sizes, strict=True):
        limits = [integers(graph, "place", [start]), integers(graph, "place", [start + size])]
        slices.append(ir.node("Slice", [split.inputs[0], *limits, axis], name=f"{part.name}.slice"))
        start += size
    parts = [node.outputs[0] for node in slices]
    convenience.replace_nodes_and_values(graph, split, [split], slices, split.outputs, parts)
