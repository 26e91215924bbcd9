"""Greedy search and sampling."""

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from accel.models.decoding.token_selector import TokenSelector, sample_without_replacement


class Sampler(TokenSelector):
    """Greedy search and sampling: every sequence continues independently.

    Equivalent to transformers' `GenerationMixin._sample`, as of 5.23:
    https://github.com/huggingface/transformers/blob/main/src/transformers/generation/utils.py
    """

    def __init__(
        self, ids: Tensor, processors: LogitsProcessorList, criteria: StoppingCriteriaList, config: GenerationConfig
    ) -> None:
        super().__init__(ids, processors, criteria, config)
        self.sequences = ids.new_zeros(len(ids), self.max_length)  # [rows, max_length]
        self.sequences[:, : self.prompt_length] = ids
        self.ended = torch.zeros(len(ids), 1, dtype=torch.bool, device=ids.device)  # [rows, 1]

    def token_ids(self) -> Tensor:
        """Return the ids so far, [rows, length]."""
        return self.sequences[:, : self.length]

    def select(self, scores: Tensor) -> None:
        """Draw or take the best id of every row; rows that have ended get the padding id."""
        sample = self.config.do_sample
        ids = sample_without_replacement(scores, 1) if sample else scores.argmax(-1, keepdim=True)  # [rows, 1]
        if self.end_ids is not None:
            if self.pad_id is not None:
                ids = torch.where(self.ended, self.pad_id, ids)
            self.ended |= (ids == self.end_ids).any(-1, keepdim=True)
            torch.all(self.ended, out=self.finished)
        self.next_ids.copy_(ids)
        self.sequences.index_copy_(1, self.position, ids)

    def result(self) -> Tensor:
        """Return the sequences up to the end of the longest one, without what a GPU computed after it."""
        if self.end_ids is None:
            return self.sequences
        new_ids = self.sequences[:, self.prompt_length : self.length]
        is_end = torch.isin(new_ids, self.end_ids)
        no_end_before = is_end.cumsum(1) == is_end  # true up to and including the first end
        return self.sequences[:, : self.prompt_length + int(no_end_before.sum(1).max())]
