"""Shapes that nobody noted are filled in; those that were noted stay."""

import onnx_ir as ir

from accel.graph.cleanup.infer_shapes import infer_shapes
from tests.graph.text import numbers, parse


def test_open_shapes_are_filled_and_known_ones_stay() -> None:
    """Also behind an operator that the specification lacks, whose output says its own type."""
    norm = "SimplifiedLayerNormalization <axis: int = -1, epsilon: float = 0.001, stash_type: int = 1>"
    model = parse(
        f"""g (float[b, t, 8] x) => (float[b, t, 4] y) <float[b, t, 8] normed> {{
            normed = {norm} (x, scale)
            made = MatMul (normed, w)
            turned = Relu (made)
            y = Neg (turned)
        }}""",
        {"w": numbers(8, 4), "scale": numbers(8)},
    )
    values = {node.outputs[0].name: node.outputs[0] for node in model.graph}
    values["made"].shape = values["made"].type = None
    values["turned"].shape = ir.Shape(["b", "noted", 4])
    infer_shapes([model])
    assert str(values["made"].shape) == "[b,t,4]"
    assert values["made"].dtype == ir.DataType.FLOAT
    assert str(values["turned"].shape) == "[b,noted,4]"
    assert str(values["normed"].shape) == "[b,t,8]"
