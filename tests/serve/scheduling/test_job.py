"""When the tokens of a request are reported: each, or several as one event."""

from math import inf
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from accel.serve.protocol import Finished, FinishReason, Request, TokenLogprobs, Tokens
from accel.serve.scheduling import job as module
from accel.serve.scheduling.job import Job


class Clock:
    """Clock that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class Sequence:
    """Sequence of a number of tokens."""

    def __init__(self, count: int) -> None:
        self.left, self.ended = count, False

    def append(self, token: int) -> None:
        self.left -= 1

    @property
    def finished(self) -> bool:
        return not self.left


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


def job(count: int, gather_s: float, events: list[Any]) -> Job:
    request = Request({"input_ids": torch.tensor([[1]])}, gather_s=gather_s)
    sequence: Any = Sequence(count)
    return Job(request, events.append, sequence, None, lambda: None)


def run(job: Job, clock: Clock, tokens: int, step_s: float) -> None:
    """Add tokens, one each `step_s`."""
    for token in range(tokens):
        job.add(token, (TokenLogprobs(-float(token)),))
        clock.now += step_s


def ids(events: list[Any]) -> list[tuple[int, ...]]:
    return [event.ids for event in events if isinstance(event, Tokens)]


@pytest.mark.parametrize(
    ("gather_s", "step_s", "expected"),
    [
        (0.0, 0.0, [(0,), (1,), (2,), (3,), (4,), (5,)]),
        (inf, 10.0, [(0,), (1, 2, 3, 4, 5)]),
        (0.02, 0.0101, [(0,), (1, 2), (3, 4), (5,)]),
        (0.02, 0.03, [(0,), (1,), (2,), (3,), (4,), (5,)]),
    ],
)
def test_gathering(gather_s: float, step_s: float, expected: list[tuple[int, ...]], clock: Clock) -> None:
    """The first token at once, no token is lost, and the last ones come before the end."""
    events: list[Any] = []
    run(job(6, gather_s, events), clock, 6, step_s)
    assert ids(events) == expected
    assert events[-1] == Finished(FinishReason.LENGTH)
    entries = [entry.token for event in events if isinstance(event, Tokens) for entry in event.logprobs]
    assert entries == [-float(token) for token in range(6)]


def test_gathered_tokens_of_a_request_that_ends_early(clock: Clock) -> None:
    events: list[Any] = []
    cancelled = job(6, inf, events)
    run(cancelled, clock, 3, 0.1)
    cancelled.finish(FinishReason.CANCELLED)
    assert ids(events) == [(0,), (1, 2)]
    assert events[-1] == Finished(FinishReason.CANCELLED)
