"""Block formats: integers of 8 or 4 bits with one scale per block of input features, for ONNX Runtime's `MatMulNBits`.

Weights are rounded to the nearest integer. The scale of a block is the one of several candidates with the smallest
squared error, as in llama.cpp's `make_qx_quants`
(https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-quants.c).

`MatMulNBits` computes at `accuracy_level` 4: activations are rounded to 8 bits with one scale per row and block, so a
row's result does not depend on the other rows of its batch, and products are summed as integers. Measured on AVX2,
level 0 (activations in FP32) takes 60 to 200 times as long, so graphs never ask for it. With
`session.disable_prepacking` the kernel falls back to that path.
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

OPERATOR = "MatMulNBits"
ACCURACY_LEVEL = 4
SHRINK = {8: (1.0, 0.98, 0.95), 4: (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)}  # bits -> candidate scales, of the largest
ROWS = 4096  # output features that are quantized at once, which bounds the memory of the candidates


@dataclass(frozen=True)
class Blocks:
    """A quantized weight of K input and N output features, in the layout that `MatMulNBits` reads.

    Attributes:
        data: Integers, packed into bytes: uint8 [N, blocks, bytes of a block]. In 4 bits the lower half comes first.
        scales: float32 [N, blocks].
        zero_points: Integers that stand for 0, packed along a row: uint8 [N, ceil(blocks * bits / 8)]; None for the
            middle of the range.
    """

    data: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray | None = None


@dataclass(frozen=True)
class BlockFormat:
    """Integers with one scale, and one zero point unless symmetric, per block of consecutive input features.

    Attributes:
        bits: 8 or 4.
        block: Input features of a block: a power of two of at least 16. The last block is padded with zeros.
        symmetric: The middle of the integers' range stands for 0. Otherwise each block has a zero point.
    """

    bits: int
    block: int
    symmetric: bool = True

    @property
    def name(self) -> str:
        """Name in plans and certificates, such as `int4 block-32`."""
        return f"int{self.bits} block-{self.block}{'' if self.symmetric else '-zero-point'}"

    def size(self, inputs: int, outputs: int) -> int:
        """Return the bytes of a quantized weight [inputs, outputs], scales and zero points included."""
        blocks = -(-inputs // self.block)
        zero_points = 0 if self.symmetric else -(-blocks * self.bits // 8)
        return outputs * (blocks * (self.block * self.bits // 8 + 4) + zero_points)

    def quantize(self, weight: np.ndarray) -> Blocks:
        """Return a weight [K, N] in this format."""
        parts = [self._quantize(part) for part in self._split(weight)]
        values, scales, zeros = (np.concatenate(part) for part in zip(*parts, strict=True))
        return Blocks(
            data=self.pack(values),
            scales=scales,
            zero_points=None if self.symmetric else self.pack(zeros),
        )

    def dequantize(self, blocks: Blocks, inputs: int) -> np.ndarray:
        """Return the weight [inputs, N] that quantized blocks stand for, float32."""
        values = self.unpack(blocks.data).astype(np.float32)  # [N, blocks, block]
        zeros: np.ndarray | int = 2 ** (self.bits - 1)
        if blocks.zero_points is not None:
            zeros = self.unpack(blocks.zero_points)[:, : values.shape[1], None].astype(np.float32)
        restored = (values - zeros) * blocks.scales[..., None]
        return np.ascontiguousarray(restored.reshape(len(restored), -1)[:, :inputs].T)

    def round_activations(self, rows: np.ndarray) -> np.ndarray:
        """Return activations [rows, K] as the operator rounds them: to 8 bits, one scale per row and block."""
        blocks = self._in_blocks(rows)
        scales = np.abs(blocks).max(-1, keepdims=True) / 127
        rounded = np.round(blocks / np.where(scales == 0, 1, scales)) * scales
        return np.asarray(rounded.reshape(len(rows), -1)[:, : rows.shape[1]], np.float32)

    def _in_blocks(self, rows: np.ndarray) -> np.ndarray:
        """Return rows [N, K] as blocks [N, blocks, block], padded with zeros."""
        padding = -rows.shape[1] % self.block
        padded = np.pad(np.asarray(rows, np.float32), ((0, 0), (0, padding)))
        blocks: np.ndarray = padded.reshape(len(rows), -1, self.block)
        return blocks

    def _split(self, weight: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the blocks of at most `ROWS` output features at a time, [n, blocks, block]."""
        for begin in range(0, weight.shape[1], ROWS):
            yield self._in_blocks(np.ascontiguousarray(weight[:, begin : begin + ROWS].T))

    def _quantize(self, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return integers [n, blocks, block], scales [n, blocks] and zero points [n, blocks] of the smallest error."""
        top, middle = 2**self.bits - 1, 2 ** (self.bits - 1)
        low, high = np.minimum(blocks.min(-1), 0), np.maximum(blocks.max(-1), 0)  # [n, blocks]
        values = np.zeros(blocks.shape, np.uint8)
        scales, zeros = np.ones(low.shape, np.float32), np.full(low.shape, middle, np.uint8)
        errors = np.full(low.shape, np.inf, np.float32)
        for shrink in SHRINK[self.bits]:
            if self.symmetric:
                # The element of the largest magnitude becomes -middle, the only integer without its opposite.
                scale = np.where(-low >= high, low, high) * (-shrink / middle)
                zero = np.full(low.shape, middle, np.uint8)
            else:
                scale = (high - low) * (shrink / top)
                zero = np.clip(np.round(-low * shrink / np.where(scale == 0, 1, scale)), 0, top).astype(np.uint8)
            scale = np.where(scale == 0, 1, scale).astype(np.float32)
            rounded = np.clip(np.round(blocks / scale[..., None]) + zero[..., None], 0, top)
            error = np.square((rounded - zero[..., None]) * scale[..., None] - blocks).sum(-1)
            better = error < errors
            values[better] = rounded[better].astype(np.uint8)
            scales[better], zeros[better], errors[better] = scale[better], zero[better], error[better]
        return values, scales, zeros

    def pack(self, values: np.ndarray) -> np.ndarray:
        """Pack integers [..., n] into bytes along the last axis; in 4 bits two in one, the first in the lower half."""
        if self.bits == 8:
            return values
        if values.shape[-1] % 2:
            values = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, 1)])
        packed: np.ndarray = values[..., 0::2] | (values[..., 1::2] << 4)
        return packed

    def unpack(self, packed: np.ndarray) -> np.ndarray:
        """Return the integers of packed bytes; in 4 bits twice as many along the last axis."""
        if self.bits == 8:
            return packed
        return np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)
