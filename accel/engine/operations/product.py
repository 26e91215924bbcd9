"""Products of one row of features with weights, and what is computed of each feature alone before and after."""

from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from accel.engine.operations.activations import Activation
from accel.engine.operations.normalize import Norm
from accel.engine.operations.normalize import reference as normalized

IDENTITY = Activation()


@dataclass(frozen=True)
class Part:
    """Product with one weight: activation(alpha * x @ weight + bias) [* (x @ gate + gate bias)] * beta.

    Attributes:
        alpha: Factor of the product.
        activation: Of product and bias.
        beta: Factor of the result.
        transposed: Whether the weight is stored [N, K]; else [K, N].
        has_bias: Whether a bias [N] is added.
        gated: Whether a second weight of the same shape and layout gives a factor of every feature.
        gate_bias: Whether that has a bias, too.
    """

    alpha: float = 1.0
    activation: Activation = IDENTITY
    beta: float = 1.0
    transposed: bool = False
    has_bias: bool = False
    gated: bool = False
    gate_bias: bool = False


@dataclass(frozen=True)
class Product:
    """Products of one x with several weights.

    The tensors follow each other in this order: x; weight and bias of the norm, where it has them; for each part its
    weight, bias, gate and bias of the gate, where it has them; residuals.

    Attributes:
        norm: Norm of x, or None.
        norm_weight: Whether the norm has a weight.
        norm_bias: Whether it has a bias.
        parts: The products, each with an output of its own.
        residuals: Number of residuals that are added to the output; only where there is one part.
        dtype: Dtype of the outputs.
    """

    norm: Norm | None
    norm_weight: bool
    norm_bias: bool
    parts: tuple[Part, ...]
    residuals: int
    dtype: torch.dtype


def product(x: Tensor, *tensors: Tensor, spec: Product) -> tuple[Tensor, ...]:
    """Return the output of every part.

    Products are of the weights' dtype, with sums in FP32; all else is computed in FP32.

    Args:
        x: [B, ...], K elements a row.
        tensors: The others; see `Product`. Weights are [K, N] or [N, K], biases [N], residuals [B, 1, N].
        spec: What is computed.

    Returns:
        For every part [B, 1, N].
    """
    rest = list(tensors)
    rows = x.reshape(len(x), 1, -1)
    if spec.norm is not None:
        weight = rest.pop(0) if spec.norm_weight else None
        rows = spec.norm(rows, weight, rest.pop(0) if spec.norm_bias else None)
    outputs = []
    for part in spec.parts:
        y = part.activation(_linear(rows, rest, part.transposed, part.alpha, part.has_bias))
        if part.gated:
            y = y * _linear(rows, rest, part.transposed, 1.0, part.gate_bias)
        outputs.append(y * part.beta if part.beta != 1 else y)
    for residual in rest:
        outputs[0] = outputs[0] + residual.reshape(outputs[0].shape)
    return tuple(output.to(spec.dtype) for output in outputs)


def _linear(x: Tensor, tensors: list[Tensor], transposed: bool, alpha: float, has_bias: bool) -> Tensor:
    """Return alpha * x @ weight + bias in FP32, of the first one or two tensors, which are removed.

    A factor below 1 comes before the product, which 16-bit formats may have to hold, and one above after it.
    """
    weight = tensors.pop(0)
    x = x.float() * alpha if abs(alpha) < 1 else x
    y = functional.linear(x.to(weight.dtype), weight if transposed else weight.mT).float()
    y = y * alpha if abs(alpha) > 1 else y
    return y + tensors.pop(0).float() if has_bias else y


Array = NDArray[Any]


def reference(x: Array, *tensors: Array, spec: Product) -> list[Array]:
    """Return `product` in numpy and in the dtype of x.

    Args:
        x: [B, K].
        tensors: As of `product`, residuals [B, N].
        spec: What is computed.

    Returns:
        For every part [B, N].
    """
    rest = list(tensors)
    if spec.norm is not None:
        weight = rest.pop(0) if spec.norm_weight else None
        x = normalized(x, weight, rest.pop(0) if spec.norm_bias else None, norm=spec.norm)
    outputs = []
    for part in spec.parts:
        weight = rest.pop(0)
        y = part.alpha * (x @ (weight.T if part.transposed else weight))
        y = y + rest.pop(0) if part.has_bias else y
        y = part.activation(torch.from_numpy(y)).numpy()
        if part.gated:
            gate = rest.pop(0)
            factor = x @ (gate.T if part.transposed else gate)
            y = y * (factor + rest.pop(0) if part.gate_bias else factor)
        outputs.append(y * part.beta)
    for residual in rest:
        outputs[0] = outputs[0] + residual
    return outputs
