"""One CUDA stream for torch and ONNX Runtime, so that each finds the other's work done without waiting on the host.

ONNX Runtime is given a stream of torch's when a session opens, and told not to wait for the device at the end of a run.
It takes none but a stream made for the purpose: torch's default stream is the address 0, which it reads as "none".
https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html (`user_compute_stream`)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from accel.runtime.providers import CUDA, onnxruntime


@cache
def shared_stream() -> torch.cuda.Stream:
    """The stream of every CUDA session in this process, and of torch while it decodes."""
    return torch.cuda.Stream()


def stream_options(provider: str) -> dict[str, str]:
    """The provider's options that make a session run on `shared_stream`; none on the CPU."""
    if provider != CUDA:
        return {}
    return {"has_user_compute_stream": "1", "user_compute_stream": str(shared_stream().cuda_stream)}


def run_options(device: torch.device, shrink: bool = False) -> Any:
    """Options of a run on `device`. Errors are raised, so ONNX Runtime need not print them too.

    `shrink`: the session gives back memory that it doesn't need after the run.
    """
    options = onnxruntime.RunOptions()
    options.log_severity_level = 4
    if device.type == "cuda":
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        options.add_run_config_entry("gpu_graph_id", "-1")  # what is captured, torch captures: see `runtime.capture`
        if shrink:
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", f"gpu:{device.index or 0}")
    return options


@contextmanager
def on_shared_stream(device: torch.device) -> Iterator[None]:
    """Context in which torch works on the sessions' stream: after what it was told before, before what comes next.

    Free of cost on the CPU and inside itself.
    """
    if device.type != "cuda" or torch.cuda.current_stream(device) == shared_stream():
        yield
        return
    stream, outside = shared_stream(), torch.cuda.current_stream(device)
    stream.wait_stream(outside)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        outside.wait_stream(stream)
