"""Infer the types and shapes that the exporter left open."""

import onnx_ir as ir
from onnx_ir.passes import PassResult

from accel.graph.passes import GraphPass, snapshot
from accel.graph.precision.observer import infer_types


class InferShapes(GraphPass):
    """Note missing types and shapes, for the passes that look at them; known ones stay.

    Must run while all operators are standard ones: ONNX's shape inference doesn't know those that fusions insert.
    """

    name = "infer_shapes"
    description = "Infer types and shapes that the exporter left open"

    def call(self, model: ir.Model) -> PassResult:
        """Infer them by ONNX's shape inference."""
        before = snapshot(model)
        infer_types(model)
        return PassResult(model, snapshot(model) != before)
