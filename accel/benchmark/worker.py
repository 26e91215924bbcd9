"""Models in worker processes of their own, which generate there on request.

Models in one process slow each other down, above all on a GPU: once PyTorch's model has run, the launch latency of
accel's kernels in the same process grows (docs/cuda.md), and a captured decode step is hardly more than kernels.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from accel.benchmark.backends import BACKENDS, Sources, kept_in_fp32, loaded_model
from accel.benchmark.footprint import AddedMemory, import_model_code
from accel.benchmark.process import WorkerProcess
from accel.benchmark.timer import Timing, time_generation
from accel.models.generation import Generates
from accel.runtime.device_memory import translate_out_of_memory
from accel.system.quiet import quiet


class ModelWorker:
    """Context with a process for one model, which begins with its imports and loads nothing before `open` is called.

    Args:
        model: The model to load: see `backends.loaded_model`.
        sources: Files and settings of the benchmark.
    """

    def __init__(self, model: str, sources: Sources) -> None:
        self.model, self.sources = model, sources
        self.process = WorkerProcess(model, forked=torch.device(sources.runtime.device).type == "cpu")
        self.process.submit(import_model_code, sources.checkpoint)  # at the same time as other workers

    def open(self, inputs: Mapping[str, Tensor], first: tuple[str, Mapping[str, Any]] | None = None) -> int:
        """Load the model, and generate once if asked to.

        Args:
            inputs: Inputs of all generations, [batch, source], on the CPU.
            first: Backend and options of `generate` of a first generation.

        Returns:
            Bytes by which that raised the peak above what imports take: see `footprint.AddedMemory`.
        """
        arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
        return self.process.call(_open, self.model, self.sources, arrays, first)

    def generate(self, backend: str, options: Mapping[str, Any]) -> Timing:
        """Time one generation of `backend`, with these options of `generate`."""
        return self.process.call(_generate, backend, options)

    def kept_in_fp32(self) -> dict[str, int]:
        """Count the modules that an FP16 model of PyTorch keeps in FP32: see `backends.kept_in_fp32`."""
        return self.process.call(_kept_in_fp32)

    def __enter__(self) -> "ModelWorker":
        self.process.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.__exit__(kind, error, trace)


# Everything below runs in the worker process.


@dataclass(frozen=True)
class _Loaded:
    """The worker process's model, and the inputs it generates for."""

    model: Generates
    inputs: Mapping[str, Tensor]


_loaded: _Loaded | None = None
_stack = ExitStack()  # holds the model's context open until the process is killed


def _open(
    model_name: str,
    sources: Sources,
    arrays: Mapping[str, np.ndarray],
    first: tuple[str, Mapping[str, Any]] | None,
) -> int:
    """Load the model, move the inputs to its device, generate once if asked to. Return the bytes that this added."""
    global _loaded
    quiet()
    if sources.runtime.threads:
        torch.set_num_threads(sources.runtime.threads)
    with translate_out_of_memory():
        memory = AddedMemory(torch.device(sources.runtime.device))
        inputs = {name: torch.from_numpy(array).to(sources.runtime.device) for name, array in arrays.items()}
        model = _stack.enter_context(loaded_model(model_name, sources))
        _loaded = _Loaded(model, inputs)
        if first is not None:
            _generate(*first)
        return memory.measure()


def _current() -> _Loaded:
    """Return the loaded model and its inputs."""
    if _loaded is None:
        raise RuntimeError("the worker process has no model: call ModelWorker.open first")
    return _loaded


def _generate(backend: str, options: Mapping[str, Any]) -> Timing:
    """Time one generation of the loaded model."""
    loaded = _current()
    with BACKENDS[backend].context(), translate_out_of_memory():
        return time_generation(loaded.model, loaded.inputs, options)


def _kept_in_fp32() -> dict[str, int]:
    """Count the FP32 modules of the loaded model if it is in FP16."""
    model = _current().model
    return kept_in_fp32(model) if model.dtype == torch.float16 else {}
