"""Reading of graphs: what the engine refuses, and what depends on data."""

import re
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch
from onnx.helper import make_node

from accel.engine.nodes import read_graph
from accel.engine.operators import OPERATORS
from accel.errors import AccelError
from tests.engine.graphs import write_graph
from tests.engine.one_node import to_onnx
from tests.engine.operators import (
    test_arithmetic,
    test_attention,
    test_indexing,
    test_logic,
    test_low_bits,
    test_normalization,
    test_products,
    test_reductions,
    test_shapes,
)


def test_every_operator_is_compared_with_onnxruntime() -> None:
    cases = [
        *test_arithmetic.FLOATS,
        *test_arithmetic.OTHERS,
        *test_attention.ATTENTION,
        *test_attention.ROTARY,
        *test_indexing.CASES,
        *test_logic.CASES,
        *test_low_bits.CASES,
        *test_normalization.CASES,
        *test_products.CASES,
        *test_reductions.FLOATS,
        *test_shapes.CASES,
    ]
    assert {(case.domain, case.operator) for case in cases} == set(OPERATORS)


def test_the_import_is_light() -> None:
    """Neither the package `accel` nor the engine imports ONNX before a graph is read."""
    program = (
        "import sys, accel, accel.engine.executor; "
        "print([name for name in ('onnx', 'onnx_ir', 'onnxruntime', 'hydra', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (
            make_node("Einsum", ["x"], ["y"], "odd", equation="ii"),
            r"node odd: the engine has no operator 'Einsum' of domain 'ai.onnx'. Supported: Add, And, .* TensorScatter",
        ),
        (
            make_node("MatMulBnb4", ["x"], ["y"], "odd", domain="com.microsoft"),
            r"no operator 'MatMulBnb4' of domain 'com.microsoft'. Supported: .*com.microsoft.FusedMatMul",
        ),
        (
            make_node("Softmax", ["x"], ["y"], "odd", scale=2.0),
            r"node odd \(Softmax\): the attribute 'scale' is not supported. Supported: axis",
        ),
        (
            make_node("Relu", ["x"], ["y"], "odd", scale=2.0),
            r"node odd \(Relu\): the attribute 'scale' is not supported. Supported: none",
        ),
        (
            make_node("Add", ["x", "x", "x"], ["y"], "odd"),
            r"node odd \(Add\): 3 inputs are not supported. Supported: a, b",
        ),
        (
            make_node("Constant", [], ["y"], "odd", value_string="x"),
            r"node odd \(Constant\): the attribute 'value_string' is not supported",
        ),
    ],
    ids=lambda value: value.op_type if isinstance(value, onnx.NodeProto) else None,
)
def test_what_is_refused(node: onnx.NodeProto, message: str, tmp_path: Path) -> None:
    path = write_graph(tmp_path, [node], {"x": (torch.float32, [2])}, ["y"])
    with pytest.raises(AccelError, match=message):
        read_graph(path, {})


def test_old_opsets_are_refused(tmp_path: Path) -> None:
    path = write_graph(tmp_path, [make_node("Relu", ["x"], ["y"])], {"x": (torch.float32, [2])}, ["y"], opset=13)
    with pytest.raises(AccelError, match=r"graph.onnx has opset 13: the engine needs 18 or later"):
        read_graph(path, {})


def test_element_types_without_a_dtype(tmp_path: Path) -> None:
    path = write_graph(tmp_path, [make_node("Relu", ["x"], ["y"])], {"x": (torch.float32, [2])}, ["y"])
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT8E4M3FN
    onnx.save(model, path)
    with pytest.raises(AccelError, match=re.escape("x has the ONNX element type 17, not one of [1, 2, 3, ")):
        read_graph(path, {})


def test_weights_must_be_handed_over(tmp_path: Path) -> None:
    """An external data file isn't read, as the weights are in memory already."""
    weight = to_onnx("w", torch.ones(2))
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="missing.bin")
    nodes = [make_node("Add", ["x", "w"], ["y"])]
    path = write_graph(tmp_path, nodes, {"x": (torch.float32, [2])}, ["y"], [weight])
    with pytest.raises(AccelError, match="the weight w is not in the ONNX file, and was not handed over"):
        read_graph(path, {})
    held = torch.tensor([3.0, 4.0])
    assert read_graph(path, {"w": held}).constants["w"] is held


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (torch.tensor([1.5, -2.0], dtype=torch.bfloat16), torch.bfloat16),
        (torch.tensor([[1.5], [-2.0]]).half(), torch.float16),
        (torch.tensor([True, False]), torch.bool),
        (torch.zeros(0, 3), torch.float32),
        (torch.tensor(2**40), torch.int64),
    ],
    ids=str,
)
def test_constants_of_every_kind(value: torch.Tensor, dtype: torch.dtype, tmp_path: Path) -> None:
    node = make_node("Constant", [], ["c"], value=to_onnx("c", value))
    cast = make_node("Cast", ["c"], ["y"], to=1)
    path = write_graph(tmp_path, [node, cast], {"x": (torch.float32, [2])}, ["y"], [to_onnx("unused", value)])
    constants = read_graph(path, {}).constants
    assert list(constants) == ["c"]
    assert constants["c"].dtype is dtype
    assert torch.equal(constants["c"], value)


def test_constants_as_numbers(tmp_path: Path) -> None:
    nodes = [
        make_node("Constant", [], ["a"], value_int=3),
        make_node("Constant", [], ["b"], value_floats=[0.5, 2.0]),
        make_node("Cast", ["a"], ["c"], to=1),
        make_node("Add", ["b", "c"], ["y"]),
    ]
    constants = read_graph(write_graph(tmp_path, nodes, {"x": (torch.float32, [2])}, ["y"]), {}).constants
    assert torch.equal(constants["a"], torch.tensor(3))
    assert torch.equal(constants["b"], torch.tensor([0.5, 2.0]))


def test_what_depends_on_data(tmp_path: Path) -> None:
    """Shapes don't, except those of what is selected by values, and all that is computed from them."""
    nodes = [
        make_node("Shape", ["x"], ["length"]),
        make_node("Relu", ["x"], ["positive"]),
        make_node("Shape", ["positive"], ["same_length"]),
        make_node("Cast", ["positive"], ["chosen"], to=9),
        make_node("NonZero", ["chosen"], ["indices"], "select"),
        make_node("Neg", ["indices"], ["negative"]),
        make_node("Shape", ["negative"], ["count"]),
        make_node("Expand", ["x", "count"], ["y"]),
        make_node("Add", ["length", "same_length"], ["z"]),
    ]
    graph = read_graph(write_graph(tmp_path, nodes, {"x": (torch.float32, [2])}, ["y", "z"]), {})
    assert graph.runtime == {"x", "positive", "chosen", "indices", "negative", "count", "y"}
    assert graph.unknown == {"indices", "negative", "y"}
    assert graph.obstacle == "node select (NonZero) has an output shape that depends on its input's values"


def test_a_shape_that_is_data(tmp_path: Path) -> None:
    """The lengths are read from the device, so a run can't be captured."""
    inputs = {"x": (torch.float32, [1]), "n": (torch.int64, [1])}
    graph = read_graph(write_graph(tmp_path, [make_node("Expand", ["x", "n"], ["y"], "grow")], inputs, ["y"]), {})
    assert graph.obstacle == "node grow (Expand) has an output shape that depends on its input's values"
