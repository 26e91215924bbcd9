"""Sizes of a running batch."""

from dataclasses import dataclass
from typing import cast

import pytest

from accel.models.rows import Rows
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
    sizing, rows = Sizing(32, [], Buckets([64, 128])), cast("Rows", FakeRows(8, 64, 16))
    longer, small = BatchSize(2, 128, 16), BatchSize(2, 64, 16)
    assert sizing.next(rows, longer, empty=False, at=0) == BatchSize(8, 128, 16)
    assert sizing.next(rows, longer, empty=True, at=0) == longer
    assert sizing.next(rows, small, empty=True, at=0) == small
    sizing.next(rows, BatchSize(8, 64, 16), empty=False, at=0)
    for count in (PATIENCE - 1, PATIENCE):
        for _ in range(count - 1):
            assert sizing.next(rows, small, empty=False, at=0) == BatchSize(8, 64, 16)
        if count < PATIENCE:
            sizing.next(rows, BatchSize(8, 64, 16), empty=False, at=0)
    assert sizing.next(rows, small, empty=False, at=0) == small


def test_moves_that_take_long() -> None:
    """A smaller size has to do, or the batch to be empty, for as long as the move will take."""
    sizing, rows, small = Sizing(32, [], Buckets([64])), cast("Rows", FakeRows(8, 64, 16)), BatchSize(2, 64, 16)
    sizing.moved(4.0)
    sizing.moved(0.1)  # half of the longer one still counts
    for step in range(2 * PATIENCE):
        expected = small if step >= PATIENCE - 1 and step >= 20 else BatchSize(8, 64, 16)
        assert sizing.next(rows, small, empty=False, at=10 + step / 10) == expected
    sizing.next(rows, BatchSize(8, 64, 16), empty=False, at=20)
    sizing.emptied(21)
    assert sizing.next(rows, small, empty=True, at=22.9) == BatchSize(8, 64, 16)
    assert sizing.next(rows, small, empty=True, at=23) == small
