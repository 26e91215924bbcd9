"""Selection of the next tokens: from the logits of all sequences to the ids that follow."""

from abc import ABC, abstractmethod
from collections.abc import Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from accel.models.decoding.processors import capturable, phase, process_scores
from accel.runtime.cuda_graph import CudaGraphCallable


class TokenSelector(ABC):
    """Base class of decoding methods: the state between two tokens, and the selection of the next one.

    All state is in tensors that are updated in place, and a selection is the same operations at every token, so that on
    a GPU it is captured as a CUDA graph once and then replayed. Processors that read the ids run before it, uncaptured.

    Args:
        ids: Ids of the prompt, [rows, prompt]; a row is one sequence, beams counted.
        processors: Processors from `processors.PURE`.
        criteria: Maximum length and, if any, end-of-sequence ids.
        config: Decoding method and its parameters.
    """

    def __init__(
        self, ids: Tensor, processors: LogitsProcessorList, criteria: StoppingCriteriaList, config: GenerationConfig
    ) -> None:
        self.processors: Any = processors  # its annotations in transformers require `torch.LongTensor`
        self.config = config
        self.device = ids.device
        self.prompt_length, self.max_length = ids.shape[1], int(criteria.max_length or 0)
        self.end_ids: Tensor | None = None  # [ends]
        for criterion in criteria:
            if hasattr(criterion, "eos_token_id"):
                self.end_ids = criterion.eos_token_id
                break
        self.pad_id: Tensor | None = getattr(config, "_pad_token_tensor", None)
        self.length = ids.shape[1]  # tokens of every sequence, counted on the host
        self.position = torch.full((1,), ids.shape[1], device=ids.device)  # the same, counted on the device
        self.next_ids = torch.empty_like(ids[:, :1])  # [rows, 1]
        self.finished = torch.zeros((), dtype=torch.bool, device=ids.device)  # all sequences have ended
        self.scores: Tensor | None = None  # [rows, vocabulary], float32
        self._capture_processors = capturable(processors)
        self._select_by_phase: dict[Hashable, CudaGraphCallable] = {}

    @property
    def at_max_length(self) -> bool:
        """True once the sequences have the maximum length."""
        return self.length == self.max_length

    def __call__(self, logits: Tensor) -> Tensor:
        """Select the next ids.

        Args:
            logits: [rows, new, vocabulary], of which the last new token's count.

        Returns:
            The selected ids, [rows, 1]; valid until the next call.
        """
        last_logits = logits[:, -1]
        if self.scores is None:
            self.scores = torch.empty(last_logits.shape, dtype=torch.float32, device=self.device)
        self.scores.copy_(last_logits)
        key = None
        if self._capture_processors:
            key = phase(self.processors, self.length)
        else:
            self.scores.copy_(self.processors(self.token_ids(), self.normalize(self.scores)))
        if key not in self._select_by_phase:
            select = partial(self._select, self.scores)
            self._select_by_phase[key] = CudaGraphCallable(select, self.device, "the selection of the next tokens")
        self._select_by_phase[key]()
        self.length += 1
        return self.next_ids

    def __enter__(self) -> "TokenSelector":
        return self

    def __exit__(self, *_: object) -> None:
        self._select_by_phase.clear()  # captured graphs hold device memory

    def _select(self, scores: Tensor) -> None:
        """Run the operations that are captured: processors, if they can be, and the decoding method."""
        if self._capture_processors:
            scores = process_scores(self.processors, self.length, self.normalize(scores))
        self.select(scores)
        self.position += 1

    def normalize(self, scores: Tensor) -> Tensor:
        """Return logits [rows, vocabulary] as the scores that this decoding method passes to processors."""
        return scores

    @abstractmethod
    def token_ids(self) -> Tensor:
        """Return the ids so far, [rows, length]."""

    @abstractmethod
    def select(self, scores: Tensor) -> None:
        """Select the next ids from processed scores [rows, vocabulary].

        Writes the ids into `next_ids`, sets `finished` once all sequences have ended, and updates all state in place.
        """

    @abstractmethod
    def result(self) -> Tensor:
        """Return the generated sequences, [returned rows, length]."""


def sample_without_replacement(scores: Tensor, count: int) -> Tensor:
    """Draw `count` indices per row from the softmax of `scores`: [rows, choices] -> [rows, count]."""
    return torch.multinomial(scores.softmax(-1), count)
