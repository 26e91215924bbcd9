"""Products of rows with weights, and what is computed before and after them, against their reference in numpy."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from accel.engine.low_bits import LowBits
from accel.engine.operations.activations import ACTIVATIONS, Activation
from accel.engine.operations.normalize import Norm
from accel.engine.operations.product import Part, Product, product, reference
from tests.engine.operations.numbers import Numbers, arrays, check

WIDTH, FEATURES = 37, 19
PLAIN = Product(None, False, False, (Part(),), 0, torch.float32)
GATED = Part(activation=Activation("silu"), gated=True)
SPECS = {
    "plain": PLAIN,
    "scaled": replace(PLAIN, parts=(Part(alpha=0.3, beta=-2.0),)),
    "scaled up": replace(PLAIN, parts=(Part(alpha=3.0, beta=0.5, has_bias=True),)),
    "transposed": replace(PLAIN, parts=(Part(transposed=True),)),
    "bias": replace(PLAIN, parts=(Part(has_bias=True, activation=Activation("relu")),)),
    "rms norm": replace(PLAIN, norm=Norm("rms", 0.2), norm_weight=True),
    "norm without weight": replace(PLAIN, norm=Norm("rms", 0.2)),
    "layer norm": replace(PLAIN, norm=Norm("layer", 0.2), norm_weight=True, norm_bias=True),
    "residuals": replace(PLAIN, parts=(Part(beta=3.0),), residuals=2),
    "gated": replace(PLAIN, parts=(GATED,), residuals=1),
    "gated, biases": replace(PLAIN, parts=(replace(GATED, alpha=0.5, has_bias=True, gate_bias=True, beta=0.7),)),
    "gated, one bias": replace(PLAIN, parts=(replace(GATED, gate_bias=True, transposed=True),)),
    "parts": replace(
        PLAIN,
        norm=Norm("rms", 0.2),
        norm_weight=True,
        parts=(Part(has_bias=True), GATED, Part(transposed=True, alpha=2.0), Part(activation=Activation("tanh"))),
    ),
}


def tensors_of(spec: Product, numbers: Numbers, rows: int, weights: torch.dtype) -> list[Tensor]:
    """Return random tensors for a product, in its order; each part's width is another."""
    tensors = [numbers(rows, 1, WIDTH) + 0.5]
    tensors += [numbers(WIDTH) for _ in range(spec.norm_weight + spec.norm_bias)]
    for index, part in enumerate(spec.parts):
        features = FEATURES + index
        for has_bias in (part.has_bias, part.gate_bias)[: 1 + part.gated]:
            shape = (features, WIDTH) if part.transposed else (WIDTH, features)
            tensors.append(numbers(*shape, scale=WIDTH**-0.5, dtype=weights))
            tensors += [numbers(features)] * has_bias
    return tensors + [numbers(rows, 1, FEATURES) for _ in range(spec.residuals)]


def compare(spec: Product, rows: int, dtype: torch.dtype, weights: torch.dtype) -> None:
    """Compare a product with its reference."""
    spec = replace(spec, dtype=dtype)
    tensors = tensors_of(spec, Numbers(dtype), rows, weights)
    found = product(*tensors, spec=spec)
    x, *rest = arrays(tensors)
    if spec.residuals:
        rest[-spec.residuals :] = [each.reshape(rows, -1) for each in rest[-spec.residuals :]]
    expected = reference(x.reshape(rows, WIDTH), *rest, spec=spec)
    for index, (output, array) in enumerate(zip(found, expected, strict=True)):
        assert output.dtype is dtype
        assert output.shape == (rows, 1, FEATURES + index)
        check(output, array, dtype)


@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_against_numpy(name: str, dtype: torch.dtype, rows: int) -> None:
    compare(SPECS[name], rows, dtype, dtype)


@pytest.mark.parametrize("name", SPECS)
def test_weights_kept_in_fp32(name: str) -> None:
    """They are multiplied with rows in FP32, though these are read and written in FP16."""
    compare(SPECS[name], 2, torch.float16, torch.float32)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str) -> None:
    part = Part(activation=Activation(name, 0.8 if name == "softcap" else 0.0), has_bias=True)
    compare(replace(PLAIN, parts=(part,)), 2, torch.float32, torch.float32)


def test_rows_of_several_axes() -> None:
    """Heads side by side are one row."""
    numbers = Numbers()
    x, weight = numbers(2, 3, 1, 5), numbers(15, 4)
    (found,) = product(x, weight, spec=PLAIN)
    check(found, x.reshape(2, 15).double().numpy() @ weight.double().numpy(), torch.float32)


def test_a_factor_keeps_a_product_in_range() -> None:
    """T5 scales what its head reads by 1 / sqrt(width): unscaled, the product overflows FP16."""
    x, weight = torch.full((1, 1, 64), 200.0).half(), torch.full((64, 2), 10.0).half()
    (found,) = product(x, weight, spec=replace(PLAIN, parts=(Part(alpha=0.125),), dtype=torch.float16))
    assert found.flatten().tolist() == [16000.0, 16000.0]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("low", [LowBits(8, 16, WIDTH), LowBits(4, 32, WIDTH, True)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_weights_of_few_bits(low: LowBits, gated: bool, dtype: torch.dtype) -> None:
    numbers = Numbers(dtype)
    part = Part(0.3, transposed=True, has_bias=True, gated=gated, gate_bias=gated, low_bits=low)
    tensors = [numbers(3, 1, WIDTH)]
    blocks = -(-WIDTH // low.block)
    for _ in range(1 + gated):
        tensors.append(torch.randint(0, 256, (FEATURES, blocks, low.block * low.bits // 8), dtype=torch.uint8))
        tensors.append(numbers(FEATURES, blocks, scale=2.0 ** -(low.bits + 2)))
        if low.zero_points:
            tensors.append(torch.randint(0, 256, (FEATURES, -(-blocks * low.bits // 8)), dtype=torch.uint8))
        tensors.append(numbers(FEATURES))
    spec = replace(PLAIN, parts=(part,), dtype=dtype)
    (found,) = product(*tensors, spec=spec)
    x, *rest = arrays(tensors)
    (expected,) = reference(x.reshape(3, WIDTH), *rest, spec=spec)
    check(found, expected, dtype)
