"""Worker processes to measure in, so that nothing left over from one measurement changes another."""

import importlib
import os
import sys
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import forkserver, get_context, parent_process
from threading import Thread
from types import TracebackType
from typing import Any, TypeVar

import psutil

from accel.errors import AccelError, DeviceMemoryError
from accel.system import remote_code
from accel.system.signals import uninterrupted

T = TypeVar("T")

EXIT_TIMEOUT_S = 20.0  # for an idle process, before it is killed
# Imports what models need. Workers forked from a process with these imports save about 5 s of CPU time each.
PRELOADED = ["accel.benchmark.preloaded"]
ADVICE = "A benchmark keeps all its models loaded at the same time: list fewer benchmark.backends"

_forked = False
_started: list[ProcessPoolExecutor] = []  # processes that `begin_imports` started and no `WorkerProcess` has taken yet


def share_imports() -> None:
    """Let worker processes be forked from a single process that has imported what they need, where asked for.

    That process, multiprocessing's fork server, ends with this one. Only on Linux, and for the command line only: a
    library must not choose what the fork server of its host imports.
    """
    global _forked
    if sys.platform == "linux":
        get_context("forkserver").set_forkserver_preload(PRELOADED)
        _forked = True


def begin_imports(spawned: int = 0) -> None:
    """Start processes for the command line's next workers, and don't wait for their imports.

    Where `share_imports` wasn't called, or has no effect, nothing is started. Each process takes a third of a gigabyte
    of memory.

    Args:
        spawned: Number of workers that can't be forked, because they use a GPU. 0: start the process that workers are
            forked from.
    """
    if not _forked:
        return
    with uninterrupted():
        if not spawned:
            forkserver.ensure_running()
        for _ in range(spawned):
            pool = _process("spawn")
            pool.submit(importlib.import_module, PRELOADED[0])
            _started.append(pool)


def _process(method: str) -> ProcessPoolExecutor:
    """Start a process by a method of `multiprocessing`, and import nothing yet."""
    return ProcessPoolExecutor(1, get_context(method), _prepare, (remote_code.is_allowed(),))


class WorkerProcess:
    """Context with a process that calls functions on behalf of this one, and that has ended when the context has.

    After an error, busy or not, it is killed.

    The process starts at once and imports nothing before the first call, unless it is forked or `begin_imports` started
    it.

    Args:
        name: What runs in the process, for messages.
        forked: Fork the process where `share_imports` allows it. Not for CUDA, which a forked process can't use if the
            process that it was forked from initialized it.
    """

    def __init__(self, name: str, forked: bool = False) -> None:
        self.name = name
        started = False
        fork = forked and _forked
        try:
            with uninterrupted():
                self._pool = _started.pop() if _started and not fork else _process("forkserver" if fork else "spawn")
                self._pid: Future[int] = self._pool.submit(os.getpid)
                started = True
        except KeyboardInterrupt:  # raised before that context, or at its end
            if started:
                self._kill()
            raise

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._pid.result()

    def submit(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        """Let the process call `function(*arguments)` before anything that it is told to do later."""
        return self._pool.submit(function, *arguments)

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call `function(*arguments)` in the process, and return its result or raise its error.

        The function, its arguments, its result and its errors must survive pickling.

        Raises:
            DeviceMemoryError: The device is out of memory. The process goes on, and can be asked for less.
            AccelError: The process ended.
        """
        try:
            return self.submit(function, *arguments).result()
        except DeviceMemoryError as error:
            raise DeviceMemoryError(f"{self.name!r}: {error}. {ADVICE}") from error
        except BrokenProcessPool as error:
            raise AccelError(
                f"the process that runs {self.name!r} ended unexpectedly, perhaps killed for lack of memory. {ADVICE}"
            ) from error

    def __enter__(self) -> "WorkerProcess":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:  # the process is idle: let it end by itself, so that it removes its semaphores
            ending = Thread(target=self._pool.shutdown, daemon=True)
            ending.start()
            ending.join(EXIT_TIMEOUT_S)
            if not ending.is_alive():
                return
        self._kill()

    def _kill(self) -> None:
        """Kill the process, busy or not, and wait for its end."""
        with suppress(BrokenProcessPool, psutil.NoSuchProcess):
            psutil.Process(self.pid).kill()
        self._pool.shutdown()


def _prepare(allow_remote_code: bool) -> None:
    """Prepare a worker process: take over the permission for code, and end with the parent, however that ends."""
    remote_code.set_for_process(allow_remote_code)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Wait for the end of the parent process, and end this one: a parent that was killed can't do that."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
