"""Temporary changes to the state of the process, as a library may make them: variables, OpenMP threads, switches."""

import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache

import torch
from threadpoolctl import ThreadpoolController

SWITCH_S = 0.0005

_environment = threading.RLock()
_switching = threading.Lock()
_switch_users = 0
_switch_before = 0.0  # seconds, before the first of the users


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
def short_thread_switches() -> Iterator[None]:
    """Let threads that compute in Python give way after 0.5 ms, in place of CPython's 5 ms; contexts may overlap.

    For a thread that often waits outside of Python, such as for a device, beside busy ones: to go on, it waits for
    this time. https://docs.python.org/3/library/sys.html#sys.setswitchinterval
    """
    global _switch_users, _switch_before
    with _switching:
        if not _switch_users:
            _switch_before = sys.getswitchinterval()
            sys.setswitchinterval(min(SWITCH_S, _switch_before))
        _switch_users += 1
    try:
        yield
    finally:
        with _switching:
            _switch_users -= 1
            if not _switch_users:
                sys.setswitchinterval(_switch_before)


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
