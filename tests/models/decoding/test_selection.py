"""Selections over tensors of another capacity go on as the one that they continue."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from accel.engine.operations.choice import LOG_SOFTMAX, Choice, Filter
from accel.models.decoding.beam_search import BeamSearch
from accel.models.decoding.sampling import Sampler
from accel.models.decoding.selection import Selection, Start

ROWS, VOCABULARY, NEW = 6, 11, 12
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "never early": {"num_beams": 3, "early_stopping": "never", "length_penalty": 2.0},
    "early": {"num_beams": 3, "early_stopping": True, "length_penalty": -1.0},
    "beam-sample": {"num_beams": 3, "do_sample": True},
}


def begin(options: dict[str, Any]) -> Selection:
    """Return a selection with two ids that end a sequence, after a prompt of 2."""
    config = GenerationConfig(**{"length_penalty": 1.0, "early_stopping": False, **options})
    beams = (config.num_beams or 1) > 1
    choice = Choice((LOG_SOFTMAX,) if beams else (Filter("temperature", 0.8),), bool(config.do_sample), 2)
    method: type[Selection] = BeamSearch if beams else Sampler
    nothing = torch.empty(0, VOCABULARY, dtype=torch.int64)
    prompt = torch.arange(ROWS // 3).repeat_interleave(3)[:, None].repeat(1, 2)
    return method.begin(Start(prompt, NEW, choice, nothing, torch.tensor([1, 4]), torch.tensor(0), config))


def state(selection: Selection, count: int) -> dict[str, Any]:
    """Return all that differs between tokens, up to `count` ids."""
    tensors = {name: tensor.clone() for name, tensor in selection._tensors().items()}
    for name in selection.BY_CAPACITY:
        tensors[name] = tensors[name][..., :count]
    return {name: tensor.tolist() for name, tensor in tensors.items()}


@pytest.mark.parametrize("capacities", [(NEW + 30,), (5, NEW + 30), (5, 8, NEW)], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_another_capacity(options: dict[str, Any], capacities: tuple[int, ...]) -> None:
    """From buffers to larger ones, as from bucket to bucket; compared after every token, and in the end."""
    logits = torch.randn(NEW, ROWS, 1, VOCABULARY, generator=torch.Generator().manual_seed(4)) * 2
    logits[..., [1, 4]] -= 3  # so that sequences don't end at once
    expected = begin(options)
    found, remaining = begin(options), list(capacities)
    for number in range(NEW):
        if number in (2, 5, 8) and remaining:
            larger = found.like(remaining.pop(0), torch.empty(ROWS, 1, dtype=torch.int64))
            larger.copy_from(found)
            found = larger
        for selection in (expected, found):
            torch.manual_seed(number)
            selection.select(logits[number])
        assert state(found, number + 1) == state(expected, number + 1)
    prompt: Tensor = torch.full((ROWS, 2), 7)
    assert found.result(prompt, NEW).tolist() == expected.result(prompt, NEW).tolist()
    assert len({tuple(row) for row in expected.result(prompt, NEW).tolist()}) > 1


def test_penalties_of_a_longer_generation() -> None:
    """Buffers may serve a longer generation later than the one that they were made for."""
    options = OPTIONS["never early"]
    kept: Any = begin(options).like(40, torch.empty(ROWS, 1, dtype=torch.int64))
    assert kept.length_penalties.tolist() == [float(count**2) for count in range(1, 41)]


def test_the_best_reachable_score() -> None:
    """`never` with a positive penalty: at the limit of this generation, not at the capacity of the buffers."""
    first: Any = begin(OPTIONS["never early"])
    kept = first.like(NEW + 30, torch.empty(ROWS, 1, dtype=torch.int64))
    kept.copy_from(first)
    kept.has_ended.fill_(True)
    kept.running_scores.fill_(-14.4)  # -0.1 at the limit of 12 ids
    for ended_score, can_improve in ((-0.11, True), (-0.09, False)):
        kept.ended_scores.fill_(ended_score)
        kept._update_finished(torch.zeros(2, 9, dtype=torch.bool), torch.tensor([3]))
        assert kept.can_improve.tolist() == [[can_improve]] * 2
    assert bool(kept.finished)
