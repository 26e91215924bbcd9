"""Weight formats: what ONNX Runtime's operators compute with them, and how near they come to the weight."""

import numpy as np
import onnx_ir as ir
import pytest

from accel.graph.quantization.blocks import BlockFormat
from accel.graph.quantization.channels import ChannelFormat
from accel.graph.quantization.formats import BITS, WeightFormat, format_named, formats
from accel.graph.quantization.quantize_products import QuantizedWeights, QuantizeProducts
from tests.graph.text import numbers, parse, run

FORMATS = [format for bits in BITS for format in formats(bits).values()]
SHAPES = [(64, 48), (100, 70), (16, 5), (130, 33)]  # only the first has whole blocks of 64


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """Distance as a share of the expected norm."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def quantized(body: str, weights: dict[str, np.ndarray], format: WeightFormat, name: str = "w") -> ir.Model:
    """The graph with one weight in `format`."""
    model = parse(body, weights)
    assert QuantizeProducts({name: format}, QuantizedWeights())(model).modified
    return model


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_the_operator_computes_with_the_dequantized_weight(format: WeightFormat, shape: tuple[int, int]) -> None:
    """Of a padded batch: products of rounded activations with the weight that the format stands for."""
    inputs, outputs = shape
    weight, rows = numbers(inputs, outputs), numbers(7, inputs, seed=1) * np.arange(1, 8)[:, None].astype(np.float32)
    rows[5] = 0
    model = quantized(
        f"g (float[b, {inputs}] x) => (float[b, {outputs}] y) {{ y = MatMul(x, w) }}", {"w": weight}, format
    )
    restored = format.dequantize(format.quantize(weight), inputs)  # type: ignore[arg-type]
    found = run(model, {"x": rows})["y"]
    expected = format.round_activations(rows) @ restored
    assert relative(found, expected) < 2e-3  # ties of rounding activations, and the order of sums
    assert relative(found, rows @ restored) > relative(found, expected)
    assert restored.shape == weight.shape
    assert relative(restored, weight) < (0.012 if format.bits == 8 else 0.17)


@pytest.mark.parametrize("bits", BITS)
def test_a_block_format_is_as_near_as_rounding_allows(bits: int) -> None:
    """No element is further away than half a step of its block; with the best scale the squared error is smaller."""
    weight = numbers(64, 32)
    format = BlockFormat(bits, 32)
    restored = format.dequantize(format.quantize(weight), 64)
    step = np.abs(weight.reshape(2, 32, 32)).max(1) / (2 ** (bits - 1) - 1)  # [blocks, out]
    plain_scale = step.repeat(32, 0)
    plain = np.round(weight / plain_scale) * plain_scale
    assert np.square(restored - weight).sum() < np.square(plain - weight).sum()
    if bits == 8:
        assert (np.abs(restored - weight) <= 1.1 * plain_scale).all()


def test_zero_points_help_where_a_block_has_one_sign() -> None:
    """All integers are used for numbers from 1 to 2."""
    weight = np.random.default_rng(0).uniform(1, 2, (64, 16)).astype(np.float32)
    errors = {}
    for symmetric in (True, False):
        format = BlockFormat(4, 32, symmetric)
        errors[symmetric] = relative(format.dequantize(format.quantize(weight), 64), weight)
    assert errors[False] < 0.8 * errors[True]


def test_sizes_are_those_of_the_arrays() -> None:
    """Of every format, with a last block that is partly padding."""
    weight = numbers(100, 70)
    for format in FORMATS:
        arrays = format.quantize(weight)
        total = sum(array.nbytes for array in vars(arrays).values() if array is not None)
        total += 70 if isinstance(format, ChannelFormat) else 0  # its zero points are all the same
        assert total == format.size(100, 70), format.name
        assert format_named(format.name) == format


def test_zeros_stay_zeros() -> None:
    """A weight without any other number."""
    for format in FORMATS:
        restored = format.dequantize(format.quantize(np.zeros((40, 3), np.float32)), 40)  # type: ignore[arg-type]
        np.testing.assert_array_equal(restored, 0)


def test_an_unknown_name_is_refused() -> None:
    """By name."""
    with pytest.raises(ValueError, match="'int3 block-32'"):
        format_named("int3 block-32")


def test_rows_of_a_batch_do_not_depend_on_each_other_in_blocks() -> None:
    """Unlike with one scale for the whole input."""
    weight, rows = numbers(64, 48), numbers(4, 64, seed=1)
    loud = rows.copy()
    loud[3] *= 1000
    body = "g (float[b, 64] x) => (float[b, 48] y) { y = MatMul(x, w) }"
    for format in (BlockFormat(8, 32), BlockFormat(4, 32, symmetric=False)):
        model = quantized(body, {"w": weight}, format)
        np.testing.assert_array_equal(run(model, {"x": rows})["y"][:3], run(model, {"x": loud})["y"][:3])
    model = quantized(body, {"w": weight}, ChannelFormat())
    assert relative(run(model, {"x": loud})["y"][:3], run(model, {"x": rows})["y"][:3]) > 0.5
