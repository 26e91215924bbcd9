"""What ONNX Runtime allocated, seen as torch tensors over the same memory: two ways, with one meaning.

The tensor keeps the buffer alive for as long as anyone holds it or a view of it, so it stays what it was when the next
run writes elsewhere. (A view of the bare address would not: the buffer goes back to ONNX Runtime, which hands it out
again.) It keeps the session alive as well, whose allocator must be there to take the buffer back.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from accel.errors import AccelError
from accel.runtime.providers import onnxruntime

Bridge: TypeAlias = Callable[[Any, Any], Tensor]
"""An OrtValue with a tensor inside, and the session that it came from -> that tensor."""

# ONNX Runtime names element types as C++ does; the numbers are onnx.TensorProto's.
TYPES = {
    "tensor(float)": (torch.float32, 1),
    "tensor(int32)": (torch.int32, 6),
    "tensor(int64)": (torch.int64, 7),
    "tensor(bool)": (torch.bool, 9),
    "tensor(float16)": (torch.float16, 10),
    "tensor(double)": (torch.float64, 11),
    "tensor(bfloat16)": (torch.bfloat16, 16),
}


def by_dlpack(value: Any, session: Any) -> Tensor:
    """Through ONNX Runtime's own DLPack, which it has since 1.26. https://dmlc.github.io/dlpack/latest/"""
    # The capsule is asked for here: torch would first try a protocol that ONNX Runtime doesn't know, value by value.
    tensor: Tensor = from_dlpack(value.__dlpack__())
    tensor.untyped_storage().owner = session  # type: ignore[attr-defined]
    return tensor


def by_cupy(value: Any, session: Any) -> Tensor:
    """Through CuPy, for an older ONNX Runtime on CUDA.

    https://docs.cupy.dev/en/stable/reference/generated/cupy.cuda.UnownedMemory.html
    """
    import cupy
    from onnxruntime.capi.onnxruntime_pybind11_state import OrtValueVector

    dtype, _ = TYPES[value.data_type()]
    shape = tuple(value.shape())
    size = torch.Size(shape).numel() * dtype.itemsize
    if size == 0:
        return torch.empty(shape, dtype=dtype, device="cuda")
    held = OrtValueVector()
    held.push_back(value)  # a share of the buffer: `value` itself is a place in the binding, which the next run fills
    memory = cupy.cuda.UnownedMemory(value.data_ptr(), size, owner=(held, session))  # bytes: CuPy has no bfloat16
    raw = cupy.ndarray(size, cupy.uint8, memptr=cupy.cuda.MemoryPointer(memory, 0))
    tensor: Tensor = from_dlpack(raw.__dlpack__(stream=-1))  # nothing to wait for: the stream is shared
    return tensor.view(dtype).view(shape)


def bridge(device: torch.device) -> Bridge:
    """The best way that what is installed knows. Raises `AccelError` if there is none."""
    if hasattr(onnxruntime.OrtValue, "__dlpack__"):
        return by_dlpack
    if device.type == "cuda" and _has_cupy():
        return by_cupy
    needed = "CuPy (accel[cuda11] brings it) or ONNX Runtime 1.26" if device.type == "cuda" else "ONNX Runtime 1.26"
    raise AccelError(f"onnxruntime {onnxruntime.__version__} can't share memory with torch: it needs {needed}")


def _has_cupy() -> bool:
    from importlib.util import find_spec

    return find_spec("cupy") is not None
