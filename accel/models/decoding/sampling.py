"""Greedy search and sampling."""

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from accel.models.decoding.token_selector import TokenSelector, sample_without_replacement


class Sampler(TokenSelector):
    """Every sequence goes on by itself. What transformers calls `_sample`, as of 5.23:
    https://github.com/huggingface/transformers/blob/main/src/transformers/generation/utils.py
    """

    def __init__(
        self, ids: Tensor, processors: LogitsProcessorList, criteria: StoppingCriteriaList, config: GenerationConfig
    ) -> None:
        super().__init__(ids, processors, criteria, config)
        self.tokens = ids.new_zeros(len(ids), self.limit)
        self.tokens[:, : self.prompt] = ids
        self.ended = torch.zeros(len(ids), 1, dtype=torch.bool, device=ids.device)

    def seen(self) -> Tensor:
        return self.tokens[:, : self.length]

    def choose(self, scores: Tensor) -> None:
        chosen = sample_without_replacement(scores, 1) if self.config.do_sample else scores.argmax(-1, keepdim=True)
        if self.ends is not None:
            chosen = torch.where(self.ended, self.pad, chosen) if self.pad is not None else chosen
            self.ended |= (chosen == self.ends).any(-1, keepdim=True)
            torch.all(self.ended, out=self.over)
        self.chosen.copy_(chosen)
        self.tokens.index_copy_(1, self.place, chosen)

    def result(self) -> Tensor:
        """Up to the token that ended the last sequence; a GPU has gone on for some."""
        if self.ends is None:
            return self.tokens
        ends = torch.isin(self.tokens[:, self.prompt : self.length], self.ends)
        going = ends.cumsum(1) == ends  # no end before it
        return self.tokens[:, : self.prompt + int(going.sum(1).max())]
