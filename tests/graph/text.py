"""Graphs written as ONNX text, and ONNX Runtime's answer to them."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime

from accel.graph.passes import GraphPass

Arrays = Mapping[str, np.ndarray]

HEADER = '<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>'


def parse(body: str, weights: Arrays | None = None, header: str = HEADER) -> ir.Model:
    """The graph `body` describes, with `weights` as its initializers. Checked by shape inference."""
    proto = onnx.parser.parse_model(f"{header}\n{body}")
    for name, array in (weights or {}).items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def run(model: ir.Model, inputs: Arrays) -> dict[str, np.ndarray]:
    """Every output by name. Inputs that the graph doesn't take are left out."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    taken = {spec.name for spec in session.get_inputs()}
    values = session.run(None, {name: value for name, value in inputs.items() if name in taken})
    return dict(zip((spec.name for spec in session.get_outputs()), values, strict=True))


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    """Random float32 numbers, all different."""
    return np.random.default_rng(seed + 31 * sum(shape)).standard_normal(shape).astype(np.float32)


def flag(value: bool, name: str = "enable_cache") -> dict[str, np.ndarray]:
    """The merged graph's boolean input."""
    return {name: np.array(value)}


def rewritten(
    graph_pass: GraphPass, models: list[ir.Model], inputs: Sequence[Arrays], rtol: float = 1e-5
) -> list[list[str]]:
    """Run a pass over `models`; every output must keep its name, shape and numbers for each of `inputs`.

    The pass must report a change exactly where the model, as it would be saved, is another. Return the operators left
    in each graph, in order.
    """
    before = [[run(model, each) for each in inputs] for model in models]
    saved = [_saved(model) for model in models]
    graph_pass.prepare(models)
    modified = [graph_pass(model).modified for model in models]
    assert modified == [_saved(model) != earlier for model, earlier in zip(models, saved, strict=True)]
    for model, expected in zip(models, before, strict=True):
        for each, right in zip(inputs, expected, strict=True):
            found = run(ir.from_proto(ir.to_proto(model)), each)
            assert list(found) == list(right)
            for name, array in right.items():
                assert found[name].shape == array.shape, name
                np.testing.assert_allclose(found[name], array, rtol=rtol, atol=1e-6, err_msg=name)
    return [[node.op_type for node in model.graph] for model in models]


def _saved(model: ir.Model) -> bytes:
    """Return the model as it would be saved. Reading a constant names its tensor, so all are read first."""
    for node in model.graph.all_nodes():
        for value in node.outputs:
            ir.convenience.get_const_tensor(value)
    return ir.to_proto(model).SerializeToString(deterministic=True)


def weight(model: ir.Model, name: str) -> np.ndarray:
    """Content of an initializer."""
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()
