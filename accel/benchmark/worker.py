"""An engine in a process of its own, which generates there when it is told to.

Engines in one process slow each other. Above all on a GPU: once PyTorch's model has run, kernels of ours in the same
process take longer to begin (docs/cuda.md), and a captured step is little else than kernels.
"""

from collections.abc import Mapping
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from accel.benchmark.backends import BACKENDS, Sources, kept_in_fp32, opened
from accel.benchmark.process import WorkerProcess
from accel.benchmark.timer import Timing, time_generation
from accel.runtime.device_memory import translate_out_of_memory
from accel.system.quiet import quiet


class BackendWorker:
    """Context with a process for `engine`, which loads nothing before it is told to `open`."""

    def __init__(self, engine: str, sources: Sources) -> None:
        self.engine, self.sources = engine, sources
        self.process = WorkerProcess(engine)

    def open(self, inputs: Mapping[str, Tensor]) -> None:
        """Load the engine, to generate for `inputs` [batch, source]."""
        arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
        self.process.call(_open, self.engine, self.sources, arrays)

    def generate(self, name: str, options: Mapping[str, Any]) -> Timing:
        """Time one generation, called as setup `name` calls it."""
        return self.process.call(_generate, name, options)

    def kept_in_fp32(self) -> dict[str, int]:
        """What a model of PyTorch's in FP16 holds in FP32: see `backends.kept_in_fp32`."""
        return self.process.call(_kept_in_fp32)

    def __enter__(self) -> "BackendWorker":
        self.process.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.__exit__(kind, error, trace)


# What follows runs in the engine's process.

_engine: dict[str, Any] = {}


def _open(engine: str, sources: Sources, inputs: Mapping[str, np.ndarray]) -> None:
    quiet()
    if sources.runtime.threads:
        torch.set_num_threads(sources.runtime.threads)
    with translate_out_of_memory():
        context = opened(engine, sources)  # never left: the process ends first
        given = {name: torch.from_numpy(array).to(sources.runtime.device) for name, array in inputs.items()}
        _engine.update(context=context, model=context.__enter__(), inputs=given)


def _generate(name: str, options: Mapping[str, Any]) -> Timing:
    with BACKENDS[name].context(), translate_out_of_memory():
        return time_generation(_engine["model"], _engine["inputs"], options)


def _kept_in_fp32() -> dict[str, int]:
    model = _engine["model"]
    return kept_in_fp32(model) if model.dtype == torch.float16 else {}
