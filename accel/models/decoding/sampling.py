"""Greedy search and sampling."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from accel.engine.operations.choice import choice
from accel.models.decoding.selection import Selection, Start
from accel.runtime.greedy_kernel import greedy_kernel


@dataclass(kw_only=True)
class Sampler(Selection):
    """Greedy search and sampling: every sequence continues independently.

    Equivalent to transformers' `GenerationMixin._sample`, as of 5.23:
    https://github.com/huggingface/transformers/blob/main/src/transformers/generation/utils.py

    Attributes:
        new_ids: The selected ids, [rows, capacity].
        ended: Sequences that have ended, bool [rows, 1].
        arrived: See `greedy_kernel.GreedySearch`.
        best: Likewise.
    """

    new_ids: Tensor
    ended: Tensor
    arrived: Tensor
    best: Tensor

    BY_CAPACITY = ("new_ids",)

    @classmethod
    def begin(cls, start: Start) -> Self:
        """Return the selection after a prompt."""
        rows, device = len(start.prompt), start.prompt.device
        return cls(
            choice=start.choice,
            allowed_from=start.allowed_from,
            ends=start.ends,
            padding=start.padding,
            next_ids=torch.empty(rows, 1, dtype=torch.int64, device=device),
            selected=torch.zeros(1, dtype=torch.int64, device=device),
            finished=torch.zeros((), dtype=torch.bool, device=device),
            new_ids=torch.zeros(rows, start.capacity, dtype=torch.int64, device=device),
            ended=torch.zeros(rows, 1, dtype=torch.bool, device=device),
            arrived=torch.zeros(1, dtype=torch.int32, device=device),
            best=torch.zeros(rows, dtype=torch.int64, device=device),
        )

    def select(self, logits: Tensor) -> None:
        """Draw or take the best id of every row; rows that have ended get the padding id."""
        if self.choice.is_greedy and (kernel := greedy_kernel(logits.device, logits.dtype)) is not None:
            kernel(logits[:, -1], self)
            return
        ending = [self.ends, self.padding, self.ended, self.finished] if self.choice.ends else []
        self.next_ids.copy_(choice(logits, *self.filter_tensors(), *ending, spec=self.choice))
        self.new_ids.index_copy_(1, self.selected, self.next_ids)
        self.selected += 1

    def ids(self, count: int) -> Tensor:
        """Return the first `count` selected ids, [rows, count]."""
        return self.new_ids[:, :count]

    def result(self, prompt: Tensor, count: int) -> Tensor:
        """Return the sequences up to the end of the longest one."""
        new_ids = self.new_ids[:, :count]
        if self.choice.ends:
            is_end = torch.isin(new_ids, self.ends)
            no_end_before = is_end.cumsum(1) == is_end  # true up to and including the first end
            new_ids = new_ids[:, : int(no_end_before.sum(1).max())]
        return torch.cat([prompt, new_ids], dim=1)
