"""Whether a device has room: foretold before weights are loaded, and explained when it runs out all the same."""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from accel.errors import DeviceMemoryError

GROWTH = 1.05  # what a session holds beside its weights before the first run, as a factor
MB = 1e6
FULL = re.compile(r"(failed to|can't) allocate memory|out of memory|smaller than requested bytes", re.IGNORECASE)
SIZE = re.compile(r"(?:requested (?:buffer of size|bytes of)|tried to allocate) (\d+)")


def check_weights_fit(graphs: Sequence[Path], device: torch.device) -> None:
    """Raises `OutOfMemory` if the weights of all `graphs` together can't fit into what is free on a GPU."""
    if device.type != "cuda":
        return
    files = [file for graph in graphs for file in graph.parent.glob(f"{graph.name}*")]  # each one and its data
    weights = sum(file.stat().st_size for file in files)
    torch.cuda.empty_cache()  # what torch keeps for later counts as taken
    free, total = torch.cuda.mem_get_info(device)
    if weights * GROWTH > free:
        raise DeviceMemoryError(
            f"{torch.cuda.get_device_name(device)} is too small: the model has {weights / MB:.0f} MB of weights, "
            f"{free / MB:.0f} of {total / MB:.0f} MB are free. End other programs on the GPU, "
            "or use precision=fp16, runtime=cpu, or a GPU with more memory"
        )


def free_device_memory(device: torch.device) -> float:
    """Bytes that torch could still take on a GPU; without end elsewhere."""
    if device.type != "cuda":
        return math.inf
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's to give
    return torch.cuda.mem_get_info(device)[0] + kept


def check_allocation(size: int, device: torch.device, what: str, setting: str) -> None:
    """Raises `OutOfMemory` if `size` bytes can't fit into what is free on a GPU. `setting`: what would make it less."""
    free = free_device_memory(device)
    if size > free:
        total = torch.cuda.mem_get_info(device)[1]
        raise DeviceMemoryError(
            f"{what} needs {size / MB:.0f} MB, and {torch.cuda.get_device_name(device)} has {free / MB:.0f} of "
            f"{total / MB:.0f} MB free. Smaller {setting}, fewer inputs at once or fewer beams need less"
        )


@contextmanager
def translate_out_of_memory() -> Iterator[None]:
    """Turns the many ways in which torch and ONNX Runtime say that a device is full into one `OutOfMemory`.

    Sessions stay usable: what the failed call had allocated is given back.
    """
    try:
        yield
    except Exception as error:  # ONNX Runtime's errors have no other class in common
        if isinstance(error, DeviceMemoryError) or not FULL.search(str(error)):
            raise
        raise DeviceMemoryError(_full(str(error))) from error


def _full(message: str) -> str:
    wanted = SIZE.search(message)
    size = f" for {int(wanted[1]) / MB:.0f} MB more" if wanted else ""
    where = "the device"
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        where = f"{torch.cuda.get_device_name()} ({free / MB:.0f} of {total / MB:.0f} MB free)"
    return f"{where} has no room{size}. Fewer inputs at once, fewer beams or fewer new tokens need less"
