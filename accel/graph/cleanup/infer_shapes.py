"""Note the types and shapes that the exporter left open, for the passes that look at them."""

from collections.abc import Sequence

import onnx_ir as ir

from accel.graph.precision.observer import infer_types


def infer_shapes(models: Sequence[ir.Model]) -> None:
    """In place. Runs while all operators are standard ones: those that fusing brings in are unknown to inference."""
    for model in models:
        infer_types(model)
