"""KV caches of one generation that decode steps of one token write in place."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from accel.runtime.cache_views import CacheViews
from accel.runtime.decode_buffers import DecodeBuffers
from accel.runtime.dynamic_cache import DynamicCacheState
from accel.runtime.padding import Shape, leading_view, shapes

if TYPE_CHECKING:
    from accel.runtime.static_cache import StaticCacheRuntime


class StaticCacheState:
    """KV caches of one generation. Implements `protocol.State`.

    Decode steps of one token need decode buffers, whose static caches they write in place. Before the first of them,
    after a step of several tokens, and where no static cache is long enough, the caches are dynamic.

    Static cache entries from `length` on are masked; they are overwritten by later tokens.

    Args:
        runtime: Runtime that the buffers are returned to when they are no longer needed.
        dynamic: The caches; None if `buffers` hold them.
        buffers: Decode buffers without tokens.
        constants: Input that stays the same for the whole generation -> its unpadded shape in `buffers`.

    Attributes:
        dynamic: The caches while they are dynamic, else None.
        buffers: The decode buffers otherwise.
    """

    def __init__(
        self,
        runtime: "StaticCacheRuntime",
        dynamic: DynamicCacheState | None = None,
        buffers: DecodeBuffers | None = None,
        constants: Mapping[str, Shape] | None = None,
    ) -> None:
        self.runtime, self.dynamic, self.buffers = runtime, dynamic, buffers
        self._constant_shapes = dict(constants or {})
        self._length = 0

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
        if self.dynamic is not None:
            self.dynamic.reorder(index)
        else:
            self._static.reorder(index.to(self.runtime.device), self._length)

    def crop(self, length: int) -> None:
        """Drop all but the first `length` decoder tokens."""
        if self.dynamic is not None:
            self.dynamic.crop(length)
        else:
            self._length = length
            self._static.ancestry.reset(length)

    def expand(self, times: int) -> None:
        """Repeat every sequence `times` times: [batch, ...] -> [batch * times, ...]."""
        self.select(torch.arange(self.batch).repeat_interleave(times))

    def select(self, index: Tensor) -> None:
        """Continue with the sequences `index` [new batch] of any input."""
        self.make_dynamic().select(index)

    def copy(self) -> "StaticCacheState":
        """Return an independent state with the same tokens."""
        dynamic = self._contiguous() if self.dynamic is None else self.dynamic.copy()
        return StaticCacheState(self.runtime, dynamic)

    def __deepcopy__(self, memo: object) -> "StaticCacheState":
        return self.copy()

    def views(self) -> Mapping[str, Tensor]:
        """Return all caches by input name, self-attention caches first."""
        dynamic = self.dynamic or self._view()
        return dynamic.views()

    def _view(self) -> DynamicCacheState:
        """Return views of the static caches, and of the constants without their padding."""
        buffers, lengths = self._static, self._constant_shapes
        constants = CacheViews(lengths, lambda name: leading_view(buffers.constants[name], lengths[name]))
        return DynamicCacheState(buffers.read(self._length), constants, buffers.axes, self.runtime.cross_caches)

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

        Raises:
            AccelError: The batch size isn't one of `capture_batch_sizes`.
        """
        if self.dynamic is None and length <= self._static.bucket:
            return self._static
        caches = self._view() if self.dynamic is None else self.dynamic
        buffers = self.runtime.copy_to_buffers(caches, length)
        if buffers is None:
            self.make_dynamic()
            return None
        tokens = caches.length
        if self.dynamic is None:
            buffers.ancestry.copy_from(self._static.ancestry, tokens)
        self._release()
        self._constant_shapes = shapes(caches.constants)
        self.buffers, self.dynamic, self._length = buffers, None, tokens
        return buffers

    def advance(self) -> None:
        """Count the token that a decode step has written into the static caches."""
        self._length += 1

    def _release(self) -> None:
        """Return the buffers to the runtime."""
        if self.buffers is not None:
            self.runtime.release(self.buffers)
            self.buffers = None
