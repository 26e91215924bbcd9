"""What is changed for a moment is as before afterwards, for other threads too."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from accel.system.process_state import environment, one_openmp_thread

NAME = "ACCEL_TEST_VARIABLE"


def in_new_thread() -> int:
    """torch's number of threads as a thread sees it that starts now."""
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
    """What one sets, no other finds, however they overlap."""

    def seen(value: str) -> set[str | None]:
        found = set()
        for _ in range(20):
            with environment({NAME: value}):
                time.sleep(0.001)
                found.add(os.environ.get(NAME))
        return found

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(seen, "abcd")) == [{one} for one in "abcd"]
    assert NAME not in os.environ


def test_threads_of_torch_are_this_threads_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """One inside, and as many as before for threads that start meanwhile, and afterwards, and after an error."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with one_openmp_thread():
            assert torch.get_num_threads() == 1
            assert in_new_thread() == 3
        with pytest.raises(KeyError), one_openmp_thread():
            raise KeyError
        assert torch.get_num_threads() == 3
        inside, go_on = threading.Barrier(5), threading.Barrier(5)

        def overlap() -> tuple[int, int]:
            with one_openmp_thread():
                inside.wait()
                found = torch.get_num_threads()
                go_on.wait()
            return found, torch.get_num_threads()

        with ThreadPoolExecutor(4) as pool:
            overlapping = [pool.submit(overlap) for _ in range(4)]
            inside.wait()
            assert in_new_thread() == 3
            go_on.wait()
            assert [one.result() for one in overlapping] == [(1, 3)] * 4
        assert in_new_thread() == 3
    finally:
        torch.set_num_threads(before)
