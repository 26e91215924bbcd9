"""One choice a token: from the logits of all sequences to the ids that follow, over tensors that stay."""

from abc import ABC, abstractmethod
from collections.abc import Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from accel.models.decoding.processors import capturable, phase, process
from accel.runtime.cuda_graph import CudaGraphCallable


class TokenSelector(ABC):
    """What a decoding method keeps between two tokens, and how it takes the next one.

    `ids`: [rows, prompt], rows being the batch, beams counted. What a choice does is the same at every token, so that a
    GPU records it once and replays it. Processors that look at the ids are called before it, one by one.
    """

    def __init__(
        self, ids: Tensor, processors: LogitsProcessorList, criteria: StoppingCriteriaList, config: GenerationConfig
    ) -> None:
        self.processors: Any = processors  # typed for the class that torch had for ids
        self.config = config
        self.prompt, self.limit = ids.shape[1], int(criteria.max_length or 0)
        # the ids that end a sequence, if any do
        self.ends: Tensor | None = next((one.eos_token_id for one in criteria if hasattr(one, "eos_token_id")), None)
        self.pad: Tensor | None = getattr(config, "_pad_token_tensor", None)
        self.device = ids.device
        self.length = ids.shape[1]  # tokens that every sequence has, as the host counts them
        self.place = torch.full((1,), ids.shape[1], device=ids.device)  # the same, as the device does
        self.chosen = torch.empty_like(ids[:, :1])  # [rows, 1]
        self.over = torch.zeros((), dtype=torch.bool, device=ids.device)
        self.scores: Tensor | None = None  # [rows, vocabulary], float32
        self._inside = capturable(processors)  # whether a choice calls them
        self._by_phase: dict[Hashable, CudaGraphCallable] = {}

    @property
    def last(self) -> bool:
        """Whether no sequence may become longer."""
        return self.length == self.limit

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits [rows, new, vocabulary] -> the ids chosen, [rows, 1]; valid until the next call."""
        newest = logits[:, -1]
        if self.scores is None:
            self.scores = torch.empty(newest.shape, dtype=torch.float32, device=self.device)
        self.scores.copy_(newest)
        if not self._inside:
            self.scores.copy_(self.processors(self.seen(), self.prepared(self.scores)))
        key = phase(self.processors, self.length) if self._inside else None
        if key not in self._by_phase:
            work = partial(self._work, self.scores)
            self._by_phase[key] = CudaGraphCallable(work, self.device, "the choice of a token")
        self._by_phase[key]()
        self.length += 1
        return self.chosen

    def __enter__(self) -> "TokenSelector":
        return self

    def __exit__(self, *_: object) -> None:
        self._by_phase.clear()  # what was recorded holds memory of the device

    def _work(self, scores: Tensor) -> None:
        if self._inside:
            scores = process(self.processors, self.length, self.prepared(scores))
        self.choose(scores)
        self.place += 1

    def prepared(self, scores: Tensor) -> Tensor:
        """`scores` as processors take them."""
        return scores

    @abstractmethod
    def seen(self) -> Tensor:
        """The ids so far, [rows, length]."""

    @abstractmethod
    def choose(self, scores: Tensor) -> None:
        """Put the next ids into `chosen`, and whether that was all into `over`. Every change is made in place."""

    @abstractmethod
    def result(self) -> Tensor:
        """The sequences, [rows that are returned, length]."""


def sample_without_replacement(scores: Tensor, count: int) -> Tensor:
    """[batch, choices] -> the places of `count` of them, drawn without replacement."""
    return torch.multinomial(scores.softmax(-1), count)
