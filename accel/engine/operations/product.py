"""Products of one row of features with weights, and what is computed of each feature alone before and after."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from accel.engine.low_bits import LowBits
from accel.engine.operations.activations import Activation
from accel.engine.operations.normalize import Norm
from accel.engine.operations.normalize import reference as normalized

IDENTITY = Activation()
Item = TypeVar("Item")  # a tensor, or its name


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
        low_bits: How the weights are stored, if in few bits; they are `transposed` then. Scales, and zero points where
            they are stored, follow each weight.
    """

    alpha: float = 1.0
    activation: Activation = IDENTITY
    beta: float = 1.0
    transposed: bool = False
    has_bias: bool = False
    gated: bool = False
    gate_bias: bool = False
    low_bits: LowBits | None = None

    def take(self, rest: list[Item]) -> Iterator["Weight[Item]"]:
        """Yield the weight, and the gate where there is one, of the tensors that begin `rest`; they are removed."""
        extra = 0 if self.low_bits is None else 1 + self.low_bits.zero_points
        for has_bias in (self.has_bias, self.gate_bias)[: 1 + self.gated]:
            matrix, *others = (rest.pop(0) for _ in range(1 + extra))
            yield Weight(matrix, others, rest.pop(0) if has_bias else None)


@dataclass(frozen=True)
class Weight(Generic[Item]):
    """The tensors of a weight.

    Attributes:
        matrix: The weight, or its integers.
        scales: Scales of integers, and their zero points where they are stored; else empty.
        bias: Its bias, or None.
    """

    matrix: Item
    scales: list[Item]
    bias: Item | None


@dataclass(frozen=True)
class Product:
    """Products of one x with several weights.

    The tensors follow each other in this order: x; weight and bias of the norm, where it has them; for each part its
    weight, bias, gate and bias of the gate, where it has them, with the scales of each (see `Part`); residuals.

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

    Products are of the weights' dtype, with sums in FP32; all else is computed in FP32. Rows are rounded to the scales'
    dtype where weights are of few bits, which are dequantized and multiplied in FP32.

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
        scale = rest.pop(0) if spec.norm_weight else None
        rows = spec.norm(rows, scale, rest.pop(0) if spec.norm_bias else None)
    outputs = []
    for part in spec.parts:
        weight, *gates = part.take(rest)
        y = part.activation(_linear(rows, weight, part, part.alpha))
        for gate in gates:
            y = y * _linear(rows, gate, part, 1.0)
        outputs.append(y * part.beta if part.beta != 1 else y)
    for residual in rest:
        outputs[0] = outputs[0] + residual.reshape(outputs[0].shape)
    return tuple(output.to(spec.dtype) for output in outputs)


def _linear(x: Tensor, weight: Weight[Tensor], part: Part, alpha: float) -> Tensor:
    """Return alpha * x @ weight + bias in FP32.

    A factor below 1 comes before the product, which 16-bit formats may have to hold, and one above after it.
    """
    x = x.float() * alpha if abs(alpha) < 1 else x
    if part.low_bits is not None:
        x = x.to(weight.scales[0].dtype).float()
        y = functional.linear(x, part.low_bits.dequantize(weight.matrix, *weight.scales))
    else:
        matrix = weight.matrix if part.transposed else weight.matrix.mT
        y = functional.linear(x.to(matrix.dtype), matrix).float()
    y = y * alpha if abs(alpha) > 1 else y
    return y if weight.bias is None else y + weight.bias.float()


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
        scale = rest.pop(0) if spec.norm_weight else None
        x = normalized(x, scale, rest.pop(0) if spec.norm_bias else None, norm=spec.norm)
    outputs = []
    for part in spec.parts:
        weight, *gates = part.take(rest)
        y = part.activation(torch.from_numpy(_multiplied(x, weight, part, part.alpha))).numpy()
        for gate in gates:
            y = y * _multiplied(x, gate, part, 1.0)
        outputs.append(y * part.beta)
    for residual in rest:
        outputs[0] = outputs[0] + residual
    return outputs


def _multiplied(x: Array, weight: Weight[Array], part: Part, alpha: float) -> Array:
    """Return alpha * x @ weight + bias in the dtype of x."""
    matrix = weight.matrix.T if part.transposed else weight.matrix
    if part.low_bits is not None:
        matrix = _dequantized(weight, part.low_bits).T.astype(x.dtype)
    y = alpha * (x @ matrix)
    return y if weight.bias is None else y + weight.bias


def _dequantized(weight: Weight[Array], low: LowBits) -> Array:
    """Return a weight of few bits as [N, K], in float64: block by block, unlike `LowBits.dequantize`."""
    data, (scales, *zeros) = weight.matrix.astype(np.int64), weight.scales
    result = np.zeros((len(data), low.features))
    for feature in range(low.features):
        block, place = divmod(feature, low.block)
        byte = data[:, block, place * low.bits // 8]
        zero = zeros[0].reshape(len(data), -1).astype(np.int64)[:, block * low.bits // 8] if zeros else None
        if low.bits == 4:
            byte = byte >> 4 if place % 2 else byte & 15
            zero = None if zero is None else zero >> 4 if block % 2 else zero & 15
        middle = 2 ** (low.bits - 1) if zero is None else zero
        result[:, feature] = (byte - middle) * scales.reshape(len(data), -1)[:, block]
    return result
