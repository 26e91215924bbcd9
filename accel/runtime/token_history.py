"""What a generation has given a decoder so far, from which caches can be computed again."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from accel.runtime.chunked_prefill import NEW, TOTAL
from accel.runtime.layout import IDS

MAX_CALLS = 64  # kept one by one, before they are joined


class TokenHistory:
    """Inputs of every call of a decoder: tokens, their positions and the attention mask.

    Args:
        axes: Input of the merged decoder -> its axes.
    """

    def __init__(self, axes: Mapping[str, Sequence[Any]]) -> None:
        self._new = [name for name, each in axes.items() if list(each[1:2]) == [NEW]]
        self._total = [name for name, each in axes.items() if list(each[1:2]) == [TOTAL]]
        self._calls: list[dict[str, Tensor] | Tensor] = []  # new inputs, or the rows that are continued
        self._whole: dict[str, Tensor] = {}  # those of all tokens

    def append(self, inputs: Mapping[str, Tensor]) -> None:
        """Note the inputs of a call.

        Args:
            inputs: All of them; or one id for each sequence, which is at the next position and not hidden.
        """
        self._calls.append({name: inputs[name].clone() for name in self._new if name in inputs})
        self._whole |= {name: inputs[name] for name in self._total if name in inputs}
        if len(self._calls) > MAX_CALLS:
            self._calls = [self._joined()]

    def reorder(self, index: Tensor) -> None:
        """Continue every row i from row `index[i]`, a beam of the same input."""
        self._calls.append(index.clone())

    def select(self, index: Tensor) -> None:
        """Continue with the rows `index` of any input."""
        self._calls.append(index.clone())
        self._whole = {name: tensor.index_select(0, index.to(tensor.device)) for name, tensor in self._whole.items()}

    def crop(self, length: int) -> None:
        """Drop all but the first `length` tokens."""
        inputs = {name: tensor[:, :length] for name, tensor in self.inputs().items()}
        self._calls = [{name: inputs[name] for name in inputs if name in self._new}]
        self._whole = {name: inputs[name] for name in inputs if name in self._total}

    def inputs(self) -> dict[str, Tensor]:
        """Return the inputs of one call for all tokens."""
        joined = self._joined()
        tokens = joined[IDS].shape[1]
        return joined | {name: pad(mask, (0, tokens - mask.shape[1]), value=1) for name, mask in self._whole.items()}

    def copy(self) -> "TokenHistory":
        """Return an independent copy."""
        copy = TokenHistory({})
        copy._new, copy._total, copy._calls, copy._whole = self._new, self._total, list(self._calls), dict(self._whole)
        return copy

    def _joined(self) -> dict[str, Tensor]:
        """Return the new inputs of all calls, of the rows that are continued."""
        joined: dict[str, Tensor] = {}
        for call in self._calls:
            if isinstance(call, Tensor):
                joined = {name: tensor.index_select(0, call.to(tensor.device)) for name, tensor in joined.items()}
            elif joined:
                following = {name: joined[name][:, -1:] + 1 for name in joined if name not in call}  # positions
                joined = {name: torch.cat([joined[name], (following | call)[name]], 1) for name in joined}
            else:
                joined = call
        return joined
