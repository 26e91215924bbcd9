"""Prefill of a row's prompt, a part at a time, so that the rows beside it don't wait for all of a long prompt."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from accel.models.prompt_cache import PromptCache
from accel.runtime.chunked_prefill import chunk_inputs
from accel.runtime.decoder_inputs import kept_logits_inputs
from accel.runtime.dynamic_cache import DynamicCacheState
from accel.runtime.layout import IDS
from accel.runtime.static_state import StaticCacheState

if TYPE_CHECKING:
    from accel.models.rows import Rows


class RowPrefill:
    """Prefill that `Rows.begin` has begun. What the row held stays until its last part is computed.

    Args:
        rows: The rows.
        row: A claimed row.
        inputs: The decoder's inputs for the whole prompt of one sequence.
        state: Caches of the tokens that the prompt begins with, if there are some.

    Attributes:
        row: The row.
        computed: Number of the prompt's tokens in caches.
    """

    def __init__(
        self, rows: "Rows", row: int, inputs: Mapping[str, Tensor], state: DynamicCacheState | None = None
    ) -> None:
        self._rows, self.row, self._inputs, self._state = rows, row, inputs, state
        self.computed = 0 if state is None else state.length

    @property
    def remaining(self) -> int:
        """Number of the prompt's tokens that are still to be computed."""
        return self._inputs[IDS].shape[1] - self.computed

    def advance(self, tokens: int | None = None) -> Tensor | None:
        """Compute the next tokens of the prompt.

        Args:
            tokens: Number of tokens; None for all that remain.

        Returns:
            Logits of the first new token, [vocabulary], once the row is prefilled; None before.

        Raises:
            ValueError: The row isn't claimed, the prefill is complete, `tokens` is less than 1, or a constant is too
                long for the row.
            DeviceMemoryError: The device is out of memory. The other rows are as before.
            RuntimeError: The rows or the model are closed.
        """
        rows = self._rows
        rows.check_claimed(self.row)
        if not self.remaining:
            raise ValueError(f"the prefill of row {self.row} is complete")
        if tokens is not None and tokens < 1:
            raise ValueError(f"tokens={tokens}: expected at least 1")
        dynamic = rows.runtime.dynamic
        end = self.computed + min(self.remaining, tokens or self.remaining)
        with rows.model.call():
            part = chunk_inputs(dynamic, self._inputs, self.computed, end, 0)
            part |= kept_logits_inputs(end - self.computed, 1, dynamic.device)
            if self._state is None:
                logits, self._state = dynamic.prefill(part)
            else:
                logits = dynamic.decode(part, self._state)
            self.computed = end
            if self.remaining:
                return None
            rows.cache.fill([self.row], self._state, self._inputs)
            self._state = None
        return logits[0, -1]

    def snapshot(self) -> PromptCache:
        """Return a prompt cache of the tokens computed so far, at least one of them and not all.

        Raises:
            ValueError: No token is computed yet, or the prefill is complete.
        """
        if self._state is None:
            raise ValueError("a snapshot needs a prefill that has begun and is not complete")
        with self._rows.model.call():
            state = StaticCacheState(self._rows.runtime, self._state.copy())
        return PromptCache(state, self._inputs[IDS][:, : self.computed].clone())
