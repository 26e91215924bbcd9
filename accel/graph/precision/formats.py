"""Floating-point formats of a graph's values, and the limits of each."""

from dataclasses import dataclass

import onnx_ir as ir

FLOAT = ir.DataType.FLOAT


@dataclass(frozen=True)
class Format:
    """A binary floating-point format (IEEE 754-2019; bfloat16: https://arxiv.org/abs/1905.12322).

    Attributes:
        name: Name as in the config key `precision.dtype` and in torch, such as "float16".
        dtype: Element type in ONNX.
        largest: Largest finite number.
        smallest: Smallest positive normal number. Below it numbers are subnormal and have fewer significant digits.
        epsilon: Distance from 1 to the next larger number.
    """

    name: str
    dtype: ir.DataType
    largest: float
    smallest: float
    epsilon: float

    @property
    def overflow_threshold(self) -> float:
        """Smallest magnitude that rounds to infinity."""
        return self.largest * (1 + self.epsilon / (4 - 2 * self.epsilon))

    @property
    def underflow_threshold(self) -> float:
        """Largest magnitude that rounds to zero."""
        return self.smallest * self.epsilon / 2

    @property
    def mask_value(self) -> float:
        """Replacement for minus infinity in an attention mask.

        The sum of two such numbers stays finite, with an overflow margin of 2, and `exp` of it is 0.
        """
        return -self.largest / 4


FP32 = Format("float32", FLOAT, float.fromhex("0x1.fffffep127"), 2.0**-126, 2.0**-23)
FP16 = Format("float16", ir.DataType.FLOAT16, 65504.0, 2.0**-14, 2.0**-10)
BF16 = Format("bfloat16", ir.DataType.BFLOAT16, float.fromhex("0x1.fep127"), 2.0**-126, 2.0**-7)
FORMATS = {format.name: format for format in (FP32, FP16, BF16)}
