"""Weights of 8 or 4 bits with a scale for each block of features, stored as ONNX Runtime's operators read them.

Definition: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from accel.engine.registry import unsupported

BITS = (8, 4)


@dataclass(frozen=True)
class LowBits:
    """How a weight [N, K] is stored: integers uint8 [N, blocks, bytes of a block] and scales [N, blocks].

    Attributes:
        bits: Bits of an integer. Of 4 bits, two are in a byte, the first one in its lower half.
        block: Features that share a scale. The last block of a row is padded.
        features: K.
        zero_points: Whether the integers that stand for 0 are stored, packed along a row: uint8 [N, bytes]. Otherwise
            it is the middle of their range.
    """

    bits: int
    block: int
    features: int
    zero_points: bool = False

    def __str__(self) -> str:
        return f"int{self.bits} block-{self.block}{'-zero-point' if self.zero_points else ''}"

    def dequantize(self, data: Tensor, scales: Tensor, zero_points: Tensor | None = None) -> Tensor:
        """Return the weight [N, K] in FP32."""
        values = integers(data, self.bits)
        zeros: Tensor | int = middle(self.bits)
        if zero_points is not None:
            zeros = integers(zero_points.reshape(len(data), -1), self.bits)[:, : values.shape[1], None].float()
        weight = (values.float() - zeros) * scales.reshape(*values.shape[:2], 1).float()
        return weight.flatten(1)[:, : self.features]


def middle(bits: int) -> int:
    """Return the integer that stands for 0 where no zero points are stored."""
    return 1 << (bits - 1)


def integers(data: Tensor, bits: int) -> Tensor:
    """Return the integers in bytes, as uint8: of 4 bits, twice as many along the last axis.

    Raises:
        AccelError: They have another number of bits.
    """
    if bits not in BITS:
        raise unsupported("bits", bits, " and ".join(map(str, BITS)))
    return data if bits == 8 else torch.stack([data & 15, data >> 4], -1).flatten(-2)
