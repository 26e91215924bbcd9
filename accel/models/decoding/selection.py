"""Selection of the next ids of all sequences by one decoding method."""

from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from transformers import GenerationConfig

from accel.engine.operations.choice import Choice, Filter


@dataclass(frozen=True)
class Start:
    """What a selection begins with.

    Attributes:
        prompt: Ids of the prompt, int64 [rows, prompt]; a row is one sequence, beams counted.
        capacity: Largest number of ids that are selected for each sequence.
        choice: Filters, sampling, and the number of ids that end a sequence.
        allowed_from: See `choice`: int64 [filters that forbid ids, vocabulary].
        ends: Ids that end a sequence, int64 [ends].
        padding: Id that follows them, int64 [].
        config: Parameters of beam search.
    """

    prompt: Tensor
    capacity: int
    choice: Choice
    allowed_from: Tensor
    ends: Tensor
    padding: Tensor
    config: GenerationConfig


@dataclass(kw_only=True)
class Selection(ABC):
    """State of a decoding method between two tokens, and the selection of the next ones. See `protocol.Selection`.

    All state is in tensors that are updated in place, and a selection is the same operations at every token, without
    a value of the host that changes. So it can be captured as a CUDA graph, and continue another one of equal `method`.

    Attributes:
        choice: Filters, sampling, and the number of ids that end a sequence.
        allowed_from: See `choice`: int64 [filters that forbid ids, vocabulary].
        ends: Ids that end a sequence, int64 [ends].
        padding: Id after the end of a sequence, int64 [].
        next_ids: The ids selected last, int64 [rows, 1].
        parents: Rows that `next_ids` continue, int64 [rows]; None if every row continues itself.
        selected: Number of ids selected for each sequence, int64 [1].
        finished: All sequences have ended; bool [].
    """

    choice: Choice
    allowed_from: Tensor
    ends: Tensor
    padding: Tensor
    next_ids: Tensor
    parents: Tensor | None = None
    selected: Tensor
    finished: Tensor

    normalization: ClassVar[tuple[Filter, ...]] = ()
    """Filters of logits whose result this method passes to processors."""
    BY_CAPACITY: ClassVar[tuple[str, ...]] = ()
    """Tensors of ids whose last axis is the selected ones; padding follows."""
    DERIVED: ClassVar[tuple[str, ...]] = ()
    """Tensors that depend on the method and the capacity alone."""

    @property
    def method(self) -> Hashable:
        """Key of the operations: selections with equal keys may continue each other."""
        return type(self), self.choice

    @classmethod
    @abstractmethod
    def begin(cls, start: Start) -> Self:
        """Return the selection after a prompt."""

    def like(self, capacity: int, next_ids: Tensor) -> Self:
        """Return a selection of the same method over tensors of its own, whose content is to be copied from another.

        Args:
            capacity: Largest number of ids that are selected for each sequence.
            next_ids: Where it writes the selected ids, int64 [rows, 1].
        """
        tensors: dict[str, Any] = {name: torch.empty_like(tensor) for name, tensor in self._tensors().items()}
        for name in self.BY_CAPACITY:
            tensors[name] = tensors[name].new_empty((*tensors[name].shape[:-1], capacity))
        return replace(self, **tensors | {"next_ids": next_ids})

    def copy_from(self, other: Self) -> None:
        """Continue another selection of the same method, which may have another capacity."""
        theirs = other._tensors()
        for name, tensor in self._tensors().items():
            source = theirs[name]
            if name in self.BY_CAPACITY:
                common = min(tensor.shape[-1], source.shape[-1])
                tensor[..., common:] = self.padding
                tensor, source = tensor[..., :common], source[..., :common]
            tensor.copy_(source)

    def _tensors(self) -> dict[str, Tensor]:
        """Return all tensors but derived ones by name, the padding before those by capacity."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in self.DERIVED}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def filter_tensors(self) -> list[Tensor]:
        """Return the tensors of the filters: see `choice.Choice`."""
        return [self.selected, *self.allowed_from] if self.choice.filter_tensors else []

    @abstractmethod
    def select(self, logits: Tensor) -> None:
        """Select the next ids from logits, or from processed scores, [rows, new, vocabulary], of which the last count.

        Writes the ids into `next_ids`, sets `finished` once all sequences have ended, and updates all state in place.
        """

    @abstractmethod
    def ids(self, count: int) -> Tensor:
        """Return the first `count` selected ids of the sequences that go on, [rows, count]."""

    @abstractmethod
    def result(self, prompt: Tensor, count: int) -> Tensor:
        """Return the generated sequences.

        Args:
            prompt: Ids of the prompt, [rows, prompt].
            count: Number of ids selected for each sequence. A GPU may have selected some after the end.

        Returns:
            New tensor [returned rows, length].
        """
