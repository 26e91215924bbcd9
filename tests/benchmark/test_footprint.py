"""Memory that is added from some moment on."""

import pytest
import torch

from accel.benchmark import footprint

BYTES = 200 * 2**20


def test_added_memory_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak above one count of what was held before, libraries included; memory freed before it counts as new."""
    held = torch.ones(BYTES // 4)
    del held
    counts: list[int] = []
    for name in ("resident", "resident_data"):
        count = getattr(footprint, name)
        monkeypatch.setattr(footprint, name, lambda count=count: (counts.append(count()), counts[-1])[1])
    memory = footprint.AddedMemory(torch.device("cpu"))
    assert len(counts) == 1
    block = torch.ones(BYTES // 4)
    del block
    assert 0.95 * BYTES < memory.measure() < 1.2 * BYTES
