"""Selection of the next tokens within one generation: from the logits of all sequences to the ids that follow."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from accel.engine.operations.choice import Choice, filtered
from accel.models.decoding.processors import as_filters
from accel.models.decoding.selection import Selection, Start
from accel.runtime.cuda_graph import CudaGraphCallable


class TokenSelector:
    """Selection of the tokens of one generation. Processors that are no filters run before it.

    Args:
        method: Decoding method.
        prompt: Ids of the prompt, [rows, prompt]; a row is one sequence, beams counted.
        processors: Processors from `processors.PURE`.
        criteria: Maximum length and, if any, end-of-sequence ids.
        config: Parameters of the method.
        vocabulary: Number of logits of a token.

    Attributes:
        device: Device of all tensors.
        length: Tokens of every sequence.
        selection: State of the method.
    """

    def __init__(
        self,
        method: type[Selection],
        prompt: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        vocabulary: int,
    ) -> None:
        self.device, self._prompt = prompt.device, prompt
        self.length, self._max_length = prompt.shape[1], int(criteria.max_length or 0)
        found = as_filters(processors, self.length, vocabulary, self.device)
        # their annotations in transformers require `torch.LongTensor`
        self._processors: Any = processors if found is None else None
        filters, allowed_from = found or ((), torch.empty(0, vocabulary, dtype=torch.int64, device=self.device))
        self._normalization = method.normalization
        if self._processors is None:
            filters = (*self._normalization, *filters)
        ends, padding = _ends(criteria, config, self.device)
        choice = Choice(filters, bool(config.do_sample), len(ends))
        capacity = max(self._max_length - self.length, 0)
        start = Start(prompt, capacity, choice, allowed_from, ends, padding, config)
        self.selection = self._own = method.begin(start)
        self._scores = torch.empty(len(prompt), 1, vocabulary, dtype=torch.float32, device=self.device)
        self._select = CudaGraphCallable(
            partial(self._own.select, self._scores), self.device, "the selection of the next tokens"
        )

    @property
    def at_max_length(self) -> bool:
        """True once the sequences have the maximum length."""
        return self.length >= self._max_length

    @property
    def on_device(self) -> bool:
        """True if ids are selected by `selection` alone."""
        return self._processors is None

    @property
    def selected(self) -> int:
        """Number of ids selected for each sequence."""
        return self.length - self._prompt.shape[1]

    def __call__(self, logits: Tensor) -> None:
        """Select the next ids.

        Args:
            logits: [rows, new, vocabulary], of which the last new token's count.
        """
        if self.selection is not self._own:
            self._own.copy_from(self.selection)
            self.selection = self._own
        self._scores.copy_(logits[:, -1:])
        if self._processors is not None:
            ids = torch.cat([self._prompt, self.selection.ids(self.selected)], dim=1)
            scores = filtered(self._scores[:, 0], [], self._normalization)
            self._scores[:, 0] = self._processors(ids, scores)
        self._select()
        self.length += 1

    def follow(self, selection: Selection) -> None:
        """Go on with a selection that has selected the next ids."""
        self.selection = selection
        self.length += 1

    def result(self) -> Tensor:
        """Return the generated sequences, [returned rows, length]."""
        return self.selection.result(self._prompt, self.selected)


def _ends(criteria: StoppingCriteriaList, config: GenerationConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the ids that end a sequence, int64 [ends], and the one that follows them, int64 []."""
    ends = next((each.eos_token_id for each in criteria if hasattr(each, "eos_token_id")), None)
    if ends is None:
        ends = torch.empty(0, dtype=torch.int64, device=device)
    padding = getattr(config, "_pad_token_tensor", None)
    if padding is None:
        padding = ends[0] if len(ends) else torch.zeros((), dtype=torch.int64, device=device)
    return ends.to(device), padding.to(device)
