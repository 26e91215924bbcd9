"""Worker processes to measure in, so that nothing left over from one measurement changes another."""

import signal
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import get_context
from os import getpid
from threading import Thread
from types import TracebackType
from typing import Any, TypeVar

import psutil

from accel.errors import AccelError, DeviceMemoryError
from accel.system import remote_code

T = TypeVar("T")

EXIT_TIMEOUT_S = 20.0  # for an idle process, before it is killed
ADVICE = "A benchmark keeps all its models loaded at the same time: list fewer benchmark.backends"


class WorkerProcess:
    """Context with a process that calls functions on behalf of this one, and that has ended when the context has.

    After an error, busy or not, it is killed.

    The process starts at once and imports nothing before the first call.

    Args:
        name: What runs in the process, for messages.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._pool = ProcessPoolExecutor(1, get_context("spawn"), _prepare, (remote_code.is_allowed(),))
        self._pid: Future[int] = self._pool.submit(getpid)

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._pid.result()

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call `function(*arguments)` in the process, and return its result or raise its error.

        The function, its arguments, its result and its errors must survive pickling.

        Raises:
            DeviceMemoryError: The device is out of memory. The process goes on, and can be asked for less.
            AccelError: The process ended.
        """
        try:
            return self._pool.submit(function, *arguments).result()
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
        ending = Thread(target=self._pool.shutdown, daemon=True)
        if error is None:  # the process is idle: let it end by itself, so that it removes its semaphores
            ending.start()
            ending.join(EXIT_TIMEOUT_S)
            if not ending.is_alive():
                return
        with suppress(BrokenProcessPool, psutil.NoSuchProcess):
            psutil.Process(self.pid).kill()
        if ending.ident is None:
            ending.start()
        ending.join()


def _prepare(allow_remote_code: bool) -> None:
    """Ignore Ctrl-C, which ends the parent process and so this one, and take over the parent's permission for code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    remote_code.set_for_process(allow_remote_code)
