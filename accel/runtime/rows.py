"""Rows of static caches, each with a sequence of its own at a position of its own, for continuous batching.

Iteration-level scheduling, as in Orca: https://www.usenix.org/conference/osdi22/presentation/yu
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from accel.runtime.decode_buffers import DecodeBuffers
from accel.runtime.dynamic_cache import DynamicCacheState
from accel.runtime.layout import IDS, MASK, POSITION, POSITION_IDS
from accel.runtime.padding import Padding

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
        self.clear(range(buffers.batch))

    def fill(
        self,
        rows: Sequence[int],
        state: DynamicCacheState,
        inputs: Mapping[str, Tensor],
        padding: Sequence[int] | None = None,
    ) -> None:
        """Continue the sequences of a state in rows.

        Args:
            rows: A row for each sequence. What it held is lost.
            state: Caches and constants of at most `bucket` tokens.
            inputs: The decoder's inputs that the state was computed from. Masks that are on the host are read there,
                without waiting for the device.
            padding: Number of first tokens of each sequence that are padding; they take no room. None for none.

        Raises:
            ValueError: A constant is longer than the rows' ones, or shorter along an axis that isn't masked. The rows
                are as before.
        """
        for name, tensor in state.constants.items():
            self._check_constant(name, tensor)
        length, buffers = state.length, self._buffers
        counts = [length - skipped for skipped in padding or [0] * len(rows)]
        self.clear(rows)
        index, tokens = self._place([rows, counts])
        skipped = length - tokens if padding else None
        buffers.write_rows(index, state.self_caches, length, skipped)
        buffers.copy_constants(index, state.constants)
        self._filled.index_fill_(0, index, 1)
        buffers.inputs[POSITION].index_copy_(0, index, tokens)
        if MASK in inputs:
            self._write_mask(index, inputs[MASK].to(index.device, non_blocking=True), skipped)
        self.lengths.update(zip(rows, counts, strict=True))
        self.source_lengths.update(zip(rows, self._source_lengths(inputs, len(rows)), strict=True))

    def begin(self, rows: Sequence[int], inputs: Mapping[str, Tensor]) -> None:
        """Begin sequences without tokens in rows, beside an encoder; the next step decodes their first ones.

        The cross-attention caches of all rows are computed again, by the graph that computes them from the encoder's
        outputs.

        Args:
            rows: A row for each sequence. What it held is lost.
            inputs: The decoder's inputs: the encoder's outputs and their mask.

        Raises:
            ValueError: As `fill`.
        """
        constants, buffers = self._runtime.dynamic.place_constants(inputs), self._buffers
        for name, tensor in constants.items():
            self._check_constant(name, tensor)
        self.clear(rows)
        (index,) = self._place([list(rows)])
        buffers.clear_rows(index)
        buffers.copy_constants(index, constants)
        buffers.compute_cross_caches()
        self._filled.index_fill_(0, index, 1)
        self.lengths.update(dict.fromkeys(rows, 0))
        self.source_lengths.update(zip(rows, self._source_lengths(inputs, len(rows)), strict=True))

    def _write_mask(self, rows: Tensor, mask: Tensor, padding: Tensor | None) -> None:
        """Write attention masks [rows, tokens] without their padding, and the positions of the next tokens."""
        inputs, tokens = self._buffers.inputs, mask.shape[1]
        if POSITION_IDS in inputs:
            inputs[POSITION_IDS].index_copy_(0, rows, mask.sum(1, keepdim=True))
        if MASK not in inputs:
            return
        if padding is not None:
            taken = torch.arange(tokens, device=mask.device) + padding[:, None]
            mask = mask.gather(1, taken.clamp(max=tokens - 1)).masked_fill(taken >= tokens, 0)
        inputs[MASK].index_fill_(0, rows, 0)
        inputs[MASK][:, :tokens].index_copy_(0, rows, mask.to(inputs[MASK].dtype))

    def _place(self, numbers: Sequence[Sequence[int]]) -> Tensor:
        """Return numbers as a tensor on the device, which isn't waited for."""
        return torch.tensor(numbers).to(self._runtime.device, non_blocking=True)

    def _source_lengths(self, inputs: Mapping[str, Tensor], rows: int) -> list[int]:
        """Return the number of source tokens of each row up to the last one that its mask shows; 0 without a mask."""
        lengths = [0] * rows
        for name, axes in self._padding.axes.items():
            if name in inputs and axes[1:] and name.endswith("mask"):
                mask = inputs[name] != 0
                last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1).tolist()
                lengths = [max(pair) for pair in zip(lengths, last, strict=True)]
        return lengths

    def take_over(self, other: "CacheRows", rows: Mapping[int, int]) -> None:
        """Continue sequences of other rows, whose buffers may have other lengths.

        Args:
            other: The other rows. They stay as they are.
            rows: Filled row of `other` -> row here. Its tokens and its constants must fit.
        """
        if not rows:
            return
        buffers, theirs = self._buffers, other._buffers
        old, new = self._place([list(rows), list(rows.values())])
        longest = max(other.lengths[row] for row in rows)
        buffers.copy_rows(new, theirs, old, longest)
        buffers.copy_constants(new, theirs.constants, old)
        for name in (POSITION, POSITION_IDS):
            if name in buffers.inputs:
                buffers.inputs[name].index_copy_(0, new, theirs.inputs[name].index_select(0, old))
        if MASK in buffers.inputs:
            buffers.inputs[MASK][:, :longest].index_copy_(0, new, theirs.inputs[MASK][:, :longest].index_select(0, old))
        self._filled.index_fill_(0, new, 1)
        for row, target in rows.items():
            self.lengths[target], self.source_lengths[target] = other.lengths[row], other.source_lengths[row]

    def _check_constant(self, name: str, tensor: Tensor) -> None:
        """Raise `ValueError` if a constant [1, ...] of one sequence has no place in a row."""
        lengths = zip(self._padding.axes[name], tensor.shape, self._buffers.constants[name].shape, strict=True)
        for axis, length, room in list(lengths)[1:]:
            if length > room or (length < room and axis not in self._padding.masked):
                raise ValueError(
                    f"{name} has length {length} along its axis {axis!r}, and in these rows {room}: "
                    f"open rows with source_length={length}"
                )

    def clear(self, rows: Sequence[int]) -> None:
        """Make rows idle."""
        inputs = self._buffers.inputs
        for row in rows:
            self.lengths.pop(row, None)
            self.source_lengths.pop(row, None)
        (index,) = self._place([list(rows)])
        for tensor in (self._filled, *(inputs[name] for name in (POSITION, MASK, POSITION_IDS) if name in inputs)):
            tensor.index_fill_(0, index, 0)
        if MASK in inputs:
            inputs[MASK][:, 0].index_fill_(0, index, 1)

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
