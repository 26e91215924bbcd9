"""Greedy search and sampling."""

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from accel.decoding.choice import Choice, drawn


class Sample(Choice):
    """Every sequence goes on by itself. What transformers calls `_sample`, as of 5.23:
    https://github.com/huggingface/transformers/blob/main/src/transformers/generation/utils.py
    """

    def __init__(
        self, ids: Tensor, processors: LogitsProcessorList, criteria: StoppingCriteriaList, config: GenerationConfig
    ) -> None:
        super().__init__(ids, processors, criteria, config)
        self.tokens = ids.new_zeros(len(ids), self.limit)
        self.tokens[:, : self.prompt] = ids
        self.ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        self.longest = torch.full((), self.prompt, device=ids.device)  # until all have ended

    def seen(self) -> Tensor:
        return self.tokens[:, : self.length]

    def choose(self, scores: Tensor) -> None:
        chosen = drawn(scores, 1).squeeze(1) if self.config.do_sample else scores.argmax(-1)
        if self.ends is not None:
            chosen = torch.where(self.ended, self.pad, chosen) if self.pad is not None else chosen
            self.longest += ~self.over
            self.ended |= torch.isin(chosen, self.ends)
            self.over.copy_(self.ended.all())
        self.chosen.copy_(chosen[:, None])
        self.tokens.index_copy_(1, self.place, self.chosen)

    def result(self) -> Tensor:
        return self.tokens if self.ends is None else self.tokens[:, : int(self.longest)]
