"""An engine in a process of its own, which generates there when it is told to.

Engines in one process slow each other. Above all on a GPU: once PyTorch's model has run, kernels of ours in the same
process take longer to begin (docs/cuda.md), and a captured step is little else than kernels.
"""

import signal
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import get_context
from os import getpid
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import psutil
import torch
from torch import Tensor

from accel.benchmark.backends import SETUPS, Sources, kept_in_fp32, opened
from accel.benchmark.timer import Timing, time_generation
from accel.errors import AccelError, OutOfMemory
from accel.runtime.device_memory import enough_memory
from accel.system.quiet import quiet

T = TypeVar("T")

TOGETHER = "A benchmark holds all that it compares at once: fewer benchmark.setups need less"


class Elsewhere:
    """Context with a process for `engine`. Errors raised there are raised here; where it dies, an `AccelError` is.

    The process starts at once, and loads nothing before it is told to `open`.
    """

    def __init__(self, engine: str, sources: Sources) -> None:
        self.engine, self.sources = engine, sources
        self._pool = ProcessPoolExecutor(1, get_context("spawn"), _begin)
        self._process: Future[int] = self._pool.submit(getpid)

    def open(self, inputs: Mapping[str, Tensor]) -> None:
        """Load the engine, to generate for `inputs` [batch, source]."""
        arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
        self._call(_open, self.engine, self.sources, arrays)

    def generate(self, name: str, options: Mapping[str, Any]) -> Timing:
        """Time one generation, called as setup `name` calls it."""
        return self._call(_generate, name, options)

    def kept_in_fp32(self) -> dict[str, int]:
        """What a model of PyTorch's in FP16 holds in FP32: see `setups.kept_in_fp32`."""
        return self._call(_kept_in_fp32)

    def _call(self, function: Callable[..., T], *arguments: Any) -> T:
        try:
            return self._pool.submit(function, *arguments).result()
        except OutOfMemory as error:
            raise OutOfMemory(f"{self.engine!r}: {error}. {TOGETHER}") from error
        except BrokenProcessPool as error:
            said = f"the process that runs {self.engine!r} ended: was it killed for its memory? {TOGETHER}"
            raise AccelError(said) from error

    def __enter__(self) -> "Elsewhere":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the process, whatever it is doing."""
        with suppress(BrokenProcessPool, psutil.NoSuchProcess):
            psutil.Process(self._process.result()).kill()
        self._pool.shutdown()


# What follows runs in the engine's process.

_engine: dict[str, Any] = {}


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the process that started this one, and that ends it
    quiet()


def _open(engine: str, sources: Sources, inputs: Mapping[str, np.ndarray]) -> None:
    if sources.runtime.threads:
        torch.set_num_threads(sources.runtime.threads)
    with enough_memory():
        context = opened(engine, sources)  # never left: the process ends first
        given = {name: torch.from_numpy(array).to(sources.runtime.device) for name, array in inputs.items()}
        _engine.update(context=context, model=context.__enter__(), inputs=given)


def _generate(name: str, options: Mapping[str, Any]) -> Timing:
    with SETUPS[name].context(), enough_memory():
        return time_generation(_engine["model"], _engine["inputs"], options)


def _kept_in_fp32() -> dict[str, int]:
    model = _engine["model"]
    return kept_in_fp32(model) if model.dtype == torch.float16 else {}
