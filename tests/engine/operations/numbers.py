"""Tensors for the operations, and the comparison with their numpy references."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # of the largest magnitude


class Numbers:
    """Normally distributed tensors that differ from each other.

    Args:
        dtype: Their dtype, unless another is asked for.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(3)

    def __call__(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Return the next tensor."""
        return (torch.randn(shape, generator=self.generator) * scale).to(dtype or self.dtype)


def arrays(tensors: Sequence[Tensor]) -> list[NDArray[np.float64]]:
    """Return tensors as arrays in FP64; integers as they are."""
    return [x.double().numpy() if x.is_floating_point() else x.numpy() for x in tensors]


def check(found: Tensor, expected: NDArray[np.float64], dtype: torch.dtype) -> None:
    """Compare a tensor, as rows, with an array, within the tolerance of a dtype."""
    assert np.isfinite(expected).all()
    difference = np.abs(found.double().numpy().reshape(expected.shape) - expected).max()
    assert difference <= TOLERANCE[dtype] * np.abs(expected).max()
