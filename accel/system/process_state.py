"""State of the whole process that a library may change for a moment only: environment variables, threads of OpenMP."""

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
    """Context in which `variables` are set; afterwards those of before are there again.

    One thread at a time: others that want to set some wait until this one has left. Costs nothing where there are none.
    """
    if not variables:
        yield
        return
    with _environment:
        before = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


@contextmanager
def one_openmp_thread() -> Iterator[None]:
    """Context in which this thread's parallel regions of OpenMP, as torch's operators have, run on one thread.

    `torch.set_num_threads` would change a number of the whole process, which a thread that starts meanwhile keeps.
    OpenMP counts threads for each thread that starts a region, and only that count is changed here.
    https://www.openmp.org/spec-html/5.0/openmpsu28.html (`nthreads-var`)
    """
    torch.get_num_threads()  # torch sets a thread's number when it first works there: let it do so before
    with _openmp().limit(limits=1):
        yield


@cache
def _openmp() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="openmp")
