"""Give a `Reshape` its target as a constant, where the exporter computes it from the lengths of its inputs."""

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from accel.graph.shapes import Dims, dims, integers


def static_reshapes(models: Sequence[ir.Model]) -> None:
    """In place: a shape vector put together at run time becomes a constant, and what computed it goes.

    An axis that keeps its place and length is written 0, which copies it; a fixed one as it is. One axis may be -1,
    and only where all others are fixed: next to a copied axis of length 0, -1 could not be told.
    ONNX specification: https://onnx.ai/onnx/operators/onnx__Reshape.html
    """
    for model in models:
        for node in list(model.graph):
            if node.op_type == "Reshape" and node.domain == "" and node.inputs[1] is not None:
                target = _target(node.inputs[0], node.outputs[0])
                if node.inputs[1].const_value is None and target is not None:
                    node.replace_input_with(1, integers(model.graph, "shape", target))
                    node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)
        RemoveUnusedNodesPass()(model)


def _target(given: ir.Value | None, made: ir.Value) -> tuple[int, ...] | None:
    wanted = dims(made)
    if wanted is None or 0 in wanted:  # a 0 would copy
        return None
    source: Dims = dims(given) or ()
    kept = [index < len(source) and dim == source[index] for index, dim in enumerate(wanted)]
    target = tuple(dim if isinstance(dim, int) else 0 if same else -1 for dim, same in zip(wanted, kept, strict=True))
    return target if -1 not in target or (target.count(-1) == 1 and 0 not in target) else None
