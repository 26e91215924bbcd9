"""Attention that reads entries from the rows that computed them, beside caches whose rows are copied."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from accel.engine.operations.attention import Attention, Bias, Rotary, attention, reference
from accel.runtime.beam_cache import BeamAncestry
from tests.engine.operations.numbers import Numbers, arrays, check
from tests.engine.operations.test_attention import LENGTH, spec_of, tensors_of

CPU, ROWS, POSITIONS = torch.device("cpu"), 4, 64


def random_table(positions: Tensor, seed: int = 0) -> Tensor:
    """Return a table in which every entry but those that a step writes is of any row, int32 [B, POSITIONS]."""
    table = torch.randint(0, ROWS, (ROWS, POSITIONS), generator=torch.Generator().manual_seed(seed))
    table[:, positions] = torch.arange(ROWS)[:, None]
    return table.int()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("positions", [(0, 5, 9, LENGTH - 1), (LENGTH, LENGTH + 3, 2 * LENGTH, 50), (7, 7, 7, 7)])
def test_the_reference(positions: tuple[int, ...], dtype: torch.dtype) -> None:
    """Before the cache is full, and when it is filled in turn; with all that comes between caches and table."""
    biases = (Bias(True, False), Bias(False, True, 0.5))
    spec = spec_of(4, 2, 16, biases=biases, rotary=Rotary(8, False, "halves"), softcap=0.5, dtype=dtype)
    tensors = tensors_of(spec, Numbers(dtype), ROWS)
    tensors[3] = torch.tensor(positions)
    table = random_table(tensors[3])
    own, *_ = attention(*[each.clone() for each in tensors], spec=spec)
    spec = replace(spec, ancestry=True)
    expected = reference(*arrays([*tensors, table]), spec=spec)
    heads, *caches = attention(*tensors, table, spec=spec)
    check(heads, expected[0], dtype)
    for cache, array in zip(caches, expected[1:], strict=True):
        assert array is not None
        check(cache, array, dtype)
    assert not torch.allclose(own[3], heads[3], atol=0.05)


@pytest.mark.parametrize("slots", [POSITIONS, 24])
def test_the_same_as_copied_rows(slots: int) -> None:
    """Steps and reorderings in turn: every output is that over caches whose rows are copied; no entry moves here.

    A cache of fewer slots is that of a sliding window, which hides what it no longer holds.
    """
    window = slots - 8
    spec = spec_of(4, 2, 8, biases=(Bias(True, False),))
    numbers, random, ancestry = Numbers(), torch.Generator().manual_seed(0), BeamAncestry(ROWS, POSITIONS, CPU)
    ours = [torch.zeros(ROWS, 2, slots, 8) for _ in range(2)]
    theirs = [each.clone() for each in ours]
    outputs = set()
    for position in range(POSITIONS):
        index = torch.randint(0, ROWS, (ROWS,), generator=random)
        if position % 3:
            ancestry.follow(index, torch.tensor([position]) if position % 2 else position)
            for cache in theirs:
                cache.copy_(cache[index])
        before = [each.clone() for each in ours]
        query, new = numbers(ROWS, 1, 32), numbers(ROWS, 1, 32)
        slot = torch.arange(slots)
        distance = (position - slot) % slots  # of the entry in a slot
        hidden = (distance >= window) | (distance > position)
        rest = [query, new, new, torch.full((ROWS,), position)]
        mask = torch.where(hidden, -1e9, 0.0).expand(ROWS, 1, 1, slots)
        found, *_ = attention(*rest, *ours, mask, ancestry.table, spec=replace(spec, ancestry=True))
        expected, *_ = attention(*rest, *theirs, mask, spec=spec)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        outputs.add(round(float(found.sum()), 4))
        for cache, old in zip(ours, before, strict=True):
            changed = (cache != old).any(-1).any(1).any(0).nonzero().flatten().tolist()
            assert changed == [position % slots]
    assert len(outputs) == POSITIONS


def test_a_table_is_only_for_caches_that_are_written() -> None:
    """Beams of one input share the encoder's output: see `Attention`."""
    spec: Attention = spec_of(2, 2, 8, key=None, value=None)
    with pytest.raises(ValueError, match="a fixed cache has no ancestry"):
        replace(spec, ancestry=True)
