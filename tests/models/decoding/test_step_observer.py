"""Observers of a generation's steps, in accel's loops and in transformers'."""

from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList, StoppingCriteriaList

from accel.models.decoding.step_observer import StepObserver
from accel.models.generation import AcceleratedModel
from tests.serve.scheduling.test_row_scheduler import Slow

IDS = torch.arange(5, 14)[None].repeat(2, 1)
IDS[1] += 20
OPTIONS: dict[str, Any] = {"max_new_tokens": 9, "min_new_tokens": 9, "no_repeat_ngram_size": 1}
LOOPS = {"accel": {}, "transformers": {"logits_processor": LogitsProcessorList([Slow()])}}


@pytest.mark.parametrize("loop", LOOPS)
def test_every_token_is_seen(model: AcceleratedModel, loop: str) -> None:
    """Once and in order, the last one too; True ends the generation behind the token that was shown."""
    expected = model.generate(IDS, **OPTIONS)
    seen: list[torch.Tensor] = []

    def observe(next_ids: torch.Tensor) -> bool:
        seen.append(next_ids.clone())
        return len(seen) == stop_at

    for stop_at in (99, 4):
        seen.clear()
        criteria = StoppingCriteriaList([StepObserver(observe, 1)])
        found = model.generate(IDS, **OPTIONS, **LOOPS[loop], stopping_criteria=criteria)
        steps = min(stop_at, 9)
        assert torch.equal(found, expected[:, : 1 + steps])
        assert torch.equal(torch.cat(seen, 1), expected[:, 1 : 1 + steps])
        assert len(seen) == steps


@pytest.mark.parametrize("loop", LOOPS)
def test_beams_end(model: AcceleratedModel, loop: str) -> None:
    """An observer sees the hypotheses of every beam, and ends the search."""
    shapes: list[tuple[int, ...]] = []

    def observe(next_ids: torch.Tensor) -> bool:
        shapes.append(tuple(next_ids.shape))
        return len(shapes) == 3

    criteria = StoppingCriteriaList([StepObserver(observe, 1)])
    model.generate(IDS, num_beams=3, **OPTIONS, **LOOPS[loop], stopping_criteria=criteria)
    assert len(shapes) <= 4
    assert shapes[0][0] == (6 if loop == "accel" else shapes[0][0])
