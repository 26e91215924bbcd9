"""Padded dynamic batching: requests that arrive within a short time and are alike go through `generate` together.

For models without rows: speech, deployables without static caches, rotary embeddings that depend on the length.
"""

import time
from collections.abc import Hashable

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from accel.models.decoding.step_observer import StepObserver
from accel.models.generation import AcceleratedModel
from accel.serve import loop_calls
from accel.serve.protocol import FinishReason
from accel.serve.scheduling.job import Job
from accel.serve.scheduling.limits import SchedulerLimits
from accel.serve.scheduling.lone_generation import report
from accel.serve.scheduling.scheduler_thread import SchedulerThread

LONGEST_TO_SHORTEST = 2  # of the inputs in a batch: padding takes at most as much time again
WARM_UP_TOKENS = 3


class BatchScheduler(SchedulerThread):
    """Scheduler over `AcceleratedModel.generate`.

    Greedy requests with equal options and similar lengths form a batch; it ends when its last request does. All others,
    such as beams and sampling, run one by one.

    Args:
        model: The model.
        limits: The limits; `rows` is the largest batch.
    """

    def __init__(self, model: AcceleratedModel, limits: SchedulerLimits) -> None:
        self._batch: list[Job] = []  # replaced, never changed, since other threads read it
        super().__init__(model, limits, "accel-batches")

    def jobs(self) -> list[Job]:
        """Return the requests of the batch."""
        return self._batch

    def prepare(self) -> None:
        """Generate a few tokens, where the input is text."""
        if self.model.main_input_name == "input_ids":
            ids = torch.zeros(1, WARM_UP_TOKENS, dtype=torch.int64, device=self.model.device)
            self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=WARM_UP_TOKENS)

    def work(self) -> None:
        """Run the oldest request, with those that fit it."""
        with self.changed:
            if not self.waiting:
                return
            first = self.waiting[0]
        key = None if first.alone else self._key(first)
        if key is None:
            for job in self.take(lambda job: job is first, 1):
                self.run_alone(job, self.end_stopped)
            return
        self._wait_for_more(first)
        jobs = self.take(lambda job: job is first or self._fits(job, first, key), self.limits.rows)
        if len(jobs) == 1:
            self.run_alone(jobs[0], self.end_stopped)
        elif jobs:
            self._run_batch(jobs)

    def _wait_for_more(self, first: Job) -> None:
        """Wait until the window of a request is over or a batch is full."""
        with self.changed:
            while len(self.waiting) < self.limits.rows:
                left = first.submitted + self.limits.window_s - time.monotonic()
                if left <= 0 or first.reason_to_end is not None:
                    return
                self.changed.wait(left)

    def _fits(self, job: Job, first: Job, key: Hashable) -> bool:
        """Return whether a request can be in one batch with another one, whose key is `key`."""
        lengths = sorted(int(each.request.inputs[self.model.main_input_name].shape[1]) for each in (job, first))
        return not job.alone and self._key(job) == key and lengths[1] <= LONGEST_TO_SHORTEST * lengths[0]

    def _key(self, job: Job) -> Hashable | None:
        """Return what requests of one batch have in common; None for one that can't share a batch.

        Sampling draws from one generator for all rows, and log probabilities need the logits of all. Processors of a
        decoder-only model's options see the padding, and with processors the largest number of tokens may count.
        """
        request, sequence = job.request, job.sequence
        main = self.model.main_input_name
        if set(request.inputs) != {main} or request.logits_processor or request.logprobs is not None:
            return None
        names = {name for name, value in request.generation.items() if value is not None}
        if sequence.config.do_sample or any(name.startswith("encoder_") for name in names):
            return None
        options = {name: repr(request.generation[name]) for name in names - {"max_new_tokens", "max_length"}}
        length = None if self.model.config.is_encoder_decoder else request.inputs[main].shape[1]
        limit = None if sequence.greedy else (length, sequence.max_length)
        shape = () if main == "input_ids" else tuple(request.inputs[main].shape)
        return frozenset(options.items()), sequence.prompt.shape if length is None else None, limit, shape

    def _run_batch(self, jobs: list[Job]) -> None:
        """Generate for several requests at once."""
        self._batch = jobs
        text = self.model.main_input_name == "input_ids"

        def observe(next_ids: Tensor) -> bool:
            if text:
                tokens = next_ids[:, -1].tolist()
                with loop_calls.batched():
                    for job, token in zip(jobs, tokens, strict=True):
                        if not job.finished:
                            self._add(job, [token])
            self.end_stopped()
            return not self._batch

        options = {name: value for name, value in jobs[0].request.generation.items() if name != "max_length"}
        options["max_new_tokens"] = max(job.sequence.max_length - job.sequence.prompt_length for job in jobs)
        observer = StepObserver(observe, self._width(jobs))
        output = self.model.generate(
            **self._inputs(jobs), **options, stopping_criteria=StoppingCriteriaList([observer])
        )
        if not text:
            ids = getattr(output, "sequences", output)
            for job, tokens in zip(jobs, ids.tolist(), strict=True):
                if not job.finished:
                    self._add(job, tokens)
        for job in jobs:
            job.finish(FinishReason.STOP)  # what has no last event yet ended before its length
        self.forget_finished()

    def _add(self, job: Job, tokens: list[int]) -> None:
        """Report tokens of a request, and its end."""
        before = job.sequence.length
        report(job, tokens)
        self.generated += job.sequence.length - before
        if job.sequence.finished:
            job.finish(FinishReason.STOP if job.sequence.ended else FinishReason.LENGTH)

    def _width(self, jobs: list[Job]) -> int:
        """Return the number of tokens of the padded decoder prompts."""
        if self.model.config.is_encoder_decoder:
            return jobs[0].sequence.prompt_length
        return max(job.sequence.prompt_length for job in jobs)

    def _inputs(self, jobs: list[Job]) -> dict[str, Tensor]:
        """Return the inputs in a batch: padded, beside an encoder on the right, else on the left."""
        name = self.model.main_input_name
        inputs = [job.request.inputs[name] for job in jobs]
        if name != "input_ids":
            return {name: torch.cat(inputs).to(self.model.device)}
        side = "right" if self.model.config.is_encoder_decoder else "left"
        rows = [each[0] for each in inputs]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=side)
        masks = [torch.ones_like(row) for row in rows]
        mask = torch.nn.utils.rnn.pad_sequence(masks, batch_first=True, padding_side=side)
        return {"input_ids": ids.to(self.model.device), "attention_mask": mask.to(self.model.device)}

    def forget_finished(self) -> None:
        """Let requests that have finished leave the batch; their places are computed until the batch ends."""
        self._batch = [job for job in self._batch if not job.finished]

    def release(self) -> None:
        """Do nothing: the thread holds nothing but the model, which stays the caller's."""
