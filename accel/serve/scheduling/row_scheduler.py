"""Continuous batching: requests enter and leave a running batch between its steps.

Iteration-level scheduling as in Orca (https://www.usenix.org/conference/osdi22/presentation/yu), prompts in parts
between the steps as in Sarathi-Serve (https://www.usenix.org/conference/osdi24/presentation/agrawal).
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from accel.errors import DeviceMemoryError
from accel.models.generation import AcceleratedModel
from accel.models.rows import Rows
from accel.serve import loop_calls
from accel.serve.protocol import FinishReason, Status
from accel.serve.scheduling.batch_size import BatchSize, Sizing
from accel.serve.scheduling.job import Job
from accel.serve.scheduling.limits import SchedulerLimits
from accel.serve.scheduling.prefill_budget import PrefillBudget
from accel.serve.scheduling.row_job import RowJob
from accel.serve.scheduling.row_prompts import LONGER_PROMPT, RowPrompts
from accel.serve.scheduling.scheduler_thread import SchedulerThread
from accel.serve.scheduling.shared_prefixes import SharedPrefixes
from accel.serve.scheduling.token_selection import Selected, TokenSelection

logger = logging.getLogger(__name__)

MOST_PROMPTS = 8  # times of the shortest prompt that a new request waits for others, to share a batch of prompts
STEPS_AHEAD = 16  # after so many, tokens are reported first, and the size of the batch is looked at
WARM_UP_STEPS = 3  # the second captures a CUDA graph, the third replays it


@dataclass(frozen=True)
class LaunchedStep:
    """A step whose tokens the host may not know yet.

    Attributes:
        active: The rows that it decodes.
        selection: Their tokens.
    """

    active: list[RowJob]
    selection: TokenSelection


class RowScheduler(SchedulerThread):
    """Scheduler over `AcceleratedModel.rows`.

    Every cycle admits waiting requests, computes a part of their prompts, and steps all rows that have theirs. What
    rows can't run, such as beam search, `generate` runs: one request at a time, with a cycle behind each of its steps.

    Args:
        model: The model, with static caches.
        limits: The limits.

    Attributes:
        runs_ahead: Steps are launched before the host knows the tokens of the ones before, so that the device computes
            while the host reports tokens.

    Raises:
        AccelError: The model can't have rows.
        DeviceMemoryError: There is too little memory for one row.
    """

    def __init__(self, model: AcceleratedModel, limits: SchedulerLimits) -> None:
        self._encoder = bool(model.config.is_encoder_decoder)
        self._row_limit = limits.rows
        self._active: list[RowJob] = []  # replaced, never changed, since other threads read it
        self._launched: LaunchedStep | None = None  # the last step, if its tokens aren't reported yet
        self._steps = 0
        self.runs_ahead = model.device.type == "cuda"
        self._rows: Rows = model.rows(1, 2, 16)
        prefixes = SharedPrefixes(0 if self._encoder else limits.shared_prefixes)
        self._prompts = RowPrompts(self._rows, self._encoder, PrefillBudget(limits.stall_s), prefixes, self._select)
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
        """Visit every number of rows, and measure the speed of prefills. Ends with the smallest number."""
        if self._active:
            return
        limits = self.limits
        longest = max(1, min(LONGER_PROMPT, limits.prompt_tokens, limits.total_tokens - WARM_UP_STEPS))
        for count in (*self._sizing.choices, self._sizing.choices[0]):
            size = self._sizing.rounded(count, longest + WARM_UP_STEPS, longest)
            error = self._resize(size)
            if error is not None:
                raise error
            row = self._rows.claim()
            self._prompts.measure_shortest(row, longest)
            for _ in range(WARM_UP_STEPS):
                self._rows.step([0] * size.rows)
            if count == self._sizing.choices[-1]:
                self._prompts.measure_longer(row, longest)
            self._rows.release(row)
        self._sizing.emptied(time.monotonic())

    def work(self) -> None:
        """Run a cycle, or a request that needs `generate` with cycles between its steps."""
        self._cycle()
        for job in self.take(lambda job: not is_row(job), 1):
            self.run_alone(job, lambda: self.guarded(self._cycle))

    def _cycle(self) -> None:
        """Admit requests, compute a part of their prompts, step the batch once."""
        if not self._runs_ahead():
            self._settle()
            while not self._admit():
                pass  # fewer requests, or the running ones alone, which may have outgrown their rows
            self._prompts.compute(self._active)
            self.forget_finished()
        self._step()

    def _admit(self) -> bool:
        """Give waiting requests rows, moving the batch to another size if needed; return False without memory."""
        jobs = [] if self._gathers() else self.take(is_row, self._row_limit - len(self._active))
        if not jobs and not self._active:
            return True
        needed = self._needed(jobs)
        size = self._sizing.next(self._rows, needed, empty=not self._active, at=time.monotonic())
        error = self._resize(size)
        if error is not None and size != needed:
            error = self._resize(needed)
        if error is not None:
            self._give_way(jobs, needed, error)
            return False
        self._active = [*self._active, *(RowJob(job, self._rows.claim()) for job in jobs)]
        return True

    def _gathers(self) -> bool:
        """Return whether new requests wait for more of them, so that one batch of prompts serves them all.

        However short it is, the running rows wait for it. So the new requests wait until they have together waited as
        long as the running ones would, unless all that there is a row for are here.
        """
        with self.changed:
            waiting = [job for job in self.waiting if is_row(job)]
        if not waiting or not self._active or len(waiting) >= self._row_limit - len(self._active):
            return False
        now, least_s = time.monotonic(), self._prompts.budget.least_s
        waited = [now - job.submitted for job in waiting]
        together = least_s * len(self._active)
        return sum(waited) < together and max(waited) < max(self.limits.window_s, MOST_PROMPTS * least_s)

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
        start = time.perf_counter()
        try:
            moved = self._rows.resize(size.rows, size.tokens, size.source)
        except DeviceMemoryError as error:
            return error
        self._sizing.moved(time.perf_counter() - start)
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

    def _runs_ahead(self) -> bool:
        """Return whether the next step can be launched before the tokens of the last one are known.

        A row whose token turns out to be its last one computes one too many, which is dropped. Options that need the
        token on the host, new requests and another size of the batch have the tokens of the last step reported first.
        """
        lengths = self._rows.cache.lengths
        if self._launched is None or self._steps % STEPS_AHEAD == 0 or not lengths:
            return False
        sequences = [each.job.sequence for each in self._active]
        if not all(each.running for each in self._active) or any(each.filters is None for each in sequences):
            return False
        if max(lengths.values()) >= self._rows.max_length or all(each.left < 2 for each in sequences):
            return False
        with self.changed:
            waits = any(is_row(job) for job in self.waiting)
        return not waits or len(self._active) >= self._row_limit or self._gathers()

    def _step(self) -> None:
        """Decode the next token of every row whose prompt is computed, and report those that are known by then."""
        running = [each for each in self._active if each.running]
        launched, self._launched = self._launched, None
        if running:
            if launched is None:
                tokens: list[int] | Tensor = [0] * self._rows.capacity
                for each in running:
                    tokens[each.row] = each.token
            else:
                tokens = launched.selection.tokens()
            logits = self._rows.step(tokens)
            places = [each.row for each in running]
            self._launched = LaunchedStep(running, TokenSelection([each.job for each in running], logits, places))
            self._steps += 1
        if launched is not None:
            self._report(launched)
        if not self.runs_ahead:
            self._settle()
        self.forget_finished()

    def _settle(self) -> None:
        """Report the tokens of the last step, if that wasn't done."""
        launched, self._launched = self._launched, None
        if launched is not None:
            self._report(launched)
            self.forget_finished()

    def _select(self, active: list[RowJob], logits: Tensor, places: Sequence[int]) -> None:
        """Select and report the next token of each of these rows.

        Args:
            active: The rows.
            logits: Logits of a batch, [batch, vocabulary].
            places: Place of each row in it.
        """
        self._report(LaunchedStep(active, TokenSelection([each.job for each in active], logits, places)))

    def _report(self, launched: LaunchedStep) -> None:
        """Wait for the tokens of a step and report them, but for requests that have ended in the meantime."""
        if all(each.job.finished for each in launched.active):
            return
        results = launched.selection.results()
        with loop_calls.batched():
            for each, selected in zip(launched.active, results, strict=True):
                if not each.job.finished:
                    self._report_one(each, selected)

    def _report_one(self, each: RowJob, selected: Selected | Exception) -> None:
        """Report a token of a request, or the error that ends it."""
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
            self._sizing.emptied(time.monotonic())

    def release(self) -> None:
        """Give the rows' caches back to the model."""
        self._rows.close()


def is_row(job: Job) -> bool:
    """Return whether a request can be a row of the batch."""
    return job.alone is None
