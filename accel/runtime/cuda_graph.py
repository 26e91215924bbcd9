"""Capture and replay of repeated device work as a CUDA graph, which takes one launch for any number of kernels.

https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

import gc
import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from accel import progress
from accel.errors import DeviceMemoryError

logger = logging.getLogger(__name__)

NODE = re.compile(r"running (\w+) node\. Name:'([^']*)'")


class CudaGraphCallable:
    """Wrapper that captures a function as a CUDA graph and replays it.

    On CUDA the first call runs the function, the second captures it, and the graph is replayed for this call and all
    later ones. A message says what was captured and how long it took. If the capture fails, a warning names the reason
    once and every call runs the function. On other devices every call runs the function.

    Args:
        function: Takes no arguments. Reads and writes tensors whose addresses stay the same; results must be copied
            into such tensors.
        device: Device that the function works on.
        name: Name for log messages, with an article ("a decode graph of ...").
    """

    def __init__(self, function: Callable[[], None], device: torch.device, name: str) -> None:
        self._function, self._name = function, name
        self._graph: torch.cuda.CUDAGraph | None = None
        self._capture_enabled = device.type == "cuda"
        self._warmed_up = False

    def __call__(self) -> None:
        """Run, capture or replay the function."""
        if self._graph is not None:
            self._graph.replay()
        elif self._capture_enabled and self._warmed_up:
            self._capture()
        else:
            self._warmed_up = True
            self._function()

    @property
    def captured(self) -> bool:
        """True once calls replay a CUDA graph."""
        return self._graph is not None

    def _capture(self) -> None:
        """Capture the function and replay it; if that fails, run it now and give up capturing."""
        graph, start = torch.cuda.CUDAGraph(), time.perf_counter()
        try:
            with _garbage_collection_disabled():
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    self._function()
                finally:
                    graph.capture_end()
        except DeviceMemoryError:
            raise
        except Exception as error:  # torch's and ONNX Runtime's errors have no other common base class
            logger.warning(f"{self._name} is not captured: {_failure_reason(error)}")
            self._capture_enabled = False
            _end_capture_of_random_numbers()
            self._function()
        else:
            self._graph = graph
            progress.note(f"captured {self._name} in {time.perf_counter() - start:.2f} s")
            graph.replay()


def free_dropped_graphs(device: torch.device) -> None:
    """Give the memory of CUDA graphs that were dropped back to the device.

    Each capture allocates from a memory pool of its own, which torch keeps when the graph is gone: at least 2 MB each,
    until torch, but not ONNX Runtime, finds the device full.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _end_capture_of_random_numbers() -> None:
    """Let torch draw random numbers again after a capture that failed.

    Torch 2.11 tells its generator that a capture has begun, and, if the capture fails, not that it has ended: any later
    draw raises "Offset increment outside graph capture". A capture that succeeds ends it (`CUDAGraph::capture_end`).
    """
    with torch.cuda.stream(torch.cuda.Stream()):
        value = torch.zeros(1, device="cuda")
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        value.add_(1)
        graph.capture_end()


@contextmanager
def _garbage_collection_disabled() -> Iterator[None]:
    """Disable Python's garbage collector: a session or graph that is destroyed during a capture invalidates it."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _failure_reason(error: BaseException) -> str:
    """Return the first line of the original error, with the graph's node where ONNX Runtime names one."""
    original: BaseException = error
    while original.__context__ is not None:  # `capture_end` after a failed capture raises an error of its own
        original = original.__context__
    message = str(original)
    node = NODE.search(message)
    reason = message.split("Status Message: ")[-1].splitlines()[0] if message else type(original).__name__
    return f"node {node[2]} ({node[1]}): {reason}" if node else reason
