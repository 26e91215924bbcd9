"""Which prompts are computed in one padded batch."""

from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList

from accel.models.decoding.sequence import Sequence
from accel.serve.protocol import Request
from accel.serve.scheduling.job import Job
from accel.serve.scheduling.row_job import RowJob, prompt_group


def entering(length: int, prefix: int = 0, masked: bool = False, prefill: Any = None) -> RowJob:
    """Return a request with an input of a length, beside an encoder with a decoder prompt of `prefix` tokens."""
    ids = torch.ones(1, length, dtype=torch.int64)
    inputs = {"input_ids": ids} | ({"attention_mask": ids} if masked else {})
    sequence = Sequence(ids[:, :1].repeat(1, prefix or length), GenerationConfig(max_length=99), LogitsProcessorList())
    return RowJob(Job(Request(inputs), lambda _: None, sequence, None, lambda: None), 0, prefill=prefill)


@pytest.mark.parametrize(
    ("lengths", "budget", "expected"),
    [
        ([4, 32, 7, 33, 5], 1000, [4, 32, 7, 5]),
        ([20, 40, 41, 19, 21], 1000, [20, 40, 21]),
        ([200, 5, 100, 6], 1000, [200, 100]),
        ([20, 30, 20, 20], 90, [20, 30, 20]),
        ([20, 20, 21, 20], 62, [20, 20, 20]),
        ([50, 4], 10, [50]),
    ],
)
def test_lengths(lengths: list[int], budget: float, expected: list[int]) -> None:
    """At most twice as long as the shortest of more than 16 tokens, and no more of all than the budget has."""
    first, *others = (entering(length) for length in lengths)
    found = [each.source for each in prompt_group(first, others, budget, encoder=False)]
    assert found == expected


def test_alike() -> None:
    """Masks and prompts in parts run alone; beside an encoder, decoder prompts have the length of the first one's."""
    plain, masked, begun = entering(5), entering(5, masked=True), entering(5, prefill=object())
    assert prompt_group(plain, [masked, begun, plain], 99, encoder=False) == [plain, plain]
    assert prompt_group(masked, [plain], 99, encoder=False) == [masked]
    assert prompt_group(begun, [plain], 99, encoder=False) == [begun]
    first, longer, same = entering(1, prefix=2), entering(1, prefix=1), entering(2, prefix=2)
    assert prompt_group(first, [longer, same], 99, encoder=True) == [first, same]
