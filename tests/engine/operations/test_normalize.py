"""Norms of rows against their reference in numpy."""

import pytest
import torch

from accel.engine.operations.normalize import Norm, Normalize, normalize, reference
from tests.engine.operations.numbers import Numbers, arrays, check

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


@DTYPES
@pytest.mark.parametrize("rows", [1, 5, 16])
@pytest.mark.parametrize("residuals", [0, 1])
@pytest.mark.parametrize(
    ("kind", "weight", "bias"),
    [(kind, weight, False) for kind in ("rms", "layer") for weight in (False, True)] + [("layer", True, True)],
)
def test_against_numpy(kind: str, weight: bool, bias: bool, residuals: int, rows: int, dtype: torch.dtype) -> None:
    numbers = Numbers(dtype)
    spec = Normalize(Norm(kind, 0.3), weight, bias, dtype)
    x = numbers(rows, 1, 37) + 0.5  # a mean, which one of the norms subtracts
    tensors = [numbers(37, dtype=torch.float32)] * weight + [numbers(37)] * bias
    added = [numbers(rows, 1, 37)] * residuals
    found = normalize(x, *tensors, *added, spec=spec)
    assert found.dtype is dtype
    assert found.shape == x.shape
    arguments = [*arrays(tensors), *[None] * (2 - len(tensors))]
    residual = [each.reshape(rows, 37) for each in arrays(added)]
    check(found, reference(arrays([x])[0].reshape(rows, 37), *arguments, *residual, norm=spec.norm), dtype)


def test_squares_beyond_the_range_of_fp16() -> None:
    x = Numbers(torch.float16)(2, 1, 16, scale=3000.0)
    found = normalize(x, spec=Normalize(Norm("rms", 1e-6), False, False, torch.float16))
    check(found, reference(x.double().numpy().reshape(2, 16), None, norm=Norm("rms", 1e-6)), torch.float16)
