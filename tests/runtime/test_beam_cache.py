"""Beam reordering in place: same result as copying whole rows, and only changed tokens are moved."""

import pytest
import torch
from torch import Tensor

from accel.runtime import beam_cache
from accel.runtime.beam_cache import BeamAncestry, row_mover

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SHAPES = {  # shape of one cache for 6 rows and 600 tokens, and its token axis
    "heads": ((6, 3, 600, 8), 2),
    "no heads": ((6, 600, 5), 1),
    "odd": ((6, 2, 600, 3), 2),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("on_device", [False, True], ids=["length on the host", "length on the device"])
def test_same_as_copying_whole_rows(device: str, shape: str, dtype: torch.dtype, on_device: bool) -> None:
    """Decode steps and reorderings in turn, with permuted rows and with dropped tokens."""
    size, axis = SHAPES[shape]
    random = torch.Generator().manual_seed(0)
    stack = torch.randn(4, *size, generator=random).to(device, dtype)
    expected, ancestry = stack.clone(), BeamAncestry(6, 600, torch.device(device))
    length = 500
    for number in range(30):
        index = source_rows(random, number).to(device)
        used = torch.tensor([length], device=device) if on_device else length
        ancestry.reorder(index.int() if number % 2 else index, used, [(stack, axis + 1)])
        kept = expected.narrow(axis + 1, 0, length)
        kept.copy_(kept.index_select(1, index))
        compared = length if on_device else 600  # without a kernel, unused tokens may be reordered, too
        assert torch.equal(*(caches.narrow(axis + 1, 0, compared) for caches in (stack, expected))), number
        if number == 20:
            length -= 40
            ancestry.reset(length)
        new = torch.randn(4, *size, generator=random).to(device, dtype).narrow(axis + 1, length, 1)
        for caches in (stack, expected):
            caches.narrow(axis + 1, length, 1).copy_(new)
        length += 1


@pytest.mark.parametrize("device", DEVICES)
def test_caches_that_are_filled_in_turn(device: str) -> None:
    """Beside one as long as the bucket: each position's entry is the one that whole caches have."""
    random, ancestry = torch.Generator().manual_seed(0), BeamAncestry(6, 64, torch.device(device))
    whole = torch.randn(4, 6, 3, 64, 8, generator=random).to(device)
    ring, expected, length = whole[..., :16, :].clone(), whole.clone(), 5
    longest = length
    for number in range(50):
        index = source_rows(random, number).to(device)
        on_device = torch.tensor([length], device=device)
        ancestry.reorder(index, on_device if number % 2 else length, [(ring, 3), (whole, 3)])
        kept = expected[..., :length, :]
        kept.copy_(kept.index_select(1, index))
        assert torch.equal(whole, expected), number
        longest = max(longest, length)
        for position in range(max(0, longest - 16), length):
            assert torch.equal(ring[..., position % 16, :], expected[..., position, :]), (number, position)
        if number in (8, 30):
            length -= 3
            ancestry.reset(length)
        new = torch.randn(4, 6, 3, 8, generator=random).to(device)
        for cache in (whole, expected):
            cache[..., length, :] = new
        ring[..., length % 16, :] = new
        length += 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("slots", [64, 16])
def test_entries_that_stay_in_their_rows(device: str, slots: int) -> None:
    """Entries that are collected when they are needed are those that copies at every reordering leave."""
    random, ancestry = torch.Generator().manual_seed(0), BeamAncestry(6, 64, torch.device(device))
    cache = torch.randn(4, 6, 3, slots, 8, generator=random).to(device)
    expected, length = cache.clone(), 5
    for number in range(40):
        index = source_rows(random, number).to(device)
        used = torch.tensor([length], device=device) if number % 2 else length
        ancestry.follow(index.int() if number % 4 else index, used)
        kept = expected[..., : min(length, slots), :]
        kept.copy_(kept.index_select(1, index))
        if number in (10, 12, 30):
            assert not torch.equal(cache, expected)
            ancestry.collect(length, [(cache, 3)])
            assert torch.equal(cache, expected)
            assert (ancestry.table == torch.arange(6, device=device)[:, None]).all()
        new = torch.randn(4, 6, 3, 8, generator=random).to(device)
        for each in (cache, expected):
            each[..., length % slots, :] = new
        length += 1


def source_rows(random: torch.Generator, number: int) -> Tensor:
    """Return a permutation, rows drawn with repetition, or the identity."""
    if number % 3 == 0:
        return torch.randperm(6, generator=random)
    return torch.randint(0, 6, (6,), generator=random) if number % 3 == 1 else torch.arange(6)


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """First token of every copy."""
    starts: list[int] = []
    copy_rows = beam_cache.copy_rows

    def record(caches: Tensor, index: Tensor, changes: Tensor, length: int, start: int = 0) -> None:
        starts.append(start)
        copy_rows(caches, index, changes, length, start)

    monkeypatch.setattr(beam_cache, "copy_rows", record)
    return starts


def test_shared_tokens_are_not_copied(moved: list[int]) -> None:
    """Once all rows descend from one row, the tokens that it computed until then are never copied again."""
    ancestry, stack = BeamAncestry(3, 10, torch.device("cpu")), torch.zeros(1, 3, 1, 10, 4)

    def follow(index: list[int], length: int) -> None:
        ancestry.reorder(torch.tensor(index), length, [(stack, 3)])

    follow([0, 0, 0], 4)
    follow([2, 1, 0], 5)  # every row computed its own token 4
    follow([2, 1, 0], 5)
    follow([0, 1, 2], 6)
    follow([1, 1, 1], 7)
    follow([2, 0, 1], 8)
    assert moved == [0, 4, 4, 4, 7]


def test_a_larger_bucket(moved: list[int]) -> None:
    """Rows share the same tokens after their caches were copied to a larger bucket."""
    ancestry, larger = (BeamAncestry(3, bucket, torch.device("cpu")) for bucket in (4, 8))
    ancestry.reorder(torch.tensor([1, 1, 1]), 3, [(torch.zeros(1, 3, 1, 4, 2), 3)])
    larger.copy_from(ancestry, 4)
    larger.reorder(torch.tensor([0, 2, 1]), 4, [(torch.zeros(1, 3, 1, 8, 2), 3)])
    assert moved == [0, 3]


@pytest.mark.gpu
def test_a_kernel_moves_rows_on_cuda() -> None:
    """The kernel is used, not the fallback for a machine without CuPy."""
    assert row_mover(torch.device("cuda")) is beam_cache.move_rows_on_cuda


@pytest.mark.gpu
def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reordering falls back to copies and gives the same result."""
    monkeypatch.setattr(beam_cache, "row_mover", lambda device: beam_cache.copy_rows)
    for on_device in (False, True):
        test_same_as_copying_whole_rows("cuda", "heads", torch.float16, on_device)
