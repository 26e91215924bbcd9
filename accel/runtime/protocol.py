"""Protocols that a runtime implements to be driven by `accel.models`: another engine joins as one more module."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor


class State(Protocol):
    """KV caches of one generation, in whatever form the runtime keeps them."""

    @property
    def length(self) -> int:
        """Number of decoder tokens in the caches."""
        ...

    @property
    def batch(self) -> int:
        """Number of sequences, beams counted."""
        ...

    def reorder(self, index: Tensor) -> None:
        """Continue every sequence i from sequence `index[i]`, a beam of the same input; index: int [batch]."""
        ...

    def crop(self, length: int) -> None:
        """Drop all but the first `length` decoder tokens."""
        ...

    def reserve(self, tokens: int) -> None:
        """Note that the generation ends with `tokens` decoder tokens in the caches, or earlier."""
        ...

    def expand(self, times: int) -> None:
        """Repeat every sequence `times` times, copies adjacent: [batch, ...] -> [batch * times, ...]."""
        ...

    def select(self, index: Tensor) -> None:
        """Continue with the sequences `index` of any input; index: int [new batch]."""
        ...

    def copy(self) -> "State":
        """Return an independent state with the same tokens."""
        ...

    def views(self) -> Mapping[str, Tensor]:
        """Return all caches as tensors, for the model's own code to read.

        Returns:
            Cache input -> [batch, heads, length, head_size]: the self-attention caches first, then the cross-attention
            caches, each as key and value in turn. Valid until the next call of the runtime or the state.
        """
        ...


class Selection(Protocol):
    """Selection of the next ids by operations over tensors that keep their addresses, without the host.

    Attributes:
        next_ids: The ids selected last, int64 [batch, 1].
        parents: Sequences that they continue, int64 [batch]; None if every sequence continues itself.
    """

    next_ids: Tensor
    parents: Tensor | None

    @property
    def method(self) -> Hashable:
        """Key of the operations: selections with equal keys may continue each other."""
        ...

    def like(self, capacity: int, next_ids: Tensor) -> Self:
        """Return a selection of the same method over tensors of its own, whose content is to be copied from another.

        Args:
            capacity: Largest number of ids that are selected for each sequence.
            next_ids: Where it writes the selected ids, int64 [batch, 1].
        """
        ...

    def copy_from(self, other: Self) -> None:
        """Continue another selection of the same method, which may have another capacity."""
        ...

    def select(self, logits: Tensor) -> None:
        """Select from logits [batch, 1, vocabulary], and update `next_ids` and `parents` in place."""
        ...


S = TypeVar("S", bound=State)
C = TypeVar("C", bound=Selection)


class Runtime(Protocol[S]):
    """Executor of one deployable's components.

    Attributes:
        device: Device of logits and caches.
        dtype: Dtype of the logits.
        engine: What computes decode steps of one token: one of `accel.config.engines`, such as `onnxruntime`.
        exclusive: True if calls of several threads must take turns.
        positions_from_mask: True if the model, called without positions, counts only the tokens that the mask shows.
    """

    device: torch.device
    dtype: torch.dtype
    engine: str
    exclusive: bool
    positions_from_mask: bool

    def encode(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Run the encoder.

        Args:
            inputs: Encoder input -> tensor, for example `input_ids` and `attention_mask` [batch, source].

        Returns:
            `last_hidden_state` [batch, source, width].
        """
        ...

    def prefill(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, S]:
        """Run the decoder without past.

        Args:
            inputs: Decoder input -> tensor: `input_ids` [batch, new], the inputs that change with every call, and the
                constants of the generation, such as the encoder's output and its mask.

        Returns:
            Logits [batch, new, vocabulary] and the state to continue from.
        """
        ...

    def resume(self, caches: Sequence[Tensor], inputs: Mapping[str, Tensor]) -> S:
        """Return a state over existing caches of tokens that were computed elsewhere.

        Args:
            caches: The caches, in the order of `State.views`.
            inputs: Inputs as for `prefill`; only the constants of the generation are used.
        """
        ...

    def decode(self, inputs: Mapping[str, Tensor], state: S) -> Tensor:
        """Run the decoder over one or more new tokens and the cached ones.

        Args:
            inputs: `input_ids` [batch, new] and the other inputs that change with every call: for decoder-only models
                `attention_mask` [batch, past + new] and `position_ids` [batch, new].
            state: Updated in place.

        Returns:
            Logits [batch, new, vocabulary].
        """
        ...

    def decode_and_select(self, inputs: Callable[[], Mapping[str, Tensor]], state: S, selection: C) -> C | None:
        """Run `decode` over the ids selected last, and select the next ones from its logits.

        A runtime that keeps a step's tensors in place updates the inputs of the next step there, too: nothing passes
        through the host from token to token, and one CUDA graph may hold all of it.

        Args:
            inputs: Returns the inputs of `decode`, for when they aren't in place.
            state: Updated in place, reordered by `selection.parents` first.
            selection: What is continued.

        Returns:
            The selection that holds the next ids, `selection` or another that continues it, to be passed next time.
            None if the runtime can't do both at once now, and has done nothing.
        """
        ...

    def close(self) -> None:
        """Free the sessions and their memory."""
        ...
