"""Scheduler that decodes one request at a time, by the model's own `generate`."""

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from accel.models.generation import AcceleratedModel
from accel.serve.protocol import (
    Event,
    Finished,
    FinishReason,
    Listener,
    QueueFullError,
    Request,
    Status,
    TokenLogprobs,
    Tokens,
)

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Job:
    """A request, its listener, and whether it was cancelled."""

    request: Request
    listener: Listener
    cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """End the request soon."""
        self.cancelled.set()

    def reason(self) -> FinishReason | None:
        """Return why the request must end now; None if it needn't."""
        if self.cancelled.is_set():
            return FinishReason.CANCELLED
        deadline = self.request.deadline
        return FinishReason.TIMEOUT if deadline is not None and time.monotonic() > deadline else None


class _Streamer(BaseStreamer):
    """Passes tokens on as transformers' `generate` chooses them. The first call brings the prompt."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._prompt_seen = False
        self.last = -1
        self.count = 0

    def put(self, value: Tensor) -> None:
        """Take the prompt, or one new token."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        ids = tuple(value.flatten().tolist())
        self.last, self.count = ids[-1], self.count + len(ids)
        self._listener(Tokens(ids))

    def end(self) -> None:
        """Do nothing: the scheduler reports the end."""


class _Stop(StoppingCriteria):
    """Stops a generation that was cancelled or whose time is over."""

    def __init__(self, job: _Job) -> None:
        self._job = job

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Return whether each row is over, bool [batch]."""
        return torch.full((len(input_ids),), self._job.reason() is not None, device=input_ids.device)


class SequentialScheduler:
    """Decodes one request at a time on a thread of its own.

    Args:
        model: The model.
        max_waiting: Requests in the queue; `submit` refuses more.
    """

    def __init__(self, model: AcceleratedModel, max_waiting: int) -> None:
        self._model, self._max_waiting = model, max_waiting
        self._waiting: deque[_Job] = deque()
        self._running: _Job | None = None
        self._generated = 0
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    def warm_up(self) -> None:
        """Do nothing: a first request waits for nothing that later ones don't."""

    def submit(self, request: Request, listener: Listener) -> _Job:
        """Queue a request, as `Scheduler.submit`."""
        job = _Job(request, listener)
        with self._changed:
            if self._closed:
                raise RuntimeError("the scheduler is closed")
            if len(self._waiting) >= self._max_waiting:
                raise QueueFullError(f"{self._max_waiting} requests are waiting already: try again later")
            self._waiting.append(job)
            self._changed.notify_all()
        return job

    def status(self) -> Status:
        """Return the present state."""
        with self._changed:
            running = int(self._running is not None)
            return Status(len(self._waiting), running, 1, 0, 0, self._generated)

    def close(self, drain_s: float = 0.0) -> None:
        """End as `Scheduler.close`."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._waiting and self._running is None, drain_s)
            for job in (*self._waiting, *([self._running] if self._running else [])):
                job.cancel()
        self._thread.join()

    def _run(self) -> None:
        """Decode requests until the scheduler is closed."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                self._running = job = self._waiting.popleft()
            last = self._finish(job)
            with self._changed:
                self._running = None
                self._changed.notify_all()
            job.listener(last)

    def _finish(self, job: _Job) -> Event:
        """Decode one request, and return its last event."""
        reason = job.reason()
        if reason is not None:
            return Finished(reason)
        try:
            return Finished(self._decode(job))
        except Exception as error:  # of any library; the thread goes on with the next request
            logger.warning("a request failed", exc_info=error)
            return Finished(FinishReason.ERROR, error)

    def _decode(self, job: _Job) -> FinishReason:
        """Generate the tokens of one request, and return why it ended."""
        request, model = job.request, self._model
        options = dict(request.generation)
        streamer = _Streamer(job.listener)
        streams = request.logprobs is None and options.get("num_beams", 1) == 1
        if request.logits_processor is not None:
            options["logits_processor"] = LogitsProcessorList([request.logits_processor])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch.seed() if request.seed is None else request.seed)
            output = model.generate(
                **{name: tensor.to(model.device) for name, tensor in request.inputs.items()},
                **options,
                streamer=streamer if streams else None,
                stopping_criteria=StoppingCriteriaList([_Stop(job)]),
                return_dict_in_generate=True,
                output_logits=request.logprobs is not None,
            )
        if not streams:
            tokens = _tokens(output, request, model)
            job.listener(tokens)
            streamer.last, streamer.count = tokens.ids[-1] if tokens.ids else -1, len(tokens.ids)
        self._generated += streamer.count
        ends = model.generation_config.eos_token_id
        ended = streamer.last in (ends if isinstance(ends, list) else [ends])
        return FinishReason.STOP if ended else job.reason() or FinishReason.LENGTH


def _tokens(output: Any, request: Request, model: AcceleratedModel) -> Tokens:
    """Return all new tokens of a finished generation, with log probabilities where they were asked for."""
    prompt = 1 if model.config.is_encoder_decoder else request.inputs["input_ids"].shape[1]
    ids = tuple(output.sequences[0, prompt:].tolist())
    if request.logprobs is None:
        return Tokens(ids)
    logprobs = []
    for token, logits in zip(ids, output.logits, strict=True):
        distribution = logits[0].float().log_softmax(-1)
        top = distribution.topk(request.logprobs)
        pairs = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        logprobs.append(TokenLogprobs(distribution[token].item(), pairs))
    return Tokens(ids, tuple(logprobs))
