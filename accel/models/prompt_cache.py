"""Keys and values of a prompt's beginning, computed once for many generations."""

from dataclasses import dataclass

from torch import Tensor
from transformers.cache_utils import Cache

from accel.models.cache import cache_over
from accel.runtime.protocol import State


class PromptCache:
    """Cache of the tokens that many prompts begin with, such as a system prompt or examples.

    `model.generate(prompts, past_key_values=cache)` computes only what follows them. The cache stays as it is, and
    serves any number of generations, beams and samples.

    Args:
        state: The runtime's caches of one sequence.
        ids: Its tokens, [1, length].
    """

    def __init__(self, state: State, ids: Tensor) -> None:
        self.state, self.ids = state, ids

    def get_seq_length(self) -> int:
        """Return the number of tokens in the cache."""
        return self.ids.shape[1]

    def prefix_of(self, prompts: Tensor | None, mask: Tensor | None = None) -> "Prefix":
        """Return the first tokens that the cache and all prompts share, at most all but a prompt's last one.

        Args:
            prompts: Ids [batch, length].
            mask: Attention mask of the prompts, [batch, length].

        Raises:
            ValueError: There are no prompts, or they don't begin with the cache's first token.
        """
        if prompts is None:
            raise ValueError("past_key_values: a PromptCache needs whole prompts as input_ids")
        length = min(prompts.shape[1] - 1, self.get_seq_length())
        same = prompts[:, :length] == self.ids[:, :length].to(prompts.device)  # [batch, length]
        if mask is not None:
            same = same & mask[:, :length].bool()
        shared = int(same.all(0).long().cumprod(0).sum())
        if not shared:
            raise ValueError(
                "past_key_values: the prompts don't begin with the tokens of this PromptCache. Pass whole prompts, and "
                "put padding behind these tokens: an attention mask may hide any others"
            )
        return Prefix(self.state, shared)


@dataclass(frozen=True)
class Prefix:
    """The first `length` tokens in a state, for `generate` to begin with."""

    state: State
    length: int

    def get_seq_length(self) -> int:
        """Return the number of tokens."""
        return self.length

    def start(self, batch: int) -> Cache:
        """Return a cache of these tokens for `batch` sequences, for decoding to change."""
        return cache_over(self.copy(batch), is_encoder_decoder=False)

    def copy(self, batch: int) -> State:
        """Return a state of these tokens for `batch` sequences."""
        state = self.state.copy()
        if self.length < state.length:
            state.crop(self.length)
        if batch > 1:
            state.expand(batch)
        return state
