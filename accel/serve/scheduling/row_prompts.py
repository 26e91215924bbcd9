"""Prompts of requests that enter a running batch: several at once where they are short, in parts where long."""

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from math import inf

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from accel.errors import DeviceMemoryError
from accel.models.rows import Rows
from accel.serve.protocol import FinishReason
from accel.serve.scheduling.prefill_budget import PrefillBudget
from accel.serve.scheduling.row_job import RowJob, prompt_group
from accel.serve.scheduling.shared_prefixes import Beginning, SharedPrefixes

SHORT_PROMPT, LONGER_PROMPT = 4, 64  # tokens of the prompts that speed is measured with
ENTRIES = 3  # of each such prompt: the second captures CUDA graphs, the third replays them

Select = Callable[[list[RowJob], Tensor, Sequence[int]], None]
"""Function of requests, logits of a batch and the place of each in it, which selects their next tokens."""


class RowPrompts:
    """Computes prompts of requests in rows.

    Args:
        rows: The rows.
        encoder: True if prompts are the inputs of an encoder.
        budget: How many tokens may be computed at once.
        prefixes: Beginnings that prompts share.
        select: Called with the logits of first tokens.

    Attributes:
        budget: How many tokens may be computed at once.
        begins_with_step: Beside an encoder, the first token of a request is computed by the next step, which takes
            fewer launches than a prefill, though all rows' cross-attention caches are computed again.
    """

    def __init__(
        self, rows: Rows, encoder: bool, budget: PrefillBudget, prefixes: SharedPrefixes, select: Select
    ) -> None:
        self._rows, self._encoder, self.budget, self._prefixes, self._select = rows, encoder, budget, prefixes, select
        self.begins_with_step = rows.can_begin_together and rows.model.device.type == "cuda"

    def compute(self, active: Sequence[RowJob]) -> None:
        """Compute prompts of new requests among those in rows, as many tokens as the running ones may wait for."""
        entering = [each for each in active if not each.running]
        stalls = len(entering) < len(active)
        budget = self.budget.tokens(stalls or (not self._encoder and len(entering) > 1))
        while entering and budget > 0:
            group = self._group(entering, budget)
            together = self._encoder or len(group) > 1
            budget -= self._compute(group) if together else self._compute_part(group[0], budget)
            entering = [each for each in entering if each not in group]
            if self._encoder and entering and entering[0].source > budget:
                return  # an encoder computes no parts

    def measure_shortest(self, row: int, longest: int) -> None:
        """Measure the time of a short prompt of at most `longest` tokens in a row, which the row holds afterwards.

        Of several measurements the shortest time counts, as other programs only make it longer.
        """
        self.budget.least_s = min(self.budget.least_s or inf, self._seconds(row, min(SHORT_PROMPT, longest)))

    def measure_longer(self, row: int, longest: int) -> None:
        """Measure the time of the tokens of a prompt of at most `longest`, which the row holds afterwards."""
        length = min(LONGER_PROMPT, longest)
        self.budget.measured(length, self._seconds(row, length))

    def _seconds(self, row: int, length: int) -> float:
        """Return the time of a prompt in a row, which the row holds afterwards."""
        seconds, device = inf, self._rows.model.device
        for _ in range(ENTRIES):
            start = time.perf_counter()
            self._enter([row], {"input_ids": torch.arange(length)[None] % 2})
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = min(seconds, time.perf_counter() - start)
        return seconds

    def _enter(self, rows: list[int], inputs: Mapping[str, Tensor]) -> Tensor | None:
        """Compute prompts in rows. Return the logits of their first tokens; None if the next step computes these."""
        first_ids = inputs.get("decoder_input_ids")
        if self.begins_with_step and (first_ids is None or first_ids.shape[1] == 1):
            self._rows.begin_together(rows, **inputs)
            return None
        return self._rows.prefill_together(rows, **inputs)

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
            ids = each.job.request.inputs["input_ids"]
            # a cache is one of tokens that all count
            each.beginning = Beginning() if each.masked else self._prefixes.beginning(ids)
        return each.beginning

    def _compute(self, group: list[RowJob]) -> int:
        """Compute the prompts of requests in one batch. Return its number of tokens."""
        inputs = self._batch(group)
        tokens = inputs["input_ids"].numel()
        first_ids = inputs["decoder_input_ids"][:, -1].tolist() if self._encoder else []
        start = time.perf_counter()
        try:
            logits = self._enter([each.row for each in group], inputs)
        except Exception as error:  # these requests end, the running ones go on
            if isinstance(error, DeviceMemoryError) and len(group) > 1:
                half = len(group) // 2
                return self._compute(group[:half]) + self._compute(group[half:])
            for each in group:
                each.job.finish(FinishReason.ERROR, error)
            return tokens
        if logits is None:
            for each, token in zip(group, first_ids, strict=True):
                each.token, each.running = token, True
            return tokens
        self._select(group, logits, range(len(group)))  # which waits for the device
        self.budget.measured(tokens, time.perf_counter() - start)
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
            inputs["decoder_input_ids"] = torch.cat([each.job.sequence.prompt for each in group]).cpu()
        return inputs

    def _compute_part(self, each: RowJob, budget: float) -> int:
        """Compute the next part of a prompt. Return its number of tokens."""
        inputs = each.job.request.inputs
        try:
            beginning = self._look_up(each)
            if each.prefill is None:
                shared = {} if beginning.cache is None else {"past_key_values": beginning.cache}
                placed = {name: tensor.to(self._rows.model.device) for name, tensor in inputs.items()}
                each.prefill = self._rows.begin(each.row, **placed, **shared)
            part = max(1, int(min(budget, each.prefill.remaining)))
            if each.prefill.computed < beginning.boundary:
                part = min(part, beginning.boundary - each.prefill.computed)
            start = time.perf_counter()
            logits = each.prefill.advance(part)
            if logits is not None:
                self._select([each], logits[None], [0])
            self.budget.measured(part, time.perf_counter() - start)
            if each.prefill is not None and each.prefill.computed == beginning.boundary:
                self._prefixes.keep(each.prefill.snapshot())
        except Exception as error:  # this request ends, the running ones go on
            each.job.finish(FinishReason.ERROR, error)
            return int(budget)
        return part
