"""Temporary changes to the state of the process, as a library may make them: environment variables, OpenMP threads."""

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache

import torch
from threadpoolctl import ThreadpoolController

_environment = threading.RLock()


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables within the context, and restore the previous ones at the end.

    Only one thread at a time may have set some; others wait until its context ends. Does nothing, and takes no lock,
    for empty `variables`.
    """
    if not variables:
        yield
        return
    with _environment:
        previous = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        try:
            yield
        finally:
            for name, value in previous.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


@contextmanager
def one_openmp_thread() -> Iterator[None]:
    """Run the OpenMP regions that this thread starts, such as those of torch's operators, on one thread.

    `torch.set_num_threads` would change a number of the whole process, which threads that start meanwhile take over.
    OpenMP keeps a number per thread that starts a region (`nthreads-var`), and only that one is changed here.
    https://www.openmp.org/spec-html/5.0/openmpsu28.html
    """
    torch.get_num_threads()  # torch sets a thread's number at its first call there, which would undo the limit
    with _openmp().limit(limits=1):
        yield


@cache
def _openmp() -> ThreadpoolController:
    """Return the controller of the OpenMP libraries of this process."""
    return ThreadpoolController().select(user_api="openmp")
