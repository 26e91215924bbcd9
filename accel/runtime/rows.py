"""Rows of static caches, each with a sequence of its own at a position of its own, for continuous batching.

Iteration-level scheduling, as in Orca: https://www.usenix.org/conference/osdi22/presentation/yu
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from accel.runtime.decode_buffers import DecodeBuffers
from accel.runtime.dynamic_cache import DynamicCacheState
from accel.runtime.layout import IDS, MASK, POSITION, POSITION_IDS
from accel.runtime.padding import Padding, copy_padded, leading_view

if TYPE_CHECKING:
    from accel.runtime.static_cache import StaticCacheRuntime


class CacheRows:
    """Decode buffers whose rows are filled, advanced and cleared one by one.

    An idle row is computed with the others: it writes the entry 0 of its own caches and attends to that alone.

    Args:
        runtime: Runtime that the buffers are returned to.
        buffers: Decode buffers of as many rows as there may be sequences at once.
        padding: Tells which axes of the constants are masked.

    Attributes:
        bucket: Largest number of tokens in a row.
        lengths: Tokens in each filled row.
        source_lengths: Source tokens of each filled row, up to the last one that its mask shows; 0 without a mask.
    """

    def __init__(self, runtime: "StaticCacheRuntime", buffers: DecodeBuffers, padding: Padding) -> None:
        self._runtime, self._buffers, self._padding = runtime, buffers, padding
        self.bucket = buffers.bucket
        self.lengths: dict[int, int] = {}
        self.source_lengths: dict[int, int] = {}
        self._filled = torch.zeros(buffers.batch, dtype=torch.int64, device=runtime.device)  # 1 where a row is filled
        buffers.reset({})
        for name, tensor in buffers.constants.items():
            tensor.fill_(name.endswith("mask"))  # a softmax over no entry at all would be NaN
        for tensor in buffers.inputs.values():
            tensor.zero_()
        for row in range(buffers.batch):
            self.clear(row)

    def fill(self, row: int, state: DynamicCacheState, mask: Tensor | None = None, sequence: int = 0) -> None:
        """Continue a sequence in a row.

        Args:
            row: The row. What it held is lost.
            state: Caches and constants of at most `bucket` tokens.
            mask: Attention mask of its tokens, [batch, length], where the graph takes one.
            sequence: Index of the sequence in `state` and `mask`.

        Raises:
            ValueError: A constant is longer than the rows' ones, or shorter along an axis that isn't masked. The row
                is as before.
        """
        for name, tensor in state.constants.items():
            self._check_constant(name, tensor)
        length, inputs = state.length, self._buffers.inputs
        self.clear(row)
        caches = {name: tensor[sequence : sequence + 1] for name, tensor in state.self_caches.items()}
        self._buffers.write_row(row, caches, length)
        for name, tensor in state.constants.items():
            copy_padded(self._buffers.constants[name][row], tensor[sequence])
        inputs[POSITION][row] = length
        if mask is not None and MASK in inputs:
            inputs[MASK][row, :length] = mask[sequence]
        if mask is not None and POSITION_IDS in inputs:
            inputs[POSITION_IDS][row] = mask[sequence].sum()
        self._filled[row] = 1
        self.lengths[row] = length
        self.source_lengths[row] = self._source_length(state.constants, sequence)

    def _source_length(self, constants: Mapping[str, Tensor], sequence: int) -> int:
        """Return the number of source tokens up to the last one that the mask of a sequence shows; 0 without a mask."""
        masks = (constants[name] for name, axes in self._padding.axes.items() if axes[1:] and name.endswith("mask"))
        return max((int(mask[sequence].nonzero().max()) + 1 for mask in masks), default=0)

    def take_over(self, other: "CacheRows", rows: Mapping[int, int]) -> None:
        """Continue sequences of other rows, whose buffers may have other lengths.

        Args:
            other: The other rows. They stay as they are.
            rows: Filled row of `other` -> row here. Its tokens and its constants must fit.
        """
        inputs, theirs = self._buffers.inputs, other._buffers.inputs
        for old, new in rows.items():
            length = other.lengths[old]
            self.clear(new)
            self._buffers.copy_row(new, other._buffers, old, length)
            for name, tensor in other._buffers.constants.items():
                target = self._buffers.constants[name][new]
                common = tuple(min(sizes) for sizes in zip(target.shape, tensor.shape[1:], strict=True))
                copy_padded(target, leading_view(tensor[old], common))
            for name in (POSITION, POSITION_IDS):
                if name in inputs:
                    inputs[name][new] = theirs[name][old]
            if MASK in inputs:
                inputs[MASK][new, :length] = theirs[MASK][old, :length]
            self._filled[new] = 1
            self.lengths[new], self.source_lengths[new] = length, other.source_lengths[old]

    def _check_constant(self, name: str, tensor: Tensor) -> None:
        """Raise `ValueError` if a constant [1, ...] of one sequence has no place in a row."""
        lengths = zip(self._padding.axes[name], tensor.shape, self._buffers.constants[name].shape, strict=True)
        for axis, length, room in list(lengths)[1:]:
            if length > room or (length < room and axis not in self._padding.masked):
                raise ValueError(
                    f"{name} has length {length} along its axis {axis!r}, and in these rows {room}: "
                    f"open rows with source_length={length}"
                )

    def clear(self, row: int) -> None:
        """Make a row idle."""
        inputs = self._buffers.inputs
        self.lengths.pop(row, None)
        self.source_lengths.pop(row, None)
        self._filled[row] = 0
        inputs[POSITION][row] = 0
        if MASK in inputs:
            inputs[MASK][row] = 0
            inputs[MASK][row, 0] = 1
        if POSITION_IDS in inputs:
            inputs[POSITION_IDS][row] = 0

    def step(self, tokens: Tensor) -> Tensor:
        """Decode one token in each filled row.

        Args:
            tokens: int64 [rows]. Those of idle rows are ignored.

        Returns:
            Logits [rows, vocabulary].
        """
        inputs, filled = self._buffers.inputs, self._filled
        inputs[IDS][:, 0] = tokens * filled
        if MASK in inputs:
            inputs[MASK].scatter_(1, inputs[POSITION][:, None], 1)
        logits = self._buffers.run()[:, 0].clone()
        inputs[POSITION] += filled
        if POSITION_IDS in inputs:
            inputs[POSITION_IDS] += filled[:, None]
        for row in self.lengths:
            self.lengths[row] += 1
        return logits

    def close(self) -> None:
        """Return the buffers to the runtime. A reference to them would keep the mapped files of the weights open."""
        self._runtime.release(self._buffers)
        self.lengths.clear()
        del self._buffers, self._filled
