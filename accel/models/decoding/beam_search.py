"""Beam search and beam-sample."""

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from accel.models.decoding.token_selector import TokenSelector, sample_without_replacement

NEVER = -1e9  # score of what can't be chosen


class BeamSearch(TokenSelector):
    """The running sequences of every input, and the best that have ended: [batch, beams, ...].

    What transformers calls `_beam_search`, as of 5.23:
    https://github.com/huggingface/transformers/blob/main/src/transformers/generation/utils.py
    """

    def __init__(
        self, ids: Tensor, processors: LogitsProcessorList, criteria: StoppingCriteriaList, config: GenerationConfig
    ) -> None:
        """`ids`: [batch * beams, prompt]."""
        super().__init__(ids, processors, criteria, config)
        self.beams = config.num_beams or 1
        self.batch = len(ids) // self.beams
        self.kept = max(2, 1 + (0 if self.ends is None else len(self.ends))) * self.beams  # so many can't all end
        shape, device = (self.batch, self.beams), ids.device
        self.running = ids.new_full((*shape, self.limit), self._filling())
        self.running[:, :, : self.prompt] = ids.view(*shape, self.prompt)
        self.running_scores = torch.full(shape, NEVER, dtype=torch.float32, device=device)
        self.running_scores[:, 0] = 0  # all beams begin alike: only the first goes on
        self.ended = self.running.clone()
        self.ended_scores = torch.full(shape, NEVER, dtype=torch.float32, device=device)
        self.ended_lengths = torch.zeros(shape, dtype=torch.int64, device=device)
        self.has_ended = torch.zeros(shape, dtype=torch.bool, device=device)
        self.open = torch.ones(self.batch, 1, dtype=torch.bool, device=device)  # may still improve
        self.first_row = torch.arange(self.batch, device=device)[:, None] * self.beams
        self.rows = torch.zeros(len(ids), dtype=torch.int64, device=device)  # that the chosen ids continue
        penalty = config.length_penalty
        divisors = [1.0, *(float(new**penalty) for new in range(1, self.limit - self.prompt + 1))]
        self.divisors = torch.tensor(divisors, dtype=torch.float32, device=device)  # by number of new tokens

    def _filling(self) -> int:
        """What stands behind the end of a sequence."""
        if self.ends is None:
            return -1
        return int(self.pad) if self.pad is not None and self.pad else int(self.ends[0])

    def seen(self) -> Tensor:
        return self.running[:, :, : self.length].reshape(-1, self.length)

    def prepared(self, scores: Tensor) -> Tensor:
        return scores.log_softmax(-1)

    def choose(self, scores: Tensor) -> None:
        vocabulary = scores.shape[-1]
        total = (scores.view(self.batch, self.beams, -1) + self.running_scores[:, :, None]).view(self.batch, -1)
        if self.config.do_sample:
            places = sample_without_replacement(total, self.kept)
            best = total.gather(1, places)
        else:
            best, places = total.topk(self.kept)
        parents, chosen = places // vocabulary, places % vocabulary
        candidates = _rows(self.running, parents)
        candidates.index_copy_(2, self.place, chosen[:, :, None])
        new = self.place + 1 - self.prompt  # [1]
        ends = (self.place + 1 >= self.limit).expand_as(chosen)
        if self.ends is not None:
            ends = ends | torch.isin(chosen, self.ends)
        self._end(candidates, best, ends, new)
        going = best + ends * NEVER
        picked = going.topk(self.beams).indices
        self.running.copy_(_rows(candidates, picked))
        self.running_scores.copy_(going.gather(1, picked))
        self._look_ahead(ends, new)
        self.rows.copy_((parents.gather(1, picked) + self.first_row).view(-1))
        self.chosen.copy_(chosen.gather(1, picked).view(-1, 1))

    def _end(self, candidates: Tensor, best: Tensor, ends: Tensor, new: Tensor) -> None:
        """Let those of the first beams' candidates that end join the best that have ended."""
        ending = ends.clone()
        ending[:, self.beams :] = False
        scores = best / self.divisors[new]
        closed = ~self.open | (self.has_ended.all(-1, keepdim=True) if self.config.early_stopping is True else False)
        scores = torch.where(ending, scores + closed * NEVER, scores + NEVER)
        best_scores, picked = torch.cat([self.ended_scores, scores], 1).topk(self.beams)
        self.ended_scores.copy_(best_scores)
        self.ended.copy_(_rows(torch.cat([self.ended, candidates], 1), picked))
        self.has_ended.copy_(torch.cat([self.has_ended, ending], 1).gather(1, picked))
        lengths = torch.cat([self.ended_lengths, new.expand(self.batch, self.kept)], 1)
        self.ended_lengths.copy_(lengths.gather(1, picked))

    def _look_ahead(self, ends: Tensor, new: Tensor) -> None:
        """Whether a running sequence may still become better than the worst that has ended."""
        penalty, early = self.config.length_penalty, self.config.early_stopping
        divisor = self.divisors[-1] if early == "never" and penalty > 0 else self.divisors[new]
        reachable = self.running_scores[:, :1] / divisor
        worst = torch.where(self.has_ended, self.ended_scores.min(1, keepdim=True).values, NEVER)
        self.open &= (reachable > worst).any(-1, keepdim=True)
        self.over |= ~self.open.any() | ends.all()
        if early is True:
            self.over |= self.has_ended.all()

    def result(self) -> Tensor:
        """[batch * num_return_sequences, length], best first."""
        returned = self.config.num_return_sequences or 1
        length = self.prompt + int(self.ended_lengths[:, :returned].max())
        return self.ended[:, :returned, :length].reshape(self.batch * returned, length)


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """`values` [batch, n, length] at `index` [batch, m] -> [batch, m, length]."""
    return values.gather(1, index[:, :, None].expand(-1, -1, values.shape[2]))
