"""How many unused decode buffers are kept."""

import pytest
import torch

from accel.runtime import spare_buffers
from accel.runtime.spare_buffers import number_kept


def test_captured_ones_while_memory_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last ones, of a quarter of the free memory; a few in any case, and no more of those that aren't captured."""
    monkeypatch.setattr(spare_buffers, "free_device_memory", lambda device: 400)
    device = torch.device("cpu")
    assert number_kept([10] * 9, 4, True, device) == 9
    assert number_kept([90, 30, 10, 50, 5, 5], 1, True, device) == 5
    assert number_kept([90, 30, 10, 50, 5, 6], 1, True, device) == 4
    assert number_kept([90] * 6, 4, True, device) == 4
    assert number_kept([10] * 9, 4, False, device) == 4
    assert number_kept([10] * 3, 4, False, device) == 3
