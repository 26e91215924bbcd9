"""Parts of different sizes are cut one by one."""

import onnx_ir as ir
from onnx_ir import convenience
from onnx_ir.passes.common import RemoveUnusedNodesPass

from accel.graph.shapes import integers


def split_to_slice(model: ir.Model) -> None:
    """In place: a `Split` into parts of different sizes becomes a `Slice` for each part that is used.

    On CUDA, ONNX Runtime (1.31) hands such a `Split` its sizes in four copies from host memory at every run. They take
    longer than the parts do; and a recorded run reads that memory again when it is replayed, whatever it holds by then.
    """
    graph = model.graph
    for node in list(graph):
        sizes = _sizes(node) if node.op_type == "Split" and node.domain == "" else ()
        if len(set(sizes)) < 2:
            continue
        axis, start = integers(graph, "axis", [node.attributes.get_int("axis", 0)]), 0
        for part, size in zip(list(node.outputs), sizes, strict=True):
            ends = [integers(graph, "place", [place]) for place in (start, start + size)]
            made = ir.node("Slice", [node.inputs[0], *ends, axis], name=f"{part.name}.slice")
            made.outputs[0].type, made.outputs[0].shape = part.type, part.shape
            graph.insert_before(node, made)
            convenience.replace_all_uses_with(part, made.outputs[0], replace_graph_outputs=True)
            made.outputs[0].name, part.name = part.name, f"{part.name}.part"
            start += size
        graph.remove(node, safe=True)
    RemoveUnusedNodesPass()(model)


def _sizes(node: ir.Node) -> tuple[int, ...]:
    """The parts' lengths, where they are known."""
    given = node.inputs[1].const_value if len(node.inputs) > 1 and node.inputs[1] is not None else None
    return tuple(given.numpy().tolist()) if given is not None else ()
