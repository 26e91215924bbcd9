"""Sizes of a running batch."""

from dataclasses import dataclass

import pytest

from accel.runtime.buckets import Buckets
from accel.serve.scheduling.batch_size import PATIENCE, BatchSize, Sizing


@dataclass
class FakeRows:
    """What `Sizing` reads of rows."""

    capacity: int
    max_length: int
    source_length: int


def test_choices() -> None:
    """Powers of 2 and the limit, or those that were captured."""
    assert Sizing(32, [], Buckets([64])).choices == [1, 2, 4, 8, 16, 32]
    assert Sizing(12, [], Buckets([64])).choices == [1, 2, 4, 8, 12]
    assert Sizing(1, [], Buckets([64])).choices == [1]
    assert Sizing(16, [2, 8, 32], Buckets([64])).choices == [2, 8]


def test_rounded() -> None:
    sizing = Sizing(12, [], Buckets([64, 128], 100))
    assert sizing.rounded(9, 65, 33) == BatchSize(12, 100, 64)
    assert sizing.rounded(1, 3, 0) == BatchSize(1, 64, 16)
    with pytest.raises(ValueError, match="101 tokens: the model has 100 positions"):
        sizing.rounded(1, 101, 0)


def test_grows_at_once_and_shrinks_late() -> None:
    """In each respect by itself; a step that needs the whole size begins the count again."""
    sizing, rows = Sizing(32, [], Buckets([64, 128])), FakeRows(8, 64, 16)
    longer, small = BatchSize(2, 128, 16), BatchSize(2, 64, 16)
    assert sizing.next(rows, longer, empty=False) == BatchSize(8, 128, 16)  # type: ignore[arg-type]
    assert sizing.next(rows, small, empty=True) == small  # type: ignore[arg-type]
    for count in (PATIENCE - 1, PATIENCE):
        for _ in range(count - 1):
            assert sizing.next(rows, small, empty=False) == BatchSize(8, 64, 16)  # type: ignore[arg-type]
        if count < PATIENCE:
            sizing.next(rows, BatchSize(8, 64, 16), empty=False)  # type: ignore[arg-type]
    assert sizing.next(rows, small, empty=False) == small  # type: ignore[arg-type]
