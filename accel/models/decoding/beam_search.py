"""Beam search and beam-sample."""

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from accel.engine.operations.choice import LOG_SOFTMAX, draw, filtered
from accel.models.decoding.selection import Selection, Start

MASKED_SCORE = -1e9  # score of beams and candidates that must not be selected


@dataclass(frozen=True)
class BeamOptions:
    """Parameters of a beam search.

    Attributes:
        beams: Sequences of each input that go on.
        length_penalty: Exponent of the number of ids by which scores are divided.
        early_stopping: See transformers' `GenerationConfig`.
        returned: Sequences of each input that are returned.
    """

    beams: int
    length_penalty: float
    early_stopping: bool | str
    returned: int


@dataclass(kw_only=True)
class BeamSearch(Selection):
    """Beam search: the running sequences of every input, and the best of those that have ended.

    Equivalent to transformers' `GenerationMixin._beam_search`, as of 5.23:
    https://github.com/huggingface/transformers/blob/main/src/transformers/generation/utils.py

    Attributes:
        options: Parameters.
        running: Selected ids of the running sequences, [batch, beams, capacity].
        running_scores: Their scores, [batch, beams].
        ended: Selected ids of the best ended sequences, [batch, beams, capacity], best first.
        ended_scores: Their scores, [batch, beams].
        ended_lengths: Their numbers of ids, int64 [batch, beams].
        has_ended: False where `ended` is still unused, bool [batch, beams].
        can_improve: Inputs whose running sequences may become better than ended ones, bool [batch, 1].
        first_rows: Row of the first beam of every input, int64 [batch, 1].
        length_penalties: Divisor of a score by number of ids, from 1 on, [capacity].
        limit: Largest number of ids, int64 [1].
        penalty_at_limit: Divisor of the score of so many, [1].
    """

    options: BeamOptions
    parents: Tensor
    running: Tensor
    running_scores: Tensor
    ended: Tensor
    ended_scores: Tensor
    ended_lengths: Tensor
    has_ended: Tensor
    can_improve: Tensor
    first_rows: Tensor
    length_penalties: Tensor
    limit: Tensor
    penalty_at_limit: Tensor

    normalization = (LOG_SOFTMAX,)
    BY_CAPACITY = ("running", "ended")
    DERIVED = ("length_penalties",)

    @property
    def method(self) -> Hashable:
        """Key of the operations: selections with equal keys may continue each other."""
        return type(self), self.choice, self.options

    @classmethod
    def begin(cls, start: Start) -> Self:
        """Return the selection after a prompt."""
        config, device, rows = start.config, start.prompt.device, len(start.prompt)
        options = BeamOptions(
            beams=config.num_beams or 1,
            length_penalty=config.length_penalty,
            early_stopping=config.early_stopping,
            returned=config.num_return_sequences or 1,
        )
        shape = batch, beams = rows // options.beams, options.beams
        padding = torch.full((), -1, dtype=torch.int64, device=device)
        if start.choice.ends:
            padding = torch.where(start.padding == 0, start.ends[0], start.padding)
        sequences = padding.expand(*shape, start.capacity)
        scores = torch.full(shape, MASKED_SCORE, dtype=torch.float32, device=device)
        running_scores = scores.clone()
        running_scores[:, 0] = 0  # all beams start with the same prompt: continue only the first
        penalties = _length_penalties(options, start.capacity, device)
        return cls(
            choice=start.choice,
            allowed_from=start.allowed_from,
            ends=start.ends,
            padding=padding,
            next_ids=torch.empty(rows, 1, dtype=torch.int64, device=device),
            parents=torch.zeros(rows, dtype=torch.int64, device=device),
            selected=torch.zeros(1, dtype=torch.int64, device=device),
            finished=torch.zeros((), dtype=torch.bool, device=device),
            options=options,
            running=sequences.clone(),
            running_scores=running_scores,
            ended=sequences.clone(),
            ended_scores=scores,
            ended_lengths=torch.zeros(shape, dtype=torch.int64, device=device),
            has_ended=torch.zeros(shape, dtype=torch.bool, device=device),
            can_improve=torch.ones(batch, 1, dtype=torch.bool, device=device),
            first_rows=torch.arange(batch, device=device)[:, None] * beams,
            length_penalties=penalties,
            limit=torch.full((1,), start.capacity, device=device),
            penalty_at_limit=penalties[-1:],
        )

    def like(self, capacity: int, next_ids: Tensor) -> Self:
        """Return a selection of the same method over tensors of its own: see `Selection.like`."""
        penalties = _length_penalties(self.options, capacity, next_ids.device)
        return replace(super().like(capacity, next_ids), length_penalties=penalties)

    def select(self, logits: Tensor) -> None:
        """Extend the running sequences by their best candidates, and add candidates that end to the ended ones."""
        beams = self.options.beams
        scores = filtered(logits[:, -1].float(), self.filter_tensors(), self.choice.filters)
        batch, vocabulary = len(scores) // beams, scores.shape[-1]
        totals = scores.view(batch, beams, -1) + self.running_scores[:, :, None]
        totals = totals.view(batch, -1)  # [batch, beams * vocabulary]
        # each beam has at most one candidate per end id, so that at least `beams` of these candidates don't end
        count = max(2, 1 + self.choice.ends) * beams
        if self.choice.sample:
            indices = draw(totals, count)
            candidate_scores = totals.gather(1, indices)
        else:
            candidate_scores, indices = totals.topk(count)
        parents, ids = indices // vocabulary, indices % vocabulary  # [batch, candidates]
        sequences = _gather_sequences(self.running, parents)  # [batch, candidates, capacity]
        sequences.index_copy_(2, self.selected, ids[:, :, None])
        length = self.selected + 1  # [1]
        ends = (length >= self.limit).expand_as(ids)
        if self.choice.ends:
            ends = ends | torch.isin(ids, self.ends)
        self._update_ended(sequences, candidate_scores, ends, length)
        continuing_scores = candidate_scores + ends * MASKED_SCORE
        best = continuing_scores.topk(beams).indices  # [batch, beams]
        self.running.copy_(_gather_sequences(sequences, best))
        self.running_scores.copy_(continuing_scores.gather(1, best))
        self._update_finished(ends, length)
        torch.add(parents.gather(1, best), self.first_rows, out=self.parents.view(batch, beams))
        self.next_ids.copy_(ids.gather(1, best).view(-1, 1))
        self.selected += 1

    def _update_ended(self, sequences: Tensor, scores: Tensor, ends: Tensor, length: Tensor) -> None:
        """Merge candidates that end into the best ended sequences; only the first `beams` candidates count.

        Args:
            sequences: The candidates, [batch, candidates, capacity].
            scores: Their scores, [batch, candidates], best first.
            ends: True for candidates that end, [batch, candidates].
            length: Their number of ids, [1].
        """
        ending = ends.clone()
        ending[:, self.options.beams :] = False
        scores = scores / self.length_penalties[length - 1]
        closed = ~self.can_improve  # [batch, 1]
        if self.options.early_stopping is True:
            closed = closed | self.has_ended.all(-1, keepdim=True)
        scores = torch.where(ending, scores + closed * MASKED_SCORE, scores + MASKED_SCORE)
        best_scores, best = torch.cat([self.ended_scores, scores], 1).topk(self.options.beams)
        self.ended_scores.copy_(best_scores)
        self.ended.copy_(_gather_sequences(torch.cat([self.ended, sequences], 1), best))
        self.has_ended.copy_(torch.cat([self.has_ended, ending], 1).gather(1, best))
        lengths = torch.cat([self.ended_lengths, length.expand(ends.shape)], 1)
        self.ended_lengths.copy_(lengths.gather(1, best))

    def _update_finished(self, ends: Tensor, length: Tensor) -> None:
        """Update which inputs can still improve: a running sequence may beat the worst that has ended."""
        length_penalty, early_stopping = self.options.length_penalty, self.options.early_stopping
        # "never" with a positive exponent: scores are best at the maximum length, otherwise at the current one
        at_limit = early_stopping == "never" and length_penalty > 0
        divisor = self.penalty_at_limit if at_limit else self.length_penalties[length - 1]  # [1]
        reachable = self.running_scores[:, :1] / divisor  # [batch, 1]
        worst_ended = torch.where(self.has_ended, self.ended_scores.min(1, keepdim=True).values, MASKED_SCORE)
        self.can_improve &= (reachable > worst_ended).any(-1, keepdim=True)
        self.finished |= ~self.can_improve.any() | ends.all()
        if early_stopping is True:
            self.finished |= self.has_ended.all()

    def ids(self, count: int) -> Tensor:
        """Return the first `count` selected ids of the running sequences, [batch * beams, count]."""
        return self.running[:, :, :count].flatten(0, 1)

    def result(self, prompt: Tensor, count: int) -> Tensor:
        """Return the best sequences, [batch * returned, length], the best of each input first."""
        returned = self.options.returned
        length = int(self.ended_lengths[:, :returned].max())
        prompts = prompt.view(*self.has_ended.shape, -1)[:, :returned]  # [batch, returned, prompt]
        return torch.cat([prompts, self.ended[:, :returned, :length]], dim=2).flatten(0, 1)


def _length_penalties(options: BeamOptions, capacity: int, device: torch.device) -> Tensor:
    """Return the divisors of scores of 1 to `capacity` ids."""
    penalties = [float(count**options.length_penalty) for count in range(1, capacity + 1)]
    return torch.tensor(penalties, dtype=torch.float32, device=device)


def _gather_sequences(sequences: Tensor, index: Tensor) -> Tensor:
    """Return the sequences [batch, n, length] at `index` [batch, m]: [batch, m, length]."""
    return sequences.gather(1, index[:, :, None].expand(-1, -1, sequences.shape[2]))
