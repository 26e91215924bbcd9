"""A listener that keeps the events of one request, and what `generate` gives the same request alone."""

import threading
from typing import Any

import torch
from torch import Tensor

from accel.models.generation import AcceleratedModel
from accel.serve.protocol import Event, Finished, FinishReason, Request, Scheduler, Ticket, TokenLogprobs, Tokens

UNIQUE: dict[str, Any] = {"no_repeat_ngram_size": 1}  # random weights repeat a token otherwise
PATIENCE_S = 60.0


class Collector:
    """Events of one request.

    Attributes:
        ids: Its new tokens.
        chunks: Number of events that they came in.
        finished: Its last event.
    """

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.chunks = 0
        self.finished: Finished | None = None
        self.ticket: Ticket | None = None
        self.begun, self._done = threading.Event(), threading.Event()

    def __call__(self, event: Event) -> None:
        assert self.finished is None, "an event follows the last one"
        if isinstance(event, Tokens):
            self.ids += event.ids
            self.logprobs += event.logprobs
            self.chunks += 1
            self.begun.set()
        else:
            self.finished = event
            self._done.set()

    def wait(self) -> Finished:
        """Wait for the last event and return it."""
        assert self._done.wait(PATIENCE_S), "the request has no last event"
        assert self.finished is not None
        return self.finished

    def tokens(self) -> list[int]:
        """Wait for the last event of a request that succeeds, and return the tokens."""
        finished = self.wait()
        assert finished.reason in (FinishReason.STOP, FinishReason.LENGTH), finished
        return self.ids


def submit(scheduler: Scheduler, ids: Tensor, seed: int | None = None, **options: Any) -> Collector:
    """Submit a request; options are those of `Request`, or else of GenerationConfig."""
    of_request = {name: options.pop(name) for name in ("logprobs", "logits_processor", "deadline") if name in options}
    inputs = {"input_ids": ids, **options.pop("inputs", {})}
    collector = Collector()
    collector.ticket = scheduler.submit(Request(inputs, options, seed, **of_request), collector)
    return collector


def alone(model: AcceleratedModel, ids: Tensor, seed: int | None = None, **options: Any) -> list[int]:
    """Return the new tokens of `generate` for one request."""
    if seed is not None:
        torch.manual_seed(seed)
    start = 1 if model.config.is_encoder_decoder else ids.shape[1]
    tokens: list[int] = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, start:].tolist()
    return tokens
