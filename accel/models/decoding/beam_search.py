"""Beam search and beam-sample."""

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from accel.models.decoding.token_selector import TokenSelector, sample_without_replacement

MASKED_SCORE = -1e9  # score of beams and candidates that must not be selected


class BeamSearch(TokenSelector):
    """Beam search: the running sequences of every input, and the best of those that have ended.

    Equivalent to transformers' `GenerationMixin._beam_search`, as of 5.23:
    https://github.com/huggingface/transformers/blob/main/src/transformers/generation/utils.py

    Args:
        ids: Ids of the prompt, [batch * beams, prompt], the beams of one input next to each other.
        processors: Processors from `processors.PURE`.
        criteria: Maximum length and, if any, end-of-sequence ids.
        config: `num_beams`, `length_penalty`, `early_stopping`, `do_sample` and `num_return_sequences`.
    """

    def __init__(
        self, ids: Tensor, processors: LogitsProcessorList, criteria: StoppingCriteriaList, config: GenerationConfig
    ) -> None:
        super().__init__(ids, processors, criteria, config)
        self.beams = config.num_beams or 1
        self.batch = len(ids) // self.beams
        # each beam has at most one candidate per end id, so that at least `beams` of these candidates don't end
        ends_per_beam = 0 if self.end_ids is None else len(self.end_ids)
        self.candidate_count = max(2, 1 + ends_per_beam) * self.beams
        shape, device = (self.batch, self.beams), ids.device
        self.running = ids.new_full((*shape, self.max_length), self._filler_id())  # [batch, beams, max_length]
        self.running[:, :, : self.prompt_length] = ids.view(*shape, self.prompt_length)
        self.running_scores = torch.full(shape, MASKED_SCORE, dtype=torch.float32, device=device)
        self.running_scores[:, 0] = 0  # all beams start with the same prompt: continue only the first
        self.ended = self.running.clone()  # [batch, beams, max_length], best first
        self.ended_scores = torch.full(shape, MASKED_SCORE, dtype=torch.float32, device=device)
        self.ended_lengths = torch.zeros(shape, dtype=torch.int64, device=device)  # new tokens
        self.has_ended = torch.zeros(shape, dtype=torch.bool, device=device)  # false: `ended` is still unused there
        self.can_improve = torch.ones(self.batch, 1, dtype=torch.bool, device=device)
        self.first_rows = torch.arange(self.batch, device=device)[:, None] * self.beams  # [batch, 1]
        self.parent_rows = torch.zeros(len(ids), dtype=torch.int64, device=device)  # rows that `next_ids` continue
        self.length_penalties = self._length_penalties()

    def _filler_id(self) -> int:
        """Return the id that fills a sequence after its end."""
        if self.end_ids is None:
            return -1
        return int(self.pad_id) if self.pad_id is not None and self.pad_id else int(self.end_ids[0])

    def _length_penalties(self) -> Tensor:
        """Return the divisor of a score by number of new tokens, [max new tokens + 1]; unused for 0."""
        penalties = [1.0]
        for new_tokens in range(1, self.max_length - self.prompt_length + 1):
            penalties.append(float(new_tokens**self.config.length_penalty))
        return torch.tensor(penalties, dtype=torch.float32, device=self.device)

    def token_ids(self) -> Tensor:
        """Return the ids of the running sequences, [batch * beams, length]."""
        return self.running[:, :, : self.length].reshape(-1, self.length)

    def normalize(self, scores: Tensor) -> Tensor:
        """Return the log-probabilities of logits [rows, vocabulary]."""
        return scores.log_softmax(-1)

    def select(self, scores: Tensor) -> None:
        """Extend the running sequences by their best candidates, and add candidates that end to the ended ones."""
        vocabulary = scores.shape[-1]
        totals = scores.view(self.batch, self.beams, -1) + self.running_scores[:, :, None]
        totals = totals.view(self.batch, -1)  # [batch, beams * vocabulary]
        if self.config.do_sample:
            indices = sample_without_replacement(totals, self.candidate_count)
            candidate_scores = totals.gather(1, indices)
        else:
            candidate_scores, indices = totals.topk(self.candidate_count)
        parents, ids = indices // vocabulary, indices % vocabulary  # [batch, candidates]
        sequences = _gather_sequences(self.running, parents)  # [batch, candidates, max_length]
        sequences.index_copy_(2, self.position, ids[:, :, None])
        new_tokens = self.position + 1 - self.prompt_length  # [1]
        ends = (self.position + 1 >= self.max_length).expand_as(ids)
        if self.end_ids is not None:
            ends = ends | torch.isin(ids, self.end_ids)
        self._update_ended(sequences, candidate_scores, ends, new_tokens)
        continuing_scores = candidate_scores + ends * MASKED_SCORE
        best = continuing_scores.topk(self.beams).indices  # [batch, beams]
        self.running.copy_(_gather_sequences(sequences, best))
        self.running_scores.copy_(continuing_scores.gather(1, best))
        self._update_finished(ends, new_tokens)
        self.parent_rows.copy_((parents.gather(1, best) + self.first_rows).view(-1))
        self.next_ids.copy_(ids.gather(1, best).view(-1, 1))

    def _update_ended(self, sequences: Tensor, scores: Tensor, ends: Tensor, new_tokens: Tensor) -> None:
        """Merge candidates that end into the best ended sequences; only the first `beams` candidates count.

        Args:
            sequences: The candidates, [batch, candidates, max_length].
            scores: Their scores, [batch, candidates], best first.
            ends: True for candidates that end, [batch, candidates].
            new_tokens: Their number of new tokens, [1].
        """
        ending = ends.clone()
        ending[:, self.beams :] = False
        scores = scores / self.length_penalties[new_tokens]
        closed = ~self.can_improve  # [batch, 1]
        if self.config.early_stopping is True:
            closed = closed | self.has_ended.all(-1, keepdim=True)
        scores = torch.where(ending, scores + closed * MASKED_SCORE, scores + MASKED_SCORE)
        best_scores, best = torch.cat([self.ended_scores, scores], 1).topk(self.beams)
        self.ended_scores.copy_(best_scores)
        self.ended.copy_(_gather_sequences(torch.cat([self.ended, sequences], 1), best))
        self.has_ended.copy_(torch.cat([self.has_ended, ending], 1).gather(1, best))
        lengths = torch.cat([self.ended_lengths, new_tokens.expand(self.batch, self.candidate_count)], 1)
        self.ended_lengths.copy_(lengths.gather(1, best))

    def _update_finished(self, ends: Tensor, new_tokens: Tensor) -> None:
        """Update which inputs can still improve: a running sequence may beat the worst that has ended."""
        length_penalty, early_stopping = self.config.length_penalty, self.config.early_stopping
        # "never" with a positive exponent: scores are best at the maximum length, otherwise at the current one
        at_max_length = early_stopping == "never" and length_penalty > 0
        divisor = self.length_penalties[-1] if at_max_length else self.length_penalties[new_tokens]
        reachable = self.running_scores[:, :1] / divisor  # [batch, 1]
        worst_ended = torch.where(self.has_ended, self.ended_scores.min(1, keepdim=True).values, MASKED_SCORE)
        self.can_improve &= (reachable > worst_ended).any(-1, keepdim=True)
        self.finished |= ~self.can_improve.any() | ends.all()
        if early_stopping is True:
            self.finished |= self.has_ended.all()

    def result(self) -> Tensor:
        """Return the best sequences, [batch * num_return_sequences, length], the best of each input first."""
        returned = self.config.num_return_sequences or 1
        length = self.prompt_length + int(self.ended_lengths[:, :returned].max())
        return self.ended[:, :returned, :length].reshape(self.batch * returned, length)


def _gather_sequences(sequences: Tensor, index: Tensor) -> Tensor:
    """Return the sequences [batch, n, length] at `index` [batch, m]: [batch, m, length]."""
    return sequences.gather(1, index[:, :, None].expand(-1, -1, sequences.shape[2]))
