"""A stopping criterion that sees the tokens as they are selected and may end a generation, in any decoding loop."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria


class StepObserver(StoppingCriteria):
    """Call a function after every step. Accel's own loops support it, as transformers' do.

    Args:
        observe: Function of the tokens that the step has selected, int64 [rows, new]; with beams of the hypotheses so
            far. It returns True to end the generation there. On a GPU, reading the tokens waits for them.
        prompt_length: Number of tokens before the first selected one.
    """

    def __init__(self, observe: Callable[[Tensor], bool], prompt_length: int) -> None:
        self._observe, self._seen = observe, prompt_length

    def step(self, next_ids: Tensor) -> bool:
        """Show the tokens of one step, [rows, new]; return True if the generation is to end."""
        return self._observe(next_ids)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Show the tokens behind those seen before; return whether each row is to end, bool [rows]."""
        new_ids = input_ids[:, self._seen :]
        self._seen = input_ids.shape[1]
        return torch.full((len(input_ids),), self._observe(new_ids), device=input_ids.device)
