"""Checks of free device memory before an allocation, and one error for the many out-of-memory messages."""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from accel.errors import DeviceMemoryError

SESSION_OVERHEAD = 1.05  # device memory of a session before its first run, as a multiple of its weights
MB = 1e6
OUT_OF_MEMORY = re.compile(
    r"(failed to|can't) allocate memory|out of memory|smaller than requested bytes", re.IGNORECASE
)
REQUESTED_BYTES = re.compile(r"(?:requested (?:buffer of size|bytes of)|tried to allocate) (\d+)")


def check_weights_fit(graphs: Sequence[Path], device: torch.device) -> None:
    """Check that the weights of all `graphs` together fit into free GPU memory. Do nothing on the CPU.

    Args:
        graphs: Paths of ONNX files. Data files beside them, named `<graph>*`, are counted.
        device: Device to load them to.

    Raises:
        DeviceMemoryError: The weights don't fit.
    """
    if device.type != "cuda":
        return
    files = [file for graph in graphs for file in graph.parent.glob(f"{graph.name}*")]
    weights = sum(file.stat().st_size for file in files)
    torch.cuda.empty_cache()  # CUDA counts memory cached by torch's allocator as used
    free, total = torch.cuda.mem_get_info(device)
    if weights * SESSION_OVERHEAD > free:
        raise DeviceMemoryError(
            f"{torch.cuda.get_device_name(device)} is too small: the model has {weights / MB:.0f} MB of weights, "
            f"{free / MB:.0f} of {total / MB:.0f} MB are free. End other programs on the GPU, "
            "or use precision=fp16, runtime=cpu, or a GPU with more memory"
        )


def free_device_memory(device: torch.device) -> float:
    """Return the bytes that torch can still allocate on a GPU; infinity on the CPU."""
    if device.type != "cuda":
        return math.inf
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # held by torch's allocator
    return torch.cuda.mem_get_info(device)[0] + cached


def check_allocation(size: int, device: torch.device, what: str, setting: str) -> None:
    """Check that an allocation fits into free GPU memory. Do nothing on the CPU.

    Args:
        size: Bytes to allocate.
        device: Device to allocate them on.
        what: Name of the allocation, for the message.
        setting: Config key whose value the message suggests to reduce.

    Raises:
        DeviceMemoryError: The allocation doesn't fit.
    """
    free = free_device_memory(device)
    if size > free:
        total = torch.cuda.mem_get_info(device)[1]
        raise DeviceMemoryError(
            f"{what} needs {size / MB:.0f} MB, and {torch.cuda.get_device_name(device)} has {free / MB:.0f} of "
            f"{total / MB:.0f} MB free. Reduce {setting}, the batch size or num_beams"
        )


@contextmanager
def translate_out_of_memory() -> Iterator[None]:
    """Turn the out-of-memory errors of torch and ONNX Runtime into one error class.

    Sessions stay usable: allocations of the failed call are freed.

    Raises:
        DeviceMemoryError: The device ran out of memory within the context.
    """
    try:
        yield
    except Exception as error:  # ONNX Runtime's errors have no other common base class
        if isinstance(error, DeviceMemoryError) or not OUT_OF_MEMORY.search(str(error)):
            raise
        raise DeviceMemoryError(_out_of_memory_message(str(error))) from error


def _out_of_memory_message(original: str) -> str:
    """Name the device, its free memory and the size requested, as far as they are known."""
    requested = REQUESTED_BYTES.search(original)
    size = f": {int(requested[1]) / MB:.0f} MB more were requested" if requested else ""
    device = "the device"
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        device = f"{torch.cuda.get_device_name()} ({free / MB:.0f} of {total / MB:.0f} MB free)"
    return f"{device} is out of memory{size}. Reduce the batch size, num_beams or max_new_tokens"
