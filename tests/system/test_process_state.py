"""Temporary changes of process state are restored, and other threads don't see them."""

import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from accel.system import process_state
from accel.system.process_state import SWITCH_S, environment, one_openmp_thread, short_thread_switches

NAME = "ACCEL_TEST_VARIABLE"


def in_new_thread() -> int:
    """Return torch's number of threads in a new thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


def test_variables_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NAME, "before")
    with environment({NAME: "inside", f"{NAME}_2": "new"}):
        assert (os.environ[NAME], os.environ[f"{NAME}_2"]) == ("inside", "new")
    assert os.environ[NAME] == "before"
    assert f"{NAME}_2" not in os.environ
    with pytest.raises(KeyError), environment({NAME: "inside"}):
        raise KeyError
    assert os.environ[NAME] == "before"


def test_two_models_do_not_see_each_others_variables() -> None:
    """Variables that one thread sets are not visible in others, even if they overlap."""

    def values_inside(value: str) -> set[str | None]:
        """Set the variable repeatedly, and return the values that it has meanwhile."""
        found = set()
        for _ in range(20):
            with environment({NAME: value}):
                time.sleep(0.001)
                found.add(os.environ.get(NAME))
        return found

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(values_inside, "abcd")) == [{value} for value in "abcd"]
    assert NAME not in os.environ


def test_one_openmp_thread_affects_this_thread_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread inside; the previous number in threads that start meanwhile, afterwards, and after an error."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with one_openmp_thread():
            assert torch.get_num_threads() == 1
            assert in_new_thread() == 3
        with pytest.raises(KeyError), one_openmp_thread():
            raise KeyError
        assert torch.get_num_threads() == 3
        inside, leave = threading.Barrier(5), threading.Barrier(5)

        def overlap() -> tuple[int, int]:
            with one_openmp_thread():
                inside.wait()
                found = torch.get_num_threads()
                leave.wait()
            return found, torch.get_num_threads()

        with ThreadPoolExecutor(4) as pool:
            overlapping = [pool.submit(overlap) for _ in range(4)]
            inside.wait()
            assert in_new_thread() == 3
            leave.wait()
            assert [future.result() for future in overlapping] == [(1, 3)] * 4
        assert in_new_thread() == 3
    finally:
        torch.set_num_threads(before)


def test_thread_switches_that_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first context shortens the interval, the last one restores it; a shorter one stays."""
    of_process, before = sys.getswitchinterval(), 10 * SWITCH_S
    for name in ("_switch_users", "_switch_before"):  # a server of another test may be open
        monkeypatch.setattr(process_state, name, 0)
    sys.setswitchinterval(before)
    try:
        first, second = short_thread_switches(), short_thread_switches()
        for context in (first, second):
            context.__enter__()
            assert sys.getswitchinterval() == pytest.approx(SWITCH_S)
        first.__exit__(None, None, None)
        assert sys.getswitchinterval() == pytest.approx(SWITCH_S)
        second.__exit__(None, None, None)
        assert sys.getswitchinterval() == pytest.approx(before)
        sys.setswitchinterval(SWITCH_S / 5)
        shorter = sys.getswitchinterval()
        with short_thread_switches():
            assert sys.getswitchinterval() == pytest.approx(shorter, rel=0.05)  # in microseconds, rounded down
        assert sys.getswitchinterval() == pytest.approx(shorter, rel=0.05)
    finally:
        sys.setswitchinterval(of_process)
