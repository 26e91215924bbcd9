"""Layer and RMS normalisation of rows."""

from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class Normalize:
    """A norm and what is added to it.

    The tensors follow each other in this order: x; weight and bias of the norm, where it has them; residuals.

    Attributes:
        norm: The norm.
        has_weight: Whether it has a weight.
        has_bias: Whether it has a bias.
        dtype: Dtype of the output.
    """

    norm: Norm
    has_weight: bool
    has_bias: bool
    dtype: torch.dtype


def normalize(x: Tensor, *tensors: Tensor, spec: Normalize) -> Tensor:
    """Return the norm of rows plus residuals, computed in FP32.

    Args:
        x: [B, ...], K elements a row.
        tensors: See `Normalize`; weight and bias [K], residuals [B, 1, K].
        spec: What is computed.

    Returns:
        [B, 1, K].
    """
    rest = list(tensors)
    weight = rest.pop(0) if spec.has_weight else None
    result = spec.norm(x.reshape(len(x), 1, -1), weight, rest.pop(0) if spec.has_bias else None)
    for residual in rest:
        result = result + residual.reshape(result.shape)
    return result.to(spec.dtype)


Array = NDArray[Any]


def reference(
    x: Array, weight: Array | None, bias: Array | None = None, residual: Array | None = None, *, norm: Norm
) -> Array:
    """Return `normalize` of rows in numpy: x [B, K], weight and bias [K], residual [B, K]."""
    centred = x - x.mean(-1, keepdims=True) if norm.kind == "layer" else x
    result: Array = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + norm.epsilon)
    result = result if weight is None else result * weight
    result = result if bias is None else result + bias
    return result if residual is None else result + residual
