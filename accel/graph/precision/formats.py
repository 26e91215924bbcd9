"""Number formats that a graph's values can have."""

from dataclasses import dataclass

import onnx_ir as ir

FLOAT = ir.DataType.FLOAT


@dataclass(frozen=True)
class Format:
    """A binary floating-point format (IEEE 754-2019; bfloat16: https://arxiv.org/abs/1905.12322).

    `name` is as in `precision.dtype` and torch. `largest`: the largest finite number; `smallest`: the smallest number
    with all its digits, below which they are lost one by one; `step`: the distance from 1 to the next number.
    """

    name: str
    dtype: ir.DataType
    largest: float
    smallest: float
    step: float

    @property
    def overflows(self) -> float:
        """The smallest magnitude that rounds to infinity."""
        return self.largest * (1 + self.step / (4 - 2 * self.step))

    @property
    def vanishes(self) -> float:
        """The largest magnitude that rounds to zero."""
        return self.smallest * self.step / 2

    @property
    def mask(self) -> float:
        """Stands for minus infinity in a mask: as much again can be added with a margin of 2, and exp of it is 0."""
        return -self.largest / 4


FP32 = Format("float32", FLOAT, float.fromhex("0x1.fffffep127"), 2.0**-126, 2.0**-23)
FP16 = Format("float16", ir.DataType.FLOAT16, 65504.0, 2.0**-14, 2.0**-10)
BF16 = Format("bfloat16", ir.DataType.BFLOAT16, float.fromhex("0x1.fep127"), 2.0**-126, 2.0**-7)
FORMATS = {format.name: format for format in (FP32, FP16, BF16)}
