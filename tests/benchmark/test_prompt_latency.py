"""`scripts/prompt_latency.py` times the same call of all backends."""

from typing import Any

import torch

from scripts import prompt_latency as script


class Recorder:
    """Model that keeps what it is called with."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, **inputs: Any) -> object:
        self.calls.append(inputs)
        return object()


def test_prompts_are_random_and_padded_on_the_left() -> None:
    plain, padded = (script.prompt(3, 40, 500, hidden, "cpu") for hidden in (False, True))
    assert len(set(plain["input_ids"].flatten().tolist())) > 90
    assert torch.equal(plain["input_ids"], padded["input_ids"])
    assert plain["attention_mask"].min() == 1
    assert padded["attention_mask"].sum(1).tolist() == [40, 40, 20]
    assert padded["attention_mask"][-1].tolist() == [0] * 20 + [1] * 20


def test_calls_ask_for_the_last_token_and_the_caches() -> None:
    """The first calls aren't timed."""
    model = Recorder()
    inputs = script.prompt(2, 8, 100, False, "cpu")
    work = script.Work(model, lambda batch, length: inputs, {"use_cache": True, "logits_to_keep": 1})
    times = script.time_calls(work, 2, 8, 4)
    assert len(times) == 4
    assert min(times) > 0
    assert len(model.calls) == 4 + script.WARM_UP
    for call in model.calls:
        assert (call["use_cache"], call["logits_to_keep"]) == (True, 1)
        assert call["input_ids"] is inputs["input_ids"]


def test_table() -> None:
    found = {
        "accel": [script.Latency("1x512", 5.214, 5.1, 5.4), script.Latency("8x2048", 80.6, 78.7, 83.2)],
        "eager": [script.Latency("1x512", 10.43, 9.9, 11.0), script.Latency("8x2048", 106.0, 105.0, 107.0)],
    }
    assert script.table(found).splitlines()[2:] == [
        "| 1x512 | 5.21 [5.1-5.4] | 10.4 [9.9-11] | 0.50 |",
        "| 8x2048 | 80.6 [78.7-83.2] | 106 [105-107] | 0.76 |",
    ]
