"""KV caches of one generation that decode steps of one token write in place."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from accel.errors import AccelError
from accel.runtime.cache_views import CacheViews
from accel.runtime.decode_buffers import DecodeBuffers
from accel.runtime.decoder_inputs import kept_logits_inputs
from accel.runtime.dynamic_cache import DynamicCacheState
from accel.runtime.layout import IDS
from accel.runtime.padding import Shape, leading_view, shapes
from accel.runtime.protocol import Selection
from accel.runtime.ring_cache import HeldEntries
from accel.runtime.token_history import TokenHistory

if TYPE_CHECKING:
    from accel.runtime.static_cache import StaticCacheRuntime


class StaticCacheState:
    """KV caches of one generation. Implements `protocol.State`.

    Decode steps of one token need decode buffers, whose static caches they write in place. Before the first of them,
    after a step of several tokens, and where no static cache is long enough, the caches are dynamic.

    Static cache entries from `length` on are masked; they are overwritten by later tokens. Layers with a sliding window
    keep some entries more than the window; where `crop` goes behind them, all caches are computed again.

    Args:
        runtime: Runtime that the buffers are returned to when they are no longer needed.
        dynamic: The caches; None if `buffers` hold them.
        buffers: Decode buffers without tokens.
        constants: Input that stays the same for the whole generation -> its unpadded shape in `buffers`.
        history: Inputs from which the caches can be computed again; None if that isn't needed, or they aren't known.

    Attributes:
        dynamic: The caches while they are dynamic, else None.
        buffers: The decode buffers otherwise.
        fits_tables: See `StaticCacheRuntime.fits_tables`; of the tokens given last.
    """

    def __init__(
        self,
        runtime: "StaticCacheRuntime",
        dynamic: DynamicCacheState | None = None,
        buffers: DecodeBuffers | None = None,
        constants: Mapping[str, Shape] | None = None,
        history: TokenHistory | None = None,
    ) -> None:
        self.runtime, self.dynamic, self.buffers = runtime, dynamic, buffers
        self._constant_shapes = dict(constants or {})
        self._length = self._reserved = 0
        self.fits_tables = True
        self._held = HeldEntries(runtime.windows)
        self._history = history

    def __del__(self) -> None:
        self._release()

    @property
    def length(self) -> int:
        """Number of decoder tokens in the caches."""
        return self._length if self.dynamic is None else self.dynamic.length

    @property
    def batch(self) -> int:
        """Number of sequences, beams counted."""
        return self._static.batch if self.dynamic is None else self.dynamic.batch

    @property
    def _static(self) -> DecodeBuffers:
        """The decode buffers, where the caches are static."""
        if self.buffers is None:
            raise RuntimeError("the caches are dynamic")
        return self.buffers

    def reorder(self, index: Tensor) -> None:
        """Continue every sequence i from sequence `index[i]`, a beam of the same input."""
        if self._history is not None:
            self._history.reorder(index)
        if self.dynamic is not None:
            self.dynamic.reorder(index)
        else:
            self._static.reorder(index.to(self.runtime.device), self._length)

    def crop(self, length: int) -> None:
        """Drop all but the first `length` decoder tokens.

        Raises:
            AccelError: Layers with a sliding window have dropped entries that are needed again, and the tokens they
                belong to aren't known, since the caches were computed elsewhere.
        """
        if self._history is not None:
            self._history.crop(length)
        if not self._held.suffice(length):
            self._compute_again(length)
        elif self.dynamic is not None:
            self.dynamic.crop(length)
        else:
            self._length = length
            self._static.ancestry.reset(length)

    def reserve(self, tokens: int) -> None:
        """Let the next static caches have room for `tokens` tokens, where a long cache costs no time."""
        self._reserved = tokens

    def expand(self, times: int) -> None:
        """Repeat every sequence `times` times: [batch, ...] -> [batch * times, ...]."""
        self.select(torch.arange(self.batch).repeat_interleave(times))

    def select(self, index: Tensor) -> None:
        """Continue with the sequences `index` [new batch] of any input."""
        if self._history is not None:
            self._history.select(index)
        self.make_dynamic().select(index)

    def copy(self) -> "StaticCacheState":
        """Return an independent state with the same tokens."""
        dynamic = self._contiguous() if self.dynamic is None else self.dynamic.copy()
        copy = StaticCacheState(self.runtime, dynamic, history=self._history and self._history.copy())
        copy._held = self._held.copy()
        return copy

    def __deepcopy__(self, memo: object) -> "StaticCacheState":
        return self.copy()

    def views(self) -> Mapping[str, Tensor]:
        """Return all caches by input name, self-attention caches first."""
        dynamic = self.dynamic or self._view()
        return dynamic.views()

    def _view(self) -> DynamicCacheState:
        """Return views of the static caches, and of the constants without their padding."""
        buffers = self._static
        return DynamicCacheState(buffers.read(self._length), self._constants(), buffers.axes, self.runtime.cross_caches)

    def _constants(self) -> Mapping[str, Tensor]:
        """Return the constants, without their padding."""
        if self.dynamic is not None:
            return self.dynamic.constants
        buffers, lengths = self._static, self._constant_shapes
        return CacheViews(lengths, lambda name: leading_view(buffers.constants[name], lengths[name]))

    def _contiguous(self) -> DynamicCacheState:
        """Return contiguous copies of the static caches and constants."""
        view = self._view()
        self_caches = {name: tensor.clone() for name, tensor in view.self_caches.items()}
        constants = {name: tensor.clone() for name, tensor in view.constants.items()}
        return DynamicCacheState(self_caches, constants, view.axes, view.cross_caches)

    def make_dynamic(self) -> DynamicCacheState:
        """Make the caches dynamic, if they aren't, and return them."""
        if self.dynamic is None:
            self.dynamic = self._contiguous()
            self._release()
        return self.dynamic

    def make_static(self, length: int) -> DecodeBuffers | None:
        """Make the caches static, with room for `length` tokens. Return the buffers; None if there is no such room.

        A larger bucket takes the caches over as they are.

        Raises:
            AccelError: The batch size isn't one of `capture_batch_sizes`.
        """
        if self.dynamic is None and length <= self._static.bucket:
            return self._static
        constants = self._constants()
        buffers = self.runtime.take_room(self.batch, length, self._reserved, shapes(constants))
        if buffers is None:
            self.make_dynamic()
            return None
        tokens = self.length
        buffers.reset(constants)
        if self.dynamic is None:
            buffers.take_over(self._static, tokens)
        else:
            buffers.write(self.dynamic.self_caches, tokens)
        self._release()
        self._constant_shapes = shapes(constants)
        self.buffers, self.dynamic, self._length = buffers, None, tokens
        self._held.write(tokens, buffers.bucket)
        return buffers

    def note(self, inputs: Mapping[str, Tensor]) -> None:
        """Note the inputs of a call of the decoder."""
        if self._history is not None:
            self._history.append(inputs)

    def note_selected(self, selection: Selection) -> None:
        """Note the ids of a decode step that are selected on the device, and the sequences that they continue."""
        if self._history is not None:
            if selection.parents is not None:
                self._history.reorder(selection.parents)
            self._history.append({IDS: selection.next_ids})

    def _compute_again(self, length: int) -> None:
        """Compute the caches of the first `length` tokens, which `_history` ends with."""
        if self._history is None:
            raise AccelError(
                f"the caches can't be cropped to {length} of {self.length} tokens: layers with a sliding window of "
                f"{min(self.runtime.windows.values())} tokens have dropped what they need again, and the tokens of "
                "past_key_values are not known. Crop before tokens are generated, or begin with the whole prompt"
            )
        constants = self._constants()
        given = {name: tensor.clone() for name, tensor in constants.items() if name not in self.runtime.cross_caches}
        last = kept_logits_inputs(length, 1, self.runtime.device)
        _, self.dynamic = self.runtime.dynamic.prefill(self._history.inputs() | given | last)
        self._held = HeldEntries(self.runtime.windows)
        self._release()

    def advance(self) -> None:
        """Count the token that a decode step has written into the static caches."""
        self._length += 1
        self._held.write(self._length, self._static.bucket)

    def _release(self) -> None:
        """Return the buffers to the runtime."""
        if self.buffers is not None:
            self.runtime.release(self.buffers)
            self.buffers = None
