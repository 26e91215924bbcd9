"""Caches that are filled in turn: which entries they hold, and where."""

import pytest
import torch
from torch import Tensor

from accel.runtime.ring_cache import (
    MULTIPLE,
    SLACK,
    HeldEntries,
    copy_entries,
    held_positions,
    in_order,
    last_entries,
    ring_length,
    windows,
)


def filled(slots: int, tokens: int) -> Tensor:
    """A cache [1, 1, slots, 1] after `tokens` steps, whose entries are their positions plus 1."""
    cache = torch.zeros(1, 1, slots, 1)
    for position in range(tokens):
        cache[0, 0, position % slots] = position + 1
    return cache


@pytest.mark.parametrize("tokens", [0, 1, 7, 8, 9, 16, 21])
@pytest.mark.parametrize("slots", [(8, 8), (8, 12), (12, 8), (8, 32), (32, 8), (32, 32)])
def test_copies(slots: tuple[int, int], tokens: int) -> None:
    """The last entries that both have slots for, in the slots where a decode step would have written them."""
    target = torch.zeros(1, 1, slots[1], 1)
    copy_entries(filled(slots[0], tokens), target, 2, tokens)
    expected = filled(slots[1], tokens)
    expected[expected <= tokens - min(slots)] = 0
    assert torch.equal(target, expected)


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 16, 21])
def test_entries_in_order(tokens: int) -> None:
    """All positions, zeros where the entry is lost; a view where none is."""
    cache = filled(8, tokens)
    entries = in_order(cache, 2, tokens)
    expected = torch.arange(1.0, tokens + 1)
    expected[: max(0, tokens - 8)] = 0
    assert torch.equal(entries.flatten(), expected)
    assert (entries.data_ptr() == cache.data_ptr()) is (tokens <= 8)


@pytest.mark.parametrize("tokens", [1, 5, 8, 9, 21])
def test_positions_of_slots(tokens: int) -> None:
    """Its own number for a slot that holds none."""
    for count in (tokens, torch.tensor([tokens])):
        held = held_positions(8, count, torch.device("cpu"))
        for slot, entry in enumerate(filled(8, tokens).flatten().tolist()):
            assert held[slot] == (entry - 1 if entry else slot)


@pytest.mark.parametrize("slots", [5, 8, 21])
def test_last_entries_without_padding(slots: int) -> None:
    """Each row holds what a decode step would have written behind its own padding; the rest holds its last entry."""
    tokens, padding = 21, torch.tensor([0, 3, 12, 20])
    source = torch.arange(4 * tokens).view(4, 1, tokens, 1)
    found = last_entries(source, 2, slots, padding)
    assert found.shape == (4, 1, slots, 1)
    for row, skipped in enumerate(padding.tolist()):
        count = tokens - skipped
        expected = filled(slots, count).flatten()
        for slot, entry in enumerate(expected.tolist()):
            position = skipped + entry - 1 if entry else tokens - 1
            assert found[row, 0, slot] == source[row, 0, int(position)]
    whole = last_entries(source, 2, slots)
    assert torch.equal(
        whole[:, 0, :, 0] - 21 * torch.arange(4)[:, None], filled(slots, 21).long()[0, 0, :, 0].expand(4, -1) - 1
    )
    assert (whole is source) is (slots == tokens)


def test_lengths() -> None:
    """The window and the slack, rounded up, and no more than the bucket."""
    assert windows({"k": ("batch_size", 2, "window_9", 4), "v": (1, "bucket"), "l": ("window_20",)}) == {
        "window_20": 20,
        "window_9": 9,
    }
    for window in (1, 8, 9, 512, 4096):
        length = ring_length(window, 10**6)
        assert window + SLACK <= length < window + SLACK + MULTIPLE
        assert length % MULTIPLE == 0
        assert ring_length(window, 40) == min(40, length)


def test_what_is_held() -> None:
    """A token finds all entries of its window, if the tokens before it are cropped by no more than the slack."""
    held = HeldEntries({"window_8": 8})
    held.write(16, 16)
    assert all(held.suffice(tokens) for tokens in range(17))
    for tokens in range(17, 61):
        held.write(tokens, 80)
    first = 60 - 32  # position of the first entry that is left
    copy = held.copy()
    held.write(90, 160)
    assert copy.suffice(first + 7)
    assert not copy.suffice(first + 6)
    assert not copy.suffice(0)
    assert not held.suffice(first + 7)
    assert HeldEntries({}).suffice(0)
