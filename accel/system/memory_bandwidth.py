"""Memory bandwidth of this machine, measured: what a decode step's time is compared with."""

import statistics
import time
from collections.abc import Callable

import torch

COPY, READ = "copy", "read"  # what was measured
SIZE = 1 << 30  # bytes: far more than any cache holds
CPU_SIZE = 1 << 29
REPEATS = 20


def measure_bandwidth(device: torch.device, threads: int = 0) -> tuple[str, float]:
    """Measure the memory bandwidth of a device.

    Args:
        device: A GPU or the CPU.
        threads: Threads that read on the CPU; 0 for torch's default.

    Returns:
        What was measured, `copy` on a GPU and `read` on the CPU; and bytes per second.
    """
    return (COPY, copy_bandwidth(device)) if device.type == "cuda" else (READ, read_bandwidth(threads))


def copy_bandwidth(device: torch.device, size: int = SIZE, repeats: int = REPEATS) -> float:
    """Measure the memory bandwidth of a GPU by copies within its memory.

    Args:
        device: The GPU.
        size: Bytes per copy.
        repeats: Number of copies, of whose durations the median counts.

    Returns:
        Bytes per second, those read and those written added up.
    """
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(repeats):
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1000)
    return 2 * size / float(statistics.median(seconds))


def read_bandwidth(
    threads: int = 0,
    size: int = CPU_SIZE,
    repeats: int = REPEATS,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Measure the bandwidth at which this machine's processor reads memory, by sums of numbers that fit no cache.

    As a decode step does, it only reads. The fastest repeat counts: other programs can only slow it down.

    Args:
        threads: Threads that read; 0 for torch's number.
        size: Bytes that each repeat reads.
        repeats: Number of repeats.
        clock: Returns seconds.

    Returns:
        Bytes per second.
    """
    numbers = torch.ones(size // 4, dtype=torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        seconds = []
        for _ in range(repeats):
            start = clock()
            numbers.sum()
            seconds.append(clock() - start)
    finally:
        torch.set_num_threads(before)
    return numbers.nbytes / min(seconds)
