"""Continuous batching: requests enter and leave a running batch between its steps.

Iteration-level scheduling as in Orca (https://www.usenix.org/conference/osdi22/presentation/yu), prompts in parts
between the steps as in Sarathi-Serve (https://www.usenix.org/conference/osdi24/presentation/agrawal).
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from accel.errors import DeviceMemoryError
from accel.models.generation import AcceleratedModel
from accel.models.rows import Rows
from accel.serve.protocol import FinishReason, Status
from accel.serve.scheduling.batch_size import BatchSize, Sizing
from accel.serve.scheduling.job import Job
from accel.serve.scheduling.limits import SchedulerLimits
from accel.serve.scheduling.prefill_budget import PrefillBudget
from accel.serve.scheduling.row_job import RowJob, prompt_group
from accel.serve.scheduling.scheduler_thread import SchedulerThread
from accel.serve.scheduling.shared_prefixes import Beginning, SharedPrefixes
from accel.serve.scheduling.token_selection import select_tokens

logger = logging.getLogger(__name__)

GROUP = 8  # inputs that an encoder takes at once, if as many come in time
GROUP_STEPS = 3  # steps that the first of them waits for the others
WARM_UP_TOKENS = 64  # of the prompt that the speed is measured with
WARM_UP_STEPS = 3  # the second captures a CUDA graph, the third replays it


class RowScheduler(SchedulerThread):
    """Scheduler over `AcceleratedModel.rows`.

    Every cycle admits waiting requests, computes a part of their prompts, and steps all rows that have theirs. What
    rows can't run, such as beam search, `generate` runs: one request at a time, with a cycle behind each of its steps.

    Args:
        model: The model, with static caches.
        limits: The limits.

    Raises:
        AccelError: The model can't have rows.
        DeviceMemoryError: There is too little memory for one row.
    """

    def __init__(self, model: AcceleratedModel, limits: SchedulerLimits) -> None:
        self._encoder = bool(model.config.is_encoder_decoder)
        self._row_limit = limits.rows
        self._active: list[RowJob] = []  # replaced, never changed, since other threads read it
        self._step_s = 0.0  # of the last step
        self._budget = PrefillBudget(limits.stall_s)
        self._prefixes = SharedPrefixes(0 if self._encoder else limits.shared_prefixes)
        self._rows: Rows = model.rows(1, 2, 16)
        runtime = self._rows.runtime
        self._sizing = Sizing(limits.rows, runtime.capture_batch_sizes, runtime.buckets)
        positions = runtime.buckets.limit or limits.total_tokens
        super().__init__(model, replace(limits, total_tokens=min(limits.total_tokens, positions)), "accel-rows")

    def jobs(self) -> list[Job]:
        """Return the requests in rows."""
        return [each.job for each in self._active]

    def status(self) -> Status:
        """Return the present state. Callable from any thread."""
        active, rows = self._active, self._rows
        held = dict(rows.cache.lengths)
        running = len(active) + (self.alone is not None)
        capacity = rows.capacity * rows.max_length
        return Status(len(self.waiting), running, self.limits.rows, sum(held.values()), capacity, self.generated)

    def prepare(self) -> None:
        """Visit every number of rows, and measure the speed of prefills."""
        length = min(WARM_UP_TOKENS, self.limits.prompt_tokens, self.limits.total_tokens - WARM_UP_STEPS)
        ids = torch.arange(max(length, 1))[None] % 2
        prompt = {"input_ids": ids}
        if self._active:
            return
        for count in self._sizing.choices:
            size = self._sizing.rounded(count, length + WARM_UP_STEPS, length)
            self._rows.resize(size.rows, size.tokens, size.source)
            row = self._rows.claim()
            for _ in range(2):
                start = time.perf_counter()
                self._rows.prefill(row, **prompt)
                seconds = time.perf_counter() - start
            self._budget.measured(length, seconds)
            for _ in range(WARM_UP_STEPS):
                self._rows.step([0] * size.rows)
            self._rows.release(row)

    def work(self) -> None:
        """Run a cycle, or a request that needs `generate` with cycles between its steps."""
        self._cycle()
        for job in self.take(lambda job: not is_row(job), 1):
            self.run_alone(job, lambda: self.guarded(self._cycle))

    def _cycle(self) -> None:
        """Admit requests, compute a part of their prompts, step the batch once."""
        while not self._admit():
            pass  # fewer requests, or the running ones alone, which may have outgrown their rows
        self._prefill()
        self._step()

    def _admit(self) -> bool:
        """Give waiting requests rows, moving the batch to another size if needed; return False without memory."""
        jobs = [] if self._gathers() else self.take(is_row, self._row_limit - len(self._active))
        if not jobs and not self._active:
            return True
        needed = self._needed(jobs)
        size = self._sizing.next(self._rows, needed, empty=not self._active)
        error = self._resize(size)
        if error is not None and size != needed:
            error = self._resize(needed)
        if error is not None:
            self._give_way(jobs, needed, error)
            return False
        self._active = [*self._active, *(RowJob(job, self._rows.claim()) for job in jobs)]
        return True

    def _gathers(self) -> bool:
        """Return whether new requests wait for more of them, to be encoded in one batch while others are decoded."""
        if not self._encoder or not self._active:
            return False
        with self.changed:
            waiting = [job for job in self.waiting if is_row(job)]
        group = min(GROUP, self._row_limit - len(self._active))
        if not 0 < len(waiting) < group:
            return False
        return time.monotonic() < waiting[0].submitted + max(self.limits.window_s, GROUP_STEPS * self._step_s)

    def _needed(self, jobs: list[Job]) -> BatchSize:
        """Return the smallest size for the requests in rows and for further ones."""
        lengths = [each.needed_length for each in self._active]
        lengths += [job.sequence.prompt_length + 1 for job in jobs]
        sources = [each.source for each in self._active] + [job.request.inputs["input_ids"].shape[1] for job in jobs]
        return self._sizing.rounded(len(self._active) + len(jobs), max(lengths), max(sources) if self._encoder else 1)

    def _resize(self, size: BatchSize) -> DeviceMemoryError | None:
        """Move to a size, if it is another one; return the error if there is no memory for it."""
        if size == BatchSize(self._rows.capacity, self._rows.max_length, self._rows.source_length):
            return None
        try:
            moved = self._rows.resize(size.rows, size.tokens, size.source)
        except DeviceMemoryError as error:
            return error
        for each in self._active:
            each.row = moved[each.row]
        return None

    def _give_way(self, jobs: list[Job], refused: BatchSize, error: DeviceMemoryError) -> None:
        """Put new requests back, for fewer rows until the batch is empty; without new ones, end the longest one."""
        smaller = [rows for rows in self._sizing.choices if rows < refused.rows]
        if jobs and (self._active or smaller):
            self._row_limit = max(len(self._active), *smaller[-1:], 1)
            logger.warning("%s. Until the batch is empty, it has %d rows at most", error, self._row_limit)
            with self.changed:
                self.waiting.extendleft(reversed(jobs))
            return
        longest = max(self._active, key=lambda each: each.job.sequence.length).job if self._active else jobs[0]
        longest.finish(FinishReason.ERROR, error)
        self.forget_finished()

    def _prefill(self) -> None:
        """Compute prompts, as many tokens as running rows may wait for."""
        entering = [each for each in self._active if not each.running]
        if not entering:
            return
        stalls = any(each.running for each in self._active)
        budget = self._budget.tokens(stalls or (not self._encoder and len(entering) > 1))
        while entering and budget > 0:
            group = self._group(entering, budget)
            together = self._encoder or len(group) > 1
            budget -= self._compute(group) if together else self._prefill_part(group[0], budget)
            entering = [each for each in entering if each not in group]
        self.forget_finished()

    def _group(self, entering: list[RowJob], budget: float) -> list[RowJob]:
        """Return the oldest new request, and those whose prompts can be computed with its own.

        Without an encoder they share no beginning with others: prompts behind one that does may begin with what it will
        have computed.
        """
        alone = takewhile(lambda each: self._encoder or each.prefill is not None or self._look_up(each).alone, entering)
        return prompt_group(entering[0], (each for each in alone if each is not entering[0]), budget, self._encoder)

    def _look_up(self, each: RowJob) -> Beginning:
        """Return how the prompt of a new request begins among others."""
        if each.beginning is None:
            inputs = each.job.request.inputs
            # a cache is one of tokens that all count
            each.beginning = Beginning() if each.masked else self._prefixes.beginning(inputs["input_ids"])
        return each.beginning

    def _compute(self, group: list[RowJob]) -> int:
        """Compute the prompts of requests in one batch. Return its number of tokens."""
        inputs = self._batch(group)
        tokens = inputs["input_ids"].numel()
        start = time.perf_counter()
        try:
            logits = self._rows.prefill_together([each.row for each in group], **inputs)
        except Exception as error:  # these requests end, the running ones go on
            if isinstance(error, DeviceMemoryError) and len(group) > 1:
                half = len(group) // 2
                return self._compute(group[:half]) + self._compute(group[half:])
            for each in group:
                each.job.finish(FinishReason.ERROR, error)
            return tokens
        self._select(group, logits, range(len(group)))
        self._budget.measured(tokens, time.perf_counter() - start)
        return tokens

    def _batch(self, group: list[RowJob]) -> dict[str, Tensor]:
        """Return the inputs of requests in a batch on the host, padded on the left, beside an encoder on the right.

        On the host they can be checked, and their lengths read, without waiting for the device.
        """
        side = "right" if self._encoder else "left"
        sources = [each.job.request.inputs["input_ids"][0] for each in group]
        masks = [each.job.request.inputs.get("attention_mask", torch.ones(1, each.source))[0].long() for each in group]
        inputs = {
            name: pad_sequence(tensors, batch_first=True, padding_side=side)
            for name, tensors in (("input_ids", sources), ("attention_mask", masks))
        }
        if self._encoder:
            inputs["decoder_input_ids"] = torch.cat([each.job.sequence.prompt for each in group])
        return inputs

    def _prefill_part(self, each: RowJob, budget: float) -> int:
        """Compute the next part of a prompt. Return its number of tokens."""
        inputs = each.job.request.inputs
        try:
            beginning = self._look_up(each)
            if each.prefill is None:
                shared = {} if beginning.cache is None else {"past_key_values": beginning.cache}
                placed = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
                each.prefill = self._rows.begin(each.row, **placed, **shared)
            part = max(1, int(min(budget, each.prefill.remaining)))
            if each.prefill.computed < beginning.boundary:
                part = min(part, beginning.boundary - each.prefill.computed)
            start = time.perf_counter()
            logits = each.prefill.advance(part)
            if logits is not None:
                self._select([each], logits[None], [0])
            self._budget.measured(part, time.perf_counter() - start)
            if each.prefill is not None and each.prefill.computed == beginning.boundary:
                self._prefixes.keep(each.prefill.snapshot())
        except Exception as error:  # this request ends, the running ones go on
            each.job.finish(FinishReason.ERROR, error)
            return int(budget)
        return part

    def _step(self) -> None:
        """Decode the next token of every row whose prompt is computed."""
        running = [each for each in self._active if each.running]
        if not running:
            return
        tokens = [0] * self._rows.capacity
        for each in running:
            tokens[each.row] = each.token
        start = time.perf_counter()
        logits = self._rows.step(tokens)
        self._step_s = time.perf_counter() - start
        self._select(running, logits, [each.row for each in running])
        self.forget_finished()

    def _select(self, active: list[RowJob], logits: Tensor, places: Sequence[int]) -> None:
        """Select and report the next token of each of these rows.

        Args:
            active: The rows.
            logits: Logits of a batch, [batch, vocabulary].
            places: Place of each row in it.
        """
        for each, selected in zip(active, select_tokens([each.job for each in active], logits, places), strict=True):
            if isinstance(selected, Exception):
                each.job.finish(FinishReason.ERROR, selected)
            else:
                each.token = selected.token
                each.job.add(selected.token, selected.logprobs)
                self.generated += 1
            each.running, each.prefill = True, None

    def forget_finished(self) -> None:
        """Free the rows of requests that have finished."""
        finished = [each for each in self._active if each.job.finished]
        if finished:
            self._rows.release(*(each.row for each in finished))
        self._active = [each for each in self._active if not each.job.finished]
        if finished and not self._active:
            self._row_limit = self.limits.rows

    def release(self) -> None:
        """Give the rows' caches back to the model."""
        self._rows.close()


def is_row(job: Job) -> bool:
    """Return whether a request can be a row of the batch."""
    return job.alone is None
