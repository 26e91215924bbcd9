"""Graphs of one node, run by ONNX Runtime and by the executor."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

from accel.engine.dtypes import DTYPES
from accel.engine.executor import Executor
from accel.engine.nodes import read_graph

NUMBERS = {dtype: number for number, dtype in DTYPES.items()}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """A node: its operator, inputs (None for one left out), attributes, and which of its outputs are read."""

    operator: str
    inputs: Sequence[Tensor | None]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    domain: str = ""
    outputs: Sequence[bool] = (True,)

    def __str__(self) -> str:
        shapes = ",".join("-" if value is None else "x".join(map(str, value.shape)) or "()" for value in self.inputs)
        return f"{self.operator}({shapes}){dict(self.attributes) or ''}"

    def write(self, path: Path, constant: Sequence[int] = ()) -> dict[str, Tensor]:
        """Write a graph of the node, in which the inputs with these indices are initializers. Return the others."""
        names = ["" if value is None else f"in{index}" for index, value in enumerate(self.inputs)]
        outputs = [f"out{index}" if read else "" for index, read in enumerate(self.outputs)]
        node = onnx.helper.make_node(self.operator, names, outputs, "node", domain=self.domain, **self.attributes)
        infos, initializers, feeds = [], [], {}
        for index, (name, value) in enumerate(zip(names, self.inputs, strict=True)):
            if value is None:
                continue
            if index in constant:
                initializers.append(to_onnx(name, value))
            else:
                feeds[name] = value
                infos.append(onnx.helper.make_tensor_value_info(name, NUMBERS[value.dtype], value.shape))
        results = [onnx.ValueInfoProto(name=name) for name in outputs if name]  # ONNX Runtime infers their types
        graph = onnx.helper.make_graph([node], "one_node", infos, results, initializers)
        opsets = [onnx.helper.make_opsetid("", 24), onnx.helper.make_opsetid("com.microsoft", 1)]
        path.write_bytes(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())
        return feeds

    def to(self, dtype: torch.dtype) -> "Case":
        """Return the case with its floating-point inputs in another dtype."""
        inputs = [
            value.to(dtype) if value is not None and value.is_floating_point() else value for value in self.inputs
        ]
        return Case(self.operator, inputs, self.attributes, self.domain, self.outputs)


def to_onnx(name: str, value: Tensor) -> onnx.TensorProto:
    """Return a tensor as an initializer."""
    raw = value.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
    return onnx.TensorProto(name=name, data_type=NUMBERS[value.dtype], dims=value.shape, raw_data=raw)


def reference(path: Path, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the outputs that ONNX Runtime computes on the CPU, as the graph is written."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    values = session.run(None, {name: value.numpy() for name, value in feeds.items()})
    names = [output.name for output in session.get_outputs()]
    return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}


def run_all(case: Case, path: Path) -> dict[str, Tensor]:
    """Return a node's outputs from the executor, by name."""
    feeds = case.write(path)
    return Executor(read_graph(path, {}), CPU).run(feeds)


def run(case: Case, path: Path) -> Tensor:
    """Return a node's first output from the executor."""
    return run_all(case, path)["out0"]


def check(case: Case, path: Path, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Compare a node's outputs with ONNX Runtime's: with its inputs as data, partly as constants, and all as constants.

    Each twice, as the second run repeats what the first one has prepared.
    """
    count = len(case.inputs)
    expected = reference(path, case.write(path))
    for constant in (range(0), range(1, count), range(count)):
        feeds = case.write(path, constant)
        before = {name: value.clone() for name, value in feeds.items()}
        executor = Executor(read_graph(path, {}), CPU)
        for _ in range(2):
            found = executor.run(feeds)
            assert list(found) == list(expected)
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, rtol=rtol, atol=atol, equal_nan=True)
        for name, value in before.items():
            torch.testing.assert_close(feeds[name], value, rtol=0, atol=0, equal_nan=True, msg=f"{name} was changed")


def check_16_bits(case: Case, path: Path, dtype: torch.dtype) -> None:
    """Compare a node's outputs in 16 bits with those in FP32 of the same values: only the last rounding may differ."""
    half = case.to(dtype)
    found, expected = run_all(half, path), run_all(half.to(torch.float32), path)
    tolerance = 2 * torch.finfo(dtype).eps
    for name, value in expected.items():
        assert found[name].dtype == (dtype if value.is_floating_point() else value.dtype)
        torch.testing.assert_close(found[name].to(value.dtype), value, rtol=tolerance, atol=tolerance)


def parameters(cases: Sequence[Case]) -> pytest.MarkDecorator:
    """Parametrize a test by cases."""
    return pytest.mark.parametrize("case", cases, ids=str)


HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    """Return normally distributed FP32 numbers, different for each shape and scale."""
    seed = sum(index * length for index, length in enumerate(shape, 1)) + int(1000 * scale)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * scale


def ints(*values: Any) -> Tensor:
    """Return an int64 tensor."""
    return torch.tensor(values, dtype=torch.int64)


def scalar(value: int) -> Tensor:
    """Return an int64 scalar."""
    return torch.tensor(value, dtype=torch.int64)
