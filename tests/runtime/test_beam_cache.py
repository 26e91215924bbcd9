"""Rows that change places in caches: the same as copying them whole, and no more moved than changes."""

import pytest
import torch
from torch import Tensor

from accel.runtime import beam_cache
from accel.runtime.beam_cache import BeamAncestry, mover

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SHAPES = {  # of one cache, with 6 rows and room for 600 tokens, and the axis of its tokens
    "heads": ((6, 3, 600, 8), 2),
    "no heads": ((6, 600, 5), 1),
    "odd": ((6, 2, 600, 3), 2),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_as_copying_whole_rows(device: str, shape: str, dtype: torch.dtype) -> None:
    """Steps and reorderings in turn, among them rows that trade places, and tokens that are forgotten."""
    size, axis = SHAPES[shape]
    random = torch.Generator().manual_seed(0)
    stack = torch.randn(4, *size, generator=random).to(device, dtype)
    expected, rows = stack.clone(), BeamAncestry(6, 600, torch.device(device))
    length = 500
    for decode in range(30):
        index = orders(random, decode).to(device)
        rows.reorder(index.int() if decode % 2 else index, length, [(stack, axis + 1)])
        kept = expected.narrow(axis + 1, 0, length)
        kept.copy_(kept.index_select(1, index))
        assert torch.equal(stack, expected), decode
        if decode == 20:
            length -= 40
            rows.begin(length)
        new = torch.randn(4, *size, generator=random).to(device, dtype).narrow(axis + 1, length, 1)
        for caches in (stack, expected):
            caches.narrow(axis + 1, length, 1).copy_(new)
        length += 1


def orders(random: torch.Generator, decode: int) -> Tensor:
    if decode % 3 == 0:
        return torch.randperm(6, generator=random)
    return torch.randint(0, 6, (6,), generator=random) if decode % 3 == 1 else torch.arange(6)


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The first token of every move."""
    starts: list[int] = []
    theirs = beam_cache.move_all

    def noted(caches: Tensor, index: Tensor, changes: Tensor, length: int, start: int = 0) -> None:
        starts.append(start)
        theirs(caches, index, changes, length, start)

    monkeypatch.setattr(beam_cache, "move_all", noted)
    return starts


def test_what_rows_have_in_common_stays(moved: list[int]) -> None:
    """Once all descend from one row, what it computed until then is never moved again."""
    rows, stack = BeamAncestry(3, 10, torch.device("cpu")), torch.zeros(1, 3, 1, 10, 4)

    def follow(index: list[int], length: int) -> None:
        rows.reorder(torch.tensor(index), length, [(stack, 3)])

    follow([0, 0, 0], 4)
    follow([2, 1, 0], 5)  # token 4 was computed by each
    follow([2, 1, 0], 5)
    follow([0, 1, 2], 6)
    follow([1, 1, 1], 7)
    follow([2, 0, 1], 8)
    assert moved == [0, 4, 4, 4, 7]


def test_a_larger_bucket(moved: list[int]) -> None:
    """What rows had in common they have in common in the larger caches that theirs were copied into."""
    rows, larger = (BeamAncestry(3, bucket, torch.device("cpu")) for bucket in (4, 8))
    rows.reorder(torch.tensor([1, 1, 1]), 3, [(torch.zeros(1, 3, 1, 4, 2), 3)])
    larger.take(rows, 4)
    larger.reorder(torch.tensor([0, 2, 1]), 4, [(torch.zeros(1, 3, 1, 8, 2), 3)])
    assert moved == [0, 3]


@pytest.mark.gpu
def test_a_kernel_moves_rows_on_cuda() -> None:
    """Not the way around for a machine without CuPy."""
    assert mover(torch.device("cuda")) is beam_cache.move_on_cuda


@pytest.mark.gpu
def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are moved all the same."""
    monkeypatch.setattr(beam_cache, "mover", lambda device: beam_cache.move_all)
    test_as_copying_whole_rows("cuda", "heads", torch.float16)
