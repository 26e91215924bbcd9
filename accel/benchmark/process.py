"""A process of its own to measure in: nothing is left over there from another measurement."""

import signal
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import get_context
from os import getpid
from types import TracebackType
from typing import Any, TypeVar

import psutil

from accel.errors import AccelError, DeviceMemoryError

T = TypeVar("T")

TOGETHER = "A benchmark holds all that it compares at once: fewer benchmark.backends need less"


class WorkerProcess:
    """Context with a process that calls functions for this one. It is killed at the end, whatever it is doing.

    `name`: what runs there, for messages. The process starts at once and imports nothing before the first call.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._pool = ProcessPoolExecutor(1, get_context("spawn"), _ignore_interrupts)
        self._process: Future[int] = self._pool.submit(getpid)

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.result()

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Return what `function` returns there, or raise what it raises. Everything must survive pickling.

        Raises:
            OutOfMemory: The device had no room; the process can be asked for less.
            AccelError: The process ended.
        """
        try:
            return self._pool.submit(function, *arguments).result()
        except DeviceMemoryError as error:
            raise DeviceMemoryError(f"{self.name!r}: {error}. {TOGETHER}") from error
        except BrokenProcessPool as error:
            said = f"the process that runs {self.name!r} ended: was it killed for its memory? {TOGETHER}"
            raise AccelError(said) from error

    def __enter__(self) -> "WorkerProcess":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(BrokenProcessPool, psutil.NoSuchProcess):
            psutil.Process(self.pid).kill()
        self._pool.shutdown()


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the process that started this one, and that ends it
