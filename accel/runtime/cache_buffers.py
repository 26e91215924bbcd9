"""Dynamic caches with spare room, which decode steps extend in place instead of copying them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from accel.runtime.cache_views import CacheViews
from accel.runtime.device_memory import translate_out_of_memory
from accel.runtime.io_binding import BoundSession
from accel.runtime.layout import NUM_KEPT

LOGITS = "logits"
SPARE_TOKENS = 64  # room for more tokens, at least
SPARE_SHARE = 4  # and at least this part of the tokens: 1 / SPARE_SHARE


class CacheBuffers:
    """Self-attention caches of one batch in buffers that are longer than their content, bound to a session.

    For graphs whose attention finds the number of cached tokens elsewhere than in the caches' shape, and writes new
    entries behind them where it is given the same memory for the past and the present caches, as ONNX Runtime's
    `GroupQueryAttention` does.

    Args:
        session: Session of the decoder.
        caches: Cache input -> its content, [batch, heads, length, head_size]. Emptied, so that each is freed as soon as
            it is copied.
        outputs: Cache input -> the output that extends it.
        axes: Cache input -> its token axis.
        new: Number of tokens of the next decode step.
    """

    def __init__(
        self,
        session: BoundSession,
        caches: dict[str, Tensor],
        outputs: Mapping[str, str],
        axes: Mapping[str, int],
        new: int,
    ) -> None:
        self._session, self._axes = session, axes
        name, first = next(iter(caches.items()))
        self.length, self.batch = first.shape[axes[name]], first.shape[0]
        self.capacity = self.length + max(new + SPARE_TOKENS, self.length // SPARE_SHARE)
        self._buffers: dict[str, Tensor] = {}
        self._binding = session.session.io_binding()
        del first
        for name in list(caches):
            tensor = caches.pop(name)
            shape = list(tensor.shape)
            shape[axes[name]] = self.capacity
            self._buffers[name] = buffer = torch.empty(shape, dtype=tensor.dtype)
            buffer.narrow(axes[name], 0, self.length).copy_(tensor)
            self._binding.bind_input(name, *session.binding_arguments(name, buffer))
            self._binding.bind_output(outputs[name], *session.binding_arguments(outputs[name], buffer))

    def read(self) -> CacheViews:
        """Return views of the caches without their spare room, [batch, heads, length, head_size]."""
        length = self.length
        return CacheViews(self._buffers, lambda name: self._buffers[name].narrow(self._axes[name], 0, length))

    def reorder(self, index: Tensor) -> None:
        """Replace every sequence i by sequence `index[i]`; index: [batch]. Copies those that change."""
        changed = (index != torch.arange(len(index))).nonzero().flatten()
        if len(changed):
            for cache in self.read().values():
                cache[changed] = cache[index[changed]]

    def decode(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Run the decoder over new tokens, for which there must be room, and append them to the caches.

        Args:
            inputs: Every input besides the caches, of any dtype and layout. Names that the graph doesn't take are
                ignored.

        Returns:
            Logits [batch, kept, vocabulary].
        """
        placed = []  # bound by address, so they must be kept alive
        for name in self._session.inputs:
            if name in self._buffers or (name in self._session.optional and name not in inputs):
                continue
            tensor = self._session.place(name, inputs[name])
            self._binding.bind_input(name, *self._session.binding_arguments(name, tensor))
            placed.append(tensor)
        new = inputs["input_ids"].shape[1]
        kept = min(int(inputs.get(NUM_KEPT, 0)), new) or new
        vocabulary = self._session.outputs[LOGITS].shape[-1]
        logits = torch.empty(self.batch, kept, vocabulary, dtype=self._session.dtype(LOGITS))
        self._binding.bind_output(LOGITS, *self._session.binding_arguments(LOGITS, logits))
        with translate_out_of_memory():
            self._session.session.run_with_iobinding(self._binding, self._session.options)
        self.length += new
        return logits
