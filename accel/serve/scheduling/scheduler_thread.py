"""What schedulers have in common: the queue in front of a thread, requests that `generate` runs alone, the end."""

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch

from accel.models import arguments
from accel.models.decoding.generation_configs import GenerationConfigs
from accel.models.decoding.sequence import open_sequence, why_not_stepwise
from accel.models.generation import AcceleratedModel
from accel.serve.protocol import FinishReason, Listener, QueueFullError, Request, RequestTooLongError, Status
from accel.serve.scheduling.job import Job
from accel.serve.scheduling.limits import SchedulerLimits
from accel.serve.scheduling.lone_generation import generate_alone
from accel.system.process_state import one_openmp_thread

logger = logging.getLogger(__name__)

ROW_INPUTS = {"input_ids", "attention_mask", "decoder_input_ids"}  # of requests that can be part of a batch
POLL_S = 0.05  # between looks at the deadlines of waiting requests, where nothing runs


class SchedulerThread(ABC):
    """A queue and a thread that takes requests from it. Implements `protocol.Scheduler`.

    Args:
        model: The model. It stays the caller's, who closes it behind the scheduler.
        limits: The limits.
        name: Name of the thread.

    Attributes:
        waiting: Requests in the order of their submission. Guarded by `changed`.
        changed: Notified when there is something to do.
        generated: New tokens since the start.
        alone: Request that `generate` runs now; None if there is none.
    """

    def __init__(self, model: AcceleratedModel, limits: SchedulerLimits, name: str) -> None:
        self.model, self.limits = model, limits
        self.waiting: deque[Job] = deque()
        self.changed = threading.Condition()
        source, target = arguments.vocabulary_sizes(model.config)
        first = source if model.config.is_encoder_decoder else target
        self._vocabularies = {"input_ids": first, "decoder_input_ids": target}
        self._configs = GenerationConfigs(model)
        self.generated = 0
        self.alone: Job | None = None
        self._calls: deque[Callable[[], None]] = deque()
        self._draining = self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @abstractmethod
    def work(self) -> None:
        """Do the next piece of work; runs on the thread while there are requests."""

    @abstractmethod
    def prepare(self) -> None:
        """Run what a first request would otherwise wait for; runs on the thread."""

    @abstractmethod
    def jobs(self) -> list[Job]:
        """Return the requests that are being decoded, but for the one that `generate` runs alone."""

    @abstractmethod
    def release(self) -> None:
        """Free what the thread holds, at its end."""

    @abstractmethod
    def forget_finished(self) -> None:
        """Let requests that have finished leave the batch."""

    def warm_up(self) -> None:
        """Run what a first request would otherwise wait for: captures, compilations, allocations, measurements."""
        done = threading.Event()
        errors: list[Exception] = []

        def prepare() -> None:
            try:
                self.prepare()
            except Exception as error:  # raised again in the caller's thread
                errors.append(error)
            finally:
                done.set()

        with self.changed:
            self._check_open()
            self._calls.append(prepare)
            self.changed.notify()
        done.wait()
        if errors:
            raise errors[0]

    def submit(self, request: Request, listener: Listener) -> Job:
        """Queue a request; see `protocol.Scheduler.submit`."""
        self._check_open()
        job = self._job(request, listener)
        with self.changed:
            self._check_open()
            if len(self.waiting) >= self.limits.queue:
                raise QueueFullError(f"{self.limits.queue} requests wait already: try again later")
            self.waiting.append(job)
            self.changed.notify()
        return job

    def _job(self, request: Request, listener: Listener) -> Job:
        """Return the job for a request.

        Raises:
            RequestTooLongError: Its prompt, or its prompt and its new tokens, exceed the limits.
            ValueError: An input or an option has a wrong type, shape or range.
        """
        main = request.inputs.get(self.model.main_input_name)
        if main is None:
            raise ValueError(f"the request has no {self.model.main_input_name}")
        if len(main) != 1:
            raise ValueError(f"{self.model.main_input_name} has shape {list(main.shape)}, expected one sequence")
        if self.model.main_input_name == "input_ids":
            self._check_ids(request)
        mask = request.inputs.get("attention_mask")
        if mask is not None and bool(mask.all()):  # as without one
            request = replace(request, inputs={k: v for k, v in request.inputs.items() if k != "attention_mask"})
        sequence = open_sequence(
            self.model,
            request.inputs,
            request.generation,
            request.seed,
            [] if request.logits_processor is None else [request.logits_processor],
            self._configs,
        )
        if (sequence.config.num_return_sequences or 1) > 1:
            raise ValueError("num_return_sequences: a request is one sequence. Submit several requests")
        if sequence.max_length > self.limits.total_tokens:
            raise RequestTooLongError(
                f"{sequence.prompt_length} tokens and {sequence.max_length - sequence.prompt_length} new ones: this "
                f"server allows {self.limits.total_tokens} together. Shorten the prompt or lower max_new_tokens"
            )
        if sequence.max_length <= sequence.prompt_length:
            raise ValueError(
                f"max_length={sequence.max_length} leaves no room for a new token behind {sequence.prompt_length}"
            )
        alone = why_not_stepwise(sequence.config)
        others = set(request.inputs) - ROW_INPUTS
        if alone is None and others:
            alone = ", ".join(sorted(others))
        if request.logprobs is not None and (sequence.config.num_beams or 1) > 1:
            raise ValueError("log probabilities are not available with num_beams > 1")
        return Job(request, listener, sequence, alone, self._wake)

    def _check_ids(self, request: Request) -> None:
        """Check the ids of a prompt, so that a wrong one fails here and not in a batch with others."""
        for name, vocabulary in self._vocabularies.items():
            ids = request.inputs.get(name)
            if ids is None:
                continue
            arguments.check_ids(name, ids, vocabulary)
            if not ids.shape[1]:
                raise ValueError(f"{name} is empty")
            if ids.shape[1] > self.limits.prompt_tokens:
                raise RequestTooLongError(
                    f"the prompt has {ids.shape[1]} tokens: this server allows {self.limits.prompt_tokens}"
                )

    def status(self) -> Status:
        """Return the present state. Callable from any thread."""
        running = len(self.jobs()) + (self.alone is not None)
        return Status(len(self.waiting), running, 0, 0, 0, self.generated)

    def close(self, drain_s: float = 0.0) -> None:
        """Refuse new requests, wait up to `drain_s` seconds for those that run, cancel the rest and end the thread."""
        with self.changed:
            self._draining = True
        end = time.monotonic() + drain_s
        with self.changed:
            while time.monotonic() < end and (self.waiting or self.jobs() or self.alone):
                self.changed.wait(min(POLL_S, max(0.0, end - time.monotonic())))
            self._closed = True
            for job in [*self.waiting, *self.jobs(), *([self.alone] if self.alone else [])]:
                job.cancel()
            self.changed.notify_all()
        self._thread.join()

    def _wake(self) -> None:
        """Let the thread look for cancelled requests."""
        with self.changed:
            self.changed.notify_all()

    def _check_open(self) -> None:
        """Raise `RuntimeError` once the scheduler is closed or about to be."""
        if self._draining:
            raise RuntimeError("this scheduler is closed")

    def _run(self) -> None:
        """Work until the scheduler is closed and every request has its last event.

        On the CPU, torch's operators run on one thread, as within the model's calls: others would take ONNX Runtime's
        cores.
        """
        one_thread = one_openmp_thread() if self.model.device.type == "cpu" else nullcontext()
        with torch.no_grad(), one_thread:
            while self._wait():
                self.guarded(self.work)
            self.release()

    def guarded(self, work: Callable[[], None]) -> None:
        """Do a piece of work for the running requests, which end with an error if it fails."""
        try:
            self.end_stopped()
            work()
        except Exception as error:  # the thread must go on with other requests
            logger.exception("a decoding step failed: the requests in it end with an error")
            self._fail(error)

    def _wait(self) -> bool:
        """Wait for something to do; return False at the end."""
        with self.changed:
            while not (self._calls or self.waiting or self.jobs()):
                if self._closed:
                    return False
                self.changed.wait()
            calls = list(self._calls)
            self._calls.clear()
        for call in calls:
            call()
        return True

    def end_stopped(self) -> None:
        """Finish the requests that were cancelled or whose deadline is over."""
        with self.changed:
            stopped = [job for job in self.waiting if job.reason_to_end is not None]
            for job in stopped:
                self.waiting.remove(job)
        for job in [*stopped, *self.jobs()]:
            reason = job.reason_to_end
            if reason is not None:
                job.finish(reason)
        self.forget_finished()

    def _fail(self, error: Exception) -> None:
        """Finish all running requests with an error."""
        for job in self.jobs():
            job.finish(FinishReason.ERROR, error)
        self.forget_finished()

    def take(self, wanted: Callable[[Job], bool], count: int) -> list[Job]:
        """Take up to `count` waiting requests, oldest first; those that are cancelled or too late end here."""
        taken: list[Job] = []
        with self.changed:
            for job in list(self.waiting):
                if len(taken) < count and wanted(job):
                    self.waiting.remove(job)
                    taken.append(job)
        for job in taken:
            reason = job.reason_to_end
            if reason is not None:
                job.finish(reason)
        return [job for job in taken if not job.finished]

    def run_alone(self, job: Job, between: Callable[[], None]) -> None:
        """Run a request by `generate`.

        Args:
            job: The request.
            between: Called behind each of its steps.
        """
        self.alone = job
        try:
            generate_alone(self.model, job, between)
        except Exception as error:  # of the request's own options or processors
            job.finish(FinishReason.ERROR, error)
        finally:
            self.alone = None
            self.generated += job.sequence.length - job.sequence.prompt_length
