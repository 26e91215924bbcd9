"""Layer and RMS normalisation of rows."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Norm:
    """A norm over the features of a row.

    Attributes:
        kind: `rms` (https://arxiv.org/abs/1910.07467) or `layer` (https://arxiv.org/abs/1607.06450).
        epsilon: Number added to the mean square.
    """

    kind: str
    epsilon: float

    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None = None) -> Tensor:
        """Return the norm of the last axis in FP32.

        Args:
            x: [..., K].
            weight: [K], or None for ones.
            bias: [K]; only of a layer norm.
        """
        shape = x.shape[-1:]
        factors = None if weight is None else weight.float()
        if self.kind == "rms":
            return functional.rms_norm(x.float(), shape, factors, self.epsilon)
        return functional.layer_norm(x.float(), shape, factors, None if bias is None else bias.float(), self.epsilon)

    def __str__(self) -> str:
        return f"{self.kind} norm"


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None = None,
    *residuals: Tensor,
    norm: Norm,
    dtype: torch.dtype,
) -> Tensor:
    """Return the norm of the last axis plus residuals.

    Args:
        x: [B, 1, K].
        weight: [K], or None.
        bias: [K], or None.
        residuals: Added, each [B, 1, K].
        norm: The norm.
        dtype: Dtype of the result.

    Returns:
        [B, 1, K].
    """
    result = norm(x, weight, bias)
    for residual in residuals:
        result = result + residual
    return result.to(dtype)


Array = NDArray[np.floating]


def reference(
    x: Array, weight: Array | None, bias: Array | None = None, residual: Array | None = None, *, norm: Norm
) -> Array:
    """Return `normalize` of rows in numpy: x [B, K], weight and bias [K], residual [B, K]."""
    centred = x - x.mean(-1, keepdims=True) if norm.kind == "layer" else x
    result = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + norm.epsilon)
    result = result if weight is None else result * weight
    result = result if bias is None else result + bias
    return result if residual is None else result + residual
