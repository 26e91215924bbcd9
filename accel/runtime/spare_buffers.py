"""How many decode buffers are kept for later generations."""

from collections.abc import Sequence

import torch

from accel.runtime.device_memory import free_device_memory

LEAST_SPARE = 4  # unused decode buffers kept, whatever they take
SPARE_SHARE = 0.25  # of the memory that is free beside them, that more of them may take where they are captured


def number_kept(sizes: Sequence[int], least: int, captured: bool, device: torch.device) -> int:
    """Return how many of the unused decode buffers, the last ones, are kept.

    A capture takes longer than hundreds of steps, and a server's batch changes its size with its load, so captured ones
    are kept as long as their memory isn't missed.

    Args:
        sizes: Bytes of each.
        least: Number that is kept in any case.
        captured: True if they hold CUDA graphs.
        device: Their device.
    """
    count = min(least, len(sizes))
    if not captured or count == len(sizes):
        return count
    most = SPARE_SHARE * free_device_memory(device)
    while count < len(sizes) and sum(sizes[-count - 1 :]) <= most:
        count += 1
    return count
