"""Memory bandwidth: the arithmetic by a clock of our own, and a plausible figure of this machine."""

from itertools import chain

import pytest
import torch

from accel.system.memory_bandwidth import copy_bandwidth, measure_bandwidth, read_bandwidth


def test_the_fastest_repeat_counts() -> None:
    """Repeats of 3, 1 and 2 seconds that read 4 MB each."""
    ticks = chain([0.0, 3.0], [10.0, 11.0], [20.0, 22.0])
    assert read_bandwidth(1, size=4_000_000, repeats=3, clock=lambda: next(ticks)) == 4_000_000.0


def test_of_this_machine() -> None:
    """More than a disk and less than any processor's caches; the number of threads is what it was before."""
    before = torch.get_num_threads()
    assert 2e8 < read_bandwidth(2, size=1 << 27, repeats=3) < 2e12
    assert torch.get_num_threads() == before


def test_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accel.system.memory_bandwidth.read_bandwidth", lambda threads: 10.0 * threads)
    monkeypatch.setattr("accel.system.memory_bandwidth.copy_bandwidth", lambda device: 7.0)
    assert measure_bandwidth(torch.device("cpu"), 3) == ("read", 30.0)
    assert measure_bandwidth(torch.device("cuda:0"), 3) == ("copy", 7.0)


@pytest.mark.gpu
def test_of_a_gpu() -> None:
    assert 1e11 < copy_bandwidth(torch.device("cuda")) < 2e13
