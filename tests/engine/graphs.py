"""Small graphs, written to files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
import torch

from tests.engine.one_node import NUMBERS


def write_graph(
    folder: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, tuple[torch.dtype, Sequence[int | str]]],
    outputs: Sequence[str],
    initializers: Sequence[onnx.TensorProto] = (),
    opset: int = 24,
) -> Path:
    """Write a graph to `graph.onnx`. Return its path.

    Args:
        folder: Folder of the file.
        nodes: Its nodes in order.
        inputs: Input -> dtype and shape.
        outputs: Names of its outputs, whose types aren't given.
        initializers: Its initializers.
        opset: Version of ONNX's own operators.
    """
    infos = {
        name: onnx.helper.make_tensor_value_info(name, NUMBERS[dtype], shape) for name, (dtype, shape) in inputs.items()
    }
    results = [infos.get(name, onnx.ValueInfoProto(name=name)) for name in outputs]
    graph = onnx.helper.make_graph(nodes, "graph", list(infos.values()), results, initializers)
    opsets = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid("com.microsoft", 1)]
    path = folder / "graph.onnx"
    path.write_bytes(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())
    return path
