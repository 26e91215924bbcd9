"""Layer normalisation and its variants, computed in FP32 for 16-bit inputs."""

import torch
from torch import Tensor
from torch.nn import functional

from accel.engine.registry import MICROSOFT, operator, unsupported


@operator("LayerNormalization")
def layer_norm(
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
) -> Tensor:
    """Return (x - mean) / sqrt(variance + epsilon) * scale + bias, over the axes from `axis` on."""
    _check_stash_type(stash_type)
    shape = x.shape[axis:]
    return functional.layer_norm(x, shape, scale.expand(shape), None if bias is None else bias.expand(shape), epsilon)


@operator("SimplifiedLayerNormalization")
def rms_norm(x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1) -> Tensor:
    """Return x / sqrt(mean(x^2) + epsilon) * scale, over the axes from `axis` on. ONNX Runtime's, in ONNX's domain."""
    _check_stash_type(stash_type)
    shape = x.shape[axis:]
    return functional.rms_norm(x, shape, scale.expand(shape), epsilon)


def _check_stash_type(stash_type: int) -> None:
    """Raise `AccelError` for another dtype of the computation than FP32."""
    if stash_type != 1:
        raise unsupported("stash_type", stash_type, "1 (FP32)")


NormedSum = tuple[Tensor, None, None, Tensor]
"""Output, mean and inverse deviation, which aren't made, and the sum."""


@operator("SkipLayerNormalization", MICROSOFT)
def skip_layer_norm(
    x: Tensor,
    skip: Tensor,
    scale: Tensor,
    beta: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    epsilon: float = 1e-12,
) -> NormedSum:
    """Return the layer normalisation of x + skip + bias over the last axis, scaled and with `beta` added, and the sum.

    All of [B, S, D], but `skip` may have a batch of 1 or none; scale, beta and bias [D].
    """
    total = _sum(x, skip, bias)
    return layer_norm(total, scale, beta, epsilon=epsilon), None, None, total


@operator("SkipSimplifiedLayerNormalization", MICROSOFT)
def skip_rms_norm(
    x: Tensor, skip: Tensor, scale: Tensor, bias: Tensor | None = None, *, epsilon: float = 1e-12
) -> NormedSum:
    """Return the RMS normalisation of x + skip + bias over the last axis, scaled, and the sum. Shapes as above."""
    total = _sum(x, skip, bias)
    return rms_norm(total, scale, epsilon=epsilon), None, None, total


def _sum(x: Tensor, skip: Tensor, bias: Tensor | None) -> Tensor:
    """Return x + skip + bias, rounded once."""
    if bias is None:
        return x + skip
    if x.dtype == torch.float32:
        return x + skip + bias
    return (x.float() + skip + bias).to(x.dtype)
