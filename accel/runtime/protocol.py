"""What generation needs of a runtime. Another engine joins by implementing these two protocols in a file of its own."""

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor


class State(Protocol):
    """The caches of one generation, wherever the runtime keeps them."""

    @property
    def length(self) -> int:
        """Decoder tokens seen so far."""
        ...

    @property
    def batch(self) -> int:
        """Sequences, beams counted."""
        ...

    def reorder(self, index: Tensor) -> None:
        """Let sequence i continue from what sequence `index[i]` was; index: [batch], within each input's beams."""
        ...

    def crop(self, length: int) -> None:
        """Forget all but the first `length` decoder tokens."""
        ...

    def expand(self, times: int) -> None:
        """Repeat every sequence `times` times, neighbours staying together: [batch] -> [batch * times]."""
        ...

    def select(self, index: Tensor) -> None:
        """Keep only the sequences `index`, of any input; index: [new batch]."""
        ...

    def views(self) -> Mapping[str, Tensor]:
        """The caches by input name, [batch, heads, length, head size], those that grow first, keys and values in turn.

        Valid until the next call.
        """
        ...


S = TypeVar("S", bound=State)


class Runtime(Protocol[S]):
    """Runs the graphs of one deployable."""

    device: torch.device
    dtype: torch.dtype

    def encode(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Encoder inputs -> its outputs: last_hidden_state [batch, source, width]."""
        ...

    def prefill(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, S]:
        """Decoder inputs without past -> logits [batch, new, vocabulary] and the state to continue from."""
        ...

    def resume(self, caches: Sequence[Tensor], inputs: Mapping[str, Tensor]) -> S:
        """The state after tokens that were seen elsewhere: their caches, in the order of `State.views`, and `feeds` as
        for a prefill, of which what does not change is kept.
        """
        ...

    def decode(self, inputs: Mapping[str, Tensor], state: S) -> Tensor:
        """Any number (>= 1) of new `input_ids` [batch, new], and what else changes with each call (in decoder-only
        models the mask and the positions) -> logits [batch, new, vocabulary]; the state moves on.
        """
        ...

    def close(self) -> None:
        """Free the sessions."""
        ...
