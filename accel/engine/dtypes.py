"""Torch's dtypes of ONNX's element types, and tensors of the one as tensors of the other."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from accel.errors import AccelError

if TYPE_CHECKING:
    import onnx_ir as ir

# Number in onnx.TensorProto.DataType -> dtype.
DTYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    16: torch.bfloat16,
}


def dtype_of(element_type: int | None, name: str) -> torch.dtype:
    """Return torch's dtype of an element type.

    Raises:
        AccelError: There is none, or it isn't known. The message names the value, `name`.
    """
    if element_type not in DTYPES:
        raise AccelError(f"{name} has the ONNX element type {element_type}, not one of {sorted(DTYPES)}")
    return DTYPES[element_type]


def to_torch(tensor: "ir.TensorProtocol", name: str) -> Tensor:
    """Return a copy of a tensor, on the CPU."""
    dtype = dtype_of(int(tensor.dtype), name)
    shape = list(tensor.shape.numpy())
    if not tensor.size:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(tensor.tobytes()), dtype=dtype).reshape(shape)
