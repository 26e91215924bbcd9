"""Padded batches: tokens of each request alone, in batches of requests that are alike, and one by one otherwise."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from accel import testing
from accel.models.generation import AcceleratedModel
from accel.models.loading import load
from accel.serve.protocol import FinishReason, Request
from accel.serve.scheduling.batch_scheduler import BatchScheduler
from accel.serve.scheduling.limits import SchedulerLimits
from accel.serve.scheduling.opening import open_scheduler
from tests.serve.collector import UNIQUE, Collector, alone, submit
from tests.serve.scheduling.test_row_scheduler import Broken, Slow, prompt

LIMITS = SchedulerLimits(rows=4, queue=20, prompt_tokens=40, total_tokens=60, window_s=0.5)


@pytest.fixture(scope="module")
def t5(deployable: Path) -> Iterator[AcceleratedModel]:
    with load(deployable, "cpu") as opened:
        yield opened


@pytest.fixture(scope="module")
def causal(gpt2: testing.Subject) -> AcceleratedModel:
    return gpt2.model


@pytest.fixture(scope="module", params=["t5", "causal"])
def model(request: pytest.FixtureRequest) -> AcceleratedModel:
    opened: AcceleratedModel = request.getfixturevalue(request.param)
    return opened


@pytest.fixture
def batches(model: AcceleratedModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that `generate` gets."""
    sizes: list[int] = []
    whole = type(model).generate

    def generate(self: AcceleratedModel, *args: Any, **kwargs: Any) -> Any:
        if "stopping_criteria" in kwargs:
            sizes.append(len(kwargs["input_ids"]))
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "generate", generate)
    return sizes


@pytest.fixture
def scheduler(model: AcceleratedModel) -> Iterator[BatchScheduler]:
    opened = open_scheduler(model, LIMITS)
    assert isinstance(opened, BatchScheduler)
    opened.warm_up()
    yield opened
    opened.close()


def test_batches(model: AcceleratedModel, scheduler: BatchScheduler, batches: list[int]) -> None:
    """Similar lengths and equal options go together, each with its own number of new tokens; others by themselves."""
    similar = [(prompt(model, length), {"max_new_tokens": new}) for length, new in ((8, 12), (12, 3), (10, 7))]
    unlike: list[tuple[Tensor, dict[str, Any]]] = [
        (prompt(model, 30), {"max_new_tokens": 12}),
        (prompt(model, 9), {"max_new_tokens": 12, "num_beams": 2, **UNIQUE}),
        (prompt(model, 9), {"max_new_tokens": 12, **UNIQUE}),
    ]
    work = [*similar, *unlike]
    expected = [alone(model, ids, **options) for ids, options in work]
    found = [submit(scheduler, ids, **options) for ids, options in work]
    assert [each.tokens() for each in found] == expected
    assert sorted(batches) == [1, 1, 1, 3]
    assert found[4].chunks == 1
    assert found[0].chunks == len(expected[0])
    reasons = [
        FinishReason.LENGTH if len(tokens) == options["max_new_tokens"] else FinishReason.STOP
        for tokens, (_, options) in zip(expected, work, strict=True)
    ]
    assert [each.wait().reason for each in found] == reasons


def test_processors_in_a_batch(model: AcceleratedModel, scheduler: BatchScheduler, batches: list[int]) -> None:
    """Beside an encoder whatever the lengths of the inputs; else only at equal lengths, since they see the padding."""
    work = [prompt(model, length, seed) for length, seed in ((9, 0), (9, 1), (11, 2))]
    expected = [alone(model, ids, max_new_tokens=12, **UNIQUE) for ids in work]
    found = [submit(scheduler, ids, max_new_tokens=12, **UNIQUE) for ids in work]
    assert [each.tokens() for each in found] == expected
    assert sorted(batches) == ([3] if model.config.is_encoder_decoder else [1, 2])


def test_sampling_and_log_probabilities(model: AcceleratedModel, scheduler: BatchScheduler) -> None:
    """One by one."""
    ids = prompt(model, 9)
    options = {"do_sample": True, "max_new_tokens": 10, "top_k": 30}
    expected = [alone(model, ids, seed=seed, **options) for seed in range(3)]
    found = [submit(scheduler, ids, seed=seed, **options) for seed in range(3)]
    assert [each.tokens() for each in found] == expected
    logprobs = submit(scheduler, ids, max_new_tokens=4, min_new_tokens=4, logprobs=2, **UNIQUE)
    assert len(logprobs.tokens()) == len(logprobs.logprobs) == 4


def test_ends_of_single_requests(model: AcceleratedModel, scheduler: BatchScheduler) -> None:
    """Cancelled within a batch, too late, failing: the others have their tokens."""
    ids = [prompt(model, 9, seed) for seed in range(3)]
    options = {"max_new_tokens": 12}
    expected = [alone(model, each, **options) for each in ids]
    cancelled = Collector()

    def cancel(event: Any) -> None:
        cancelled(event)
        if cancelled.ticket is not None:
            cancelled.ticket.cancel()

    first = submit(scheduler, ids[0], **options)
    endless = {"max_new_tokens": 50, "min_new_tokens": 50}
    cancelled.ticket = scheduler.submit(Request({"input_ids": ids[1]}, endless), cancel)
    slow: dict[str, Any] = {"max_new_tokens": 40, "min_new_tokens": 40, "logits_processor": Slow(), **UNIQUE}
    late = submit(scheduler, ids[2], deadline=time.monotonic() + 0.3, **slow)
    broken = submit(scheduler, ids[2], max_new_tokens=12, logits_processor=Broken())
    assert first.tokens() == expected[0]
    assert cancelled.wait().reason is FinishReason.CANCELLED
    assert len(cancelled.ids) < 50
    assert late.wait().reason is FinishReason.TIMEOUT
    assert (broken.wait().reason, str(broken.wait().error)) == (FinishReason.ERROR, "the grammar is broken")
    assert submit(scheduler, ids[2], **options).tokens() == expected[2]


def test_the_reason_is_said(model: AcceleratedModel, caplog: pytest.LogCaptureFixture) -> None:
    """Why requests don't get rows, and what to do about it."""
    open_scheduler(model, LIMITS).close()
    assert "padded batches, not in rows" in caplog.text
    assert "static=True" in caplog.text
