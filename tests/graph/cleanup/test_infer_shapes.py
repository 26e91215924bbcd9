"""Missing shapes are inferred; known ones stay."""

import onnx_ir as ir

from accel.graph.cleanup.infer_shapes import InferShapes
from tests.graph.text import numbers, parse, rewritten


def test_open_shapes_are_filled_and_known_ones_stay() -> None:
    """Inference goes on behind an operator that ONNX doesn't define, whose output has a noted type."""
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
    rewritten(InferShapes(), [model], [{"x": numbers(2, 3, 8)}])
    assert str(values["made"].shape) == "[b,t,4]"
    assert values["made"].dtype == ir.DataType.FLOAT
    assert str(values["turned"].shape) == "[b,noted,4]"
    assert str(values["normed"].shape) == "[b,t,8]"
    assert not InferShapes()(model).modified
