"""What a device does again and again, recorded once as a CUDA graph: then it takes one launch, however much it is.

https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

import gc
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from accel.errors import DeviceMemoryError

logger = logging.getLogger(__name__)

NODE = re.compile(r"running (\w+) node\. Name:'([^']*)'")


class CudaGraphCallable:
    """A function without arguments, over tensors that stay where they are; what it makes, it copies into some of them.

    On CUDA the first call is an ordinary one, the second is recorded, and that and all others are replayed. What can't
    be recorded goes on as it is, with one warning that says why. Elsewhere every call is an ordinary one.
    """

    def __init__(self, work: Callable[[], None], device: torch.device, name: str) -> None:
        self._work, self._name = work, name
        self._graph: torch.cuda.CUDAGraph | None = None
        self._calls_before = 1 if device.type == "cuda" else None  # ordinary ones left; None: all

    def __call__(self) -> None:
        if self._graph is not None:
            self._graph.replay()
        elif self._calls_before == 0:
            self._capture()
        else:
            self._calls_before = None if self._calls_before is None else self._calls_before - 1
            self._work()

    @property
    def captured(self) -> bool:
        return self._graph is not None

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with _nothing_collected():
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    self._work()
                finally:
                    graph.capture_end()
        except DeviceMemoryError:
            raise
        except Exception as error:  # torch's and ONNX Runtime's errors have no other class in common
            logger.warning(f"{self._name} is not captured: {_reason(error)}")
            self._calls_before = None
            self._work()
        else:
            self._graph = graph
            graph.replay()


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """Context without Python's collector: a session or a graph that goes meanwhile would spoil the recording."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def _reason(error: BaseException) -> str:
    """The node that can't be recorded, where ONNX Runtime names one, and what CUDA says to it."""
    first: BaseException = error
    while first.__context__ is not None:  # the end of a failed recording fails too
        first = first.__context__
    message = str(first)
    node = NODE.search(message)
    said = message.split("Status Message: ")[-1].splitlines()[0] if message else type(first).__name__
    return f"node {node[2]} ({node[1]}): {said}" if node else said
