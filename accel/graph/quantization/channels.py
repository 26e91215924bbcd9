"""Channel format: integers of 8 bits with one scale per output feature, for ONNX Runtime's `DynamicQuantizeMatMul`.

The operator rounds its whole input to 8 bits with one scale, so that a row's result depends on the other rows of its
batch, padding included, and the error grows with the number of rows. Its advantage is the speed of products of many
rows. Integers are unsigned: on processors with AVX2 but without VNNI, signed ones saturate, and results were off by up
to a third of their norm.
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.DynamicQuantizeMatMul
"""

from dataclasses import dataclass

import numpy as np

OPERATOR = "DynamicQuantizeMatMul"
ZERO = 128  # integer that stands for 0


@dataclass(frozen=True)
class Channels:
    """A quantized weight of K input and N output features, in the layout that `DynamicQuantizeMatMul` reads.

    Attributes:
        data: uint8 [K, N].
        scales: float32 [N].
    """

    data: np.ndarray
    scales: np.ndarray


@dataclass(frozen=True)
class ChannelFormat:
    """Integers of 8 bits with one scale per output feature."""

    bits: int = 8
    name: str = "int8 channel"

    def size(self, inputs: int, outputs: int) -> int:
        """Return the bytes of a quantized weight [inputs, outputs], scales and zero points included."""
        return inputs * outputs + 5 * outputs

    def quantize(self, weight: np.ndarray) -> Channels:
        """Return a weight [K, N] in this format."""
        scales = (np.abs(weight).max(0) / (ZERO - 1)).astype(np.float32)
        scales[scales == 0] = 1
        return Channels((np.round(weight / scales) + ZERO).astype(np.uint8), scales)

    def dequantize(self, channels: Channels, inputs: int) -> np.ndarray:
        """Return the weight [inputs, N] that quantized channels stand for, float32."""
        restored: np.ndarray = (channels.data[:inputs].astype(np.float32) - ZERO) * channels.scales
        return restored

    def round_activations(self, rows: np.ndarray) -> np.ndarray:
        """Return activations [rows, K] as the operator rounds them: to 8 bits, with one scale and one zero point."""
        low, high = min(float(rows.min()), 0.0), max(float(rows.max()), 0.0)
        scale = (high - low) / 255 or 1.0
        zero = round(-low / scale)
        rounded = (np.clip(np.round(rows / scale) + zero, 0, 255) - zero) * scale
        return np.asarray(rounded, np.float32)
