"""One CUDA stream shared by torch and ONNX Runtime, so that their work is ordered without waiting on the host.

ONNX Runtime takes a torch stream when a session opens, and is configured not to synchronise at the end of a run. The
stream must be created explicitly: torch's default stream has the address 0, which ONNX Runtime treats as "no stream".
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
    """Return the stream of every CUDA session in this process, which torch uses as well while it decodes."""
    return torch.cuda.Stream()


def stream_options(provider: str) -> dict[str, str]:
    """Return the provider options that make a session run on `shared_stream`; none for other providers than CUDA."""
    if provider != CUDA:
        return {}
    return {"has_user_compute_stream": "1", "user_compute_stream": str(shared_stream().cuda_stream)}


def run_options(device: torch.device, shrink: bool = False) -> Any:
    """Return ONNX Runtime's options for a run.

    Args:
        device: Device of the session.
        shrink: Let the session free the device memory that it no longer needs after the run.

    Returns:
        `onnxruntime.RunOptions`.
    """
    options = onnxruntime.RunOptions()
    options.log_severity_level = 4  # fatal only: errors are raised as exceptions, so they need not be logged too
    if device.type == "cuda":
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        # -1: no capture by ONNX Runtime. torch captures the runs: see `accel.runtime.cuda_graph`
        options.add_run_config_entry("gpu_graph_id", "-1")
        if shrink:
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", f"gpu:{device.index or 0}")
    return options


@contextmanager
def on_shared_stream(device: torch.device) -> Iterator[None]:
    """Make torch use the sessions' stream: its work is ordered after earlier and before later work of the outer stream.

    Does nothing on the CPU, or where the shared stream is current already.
    """
    if device.type != "cuda" or torch.cuda.current_stream(device) == shared_stream():
        yield
        return
    stream, outer = shared_stream(), torch.cuda.current_stream(device)
    stream.wait_stream(outer)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        outer.wait_stream(stream)
