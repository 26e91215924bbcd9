"""ONNX Runtime with caches of a fixed length, a bucket's, which a step writes in place.

From token to token nothing is allocated, and every tensor keeps its address. What is no step of one token (a prefill,
several new tokens at once) the decoder with a growing cache does, and its new entries are copied.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from accel.errors import AccelError
from accel.runtime.binding import BoundSession, FixedCall
from accel.runtime.layout import BUCKET, DECODER, POSITION, STATIC_STEP
from accel.runtime.onnx import GrowingRuntime, GrowingState, open_growing
from accel.runtime.session import SessionSettings, open_session
from accel.runtime.weights import SharedWeights

LOGITS = "logits"


class Slot:
    """All that a step of one token reads and writes, at addresses that stay."""

    def __init__(self, step: BoundSession, state: GrowingState, outputs: Mapping[str, str], bucket: int) -> None:
        """Room for `bucket` tokens of the sequences of `state`, which is copied. `outputs`: cache input -> output."""
        lengths = {"batch": state.batch, "new": 1, "kept": 1, BUCKET: bucket}

        def room(name: str, *count: int) -> Tensor:
            port = (step.inputs | step.outputs)[name]
            shape = [lengths[dim] if isinstance(dim, str) else dim for dim in port.shape]
            return torch.zeros((*count, *shape), dtype=step.dtype(name), device=step.device)

        def kind(name: str) -> tuple[object, ...]:
            return (step.dtype(name), *step.inputs[name].shape)

        self.bucket, self.axes = bucket, state.axes
        self.own: dict[str, Tensor] = {}
        self.stacks: list[tuple[Tensor, int]] = []  # caches of one shape in one tensor, and the axis of their tokens
        for _, group in groupby(sorted(state.own, key=lambda name: str(kind(name))), kind):
            names = list(group)
            stack = room(names[0], len(names))
            self.stacks.append((stack, state.axes[names[0]] + 1))
            self.own |= dict(zip(names, stack, strict=True))
        self.fixed = {name: step.place(name, tensor) for name, tensor in state.fixed.items() if name in step.inputs}
        self.given = {name: room(name) for name in step.inputs if name not in self.own and name not in self.fixed}
        self.logits = room(LOGITS)
        self.write(state.own, 0, state.length)
        written = {outputs[name]: tensor for name, tensor in self.own.items()}
        self.run = FixedCall(step, self.own | self.fixed | self.given, written | {LOGITS: self.logits})

    def write(self, caches: Mapping[str, Tensor], start: int, length: int) -> None:
        """Copy the entries `start` to `start + length` of `caches`."""
        for name, axis in self.axes.items():
            self.own[name].narrow(axis, start, length).copy_(caches[name].narrow(axis, start, length))

    def read(self, length: int) -> dict[str, Tensor]:
        """The first `length` entries, in place."""
        return {name: self.own[name].narrow(axis, 0, length) for name, axis in self.axes.items()}

    def reorder(self, index: Tensor, length: int) -> None:
        """Let sequence i hold the first `length` entries of what was sequence `index[i]`."""
        for stack, axis in self.stacks:
            held = stack.narrow(axis, 0, length)
            held.copy_(held.index_select(1, index))

    def give(self, feeds: Mapping[str, Tensor], length: int) -> None:
        """Put what changes with each token where the session reads it."""
        for name, tensor in self.given.items():
            if name == POSITION:
                tensor.fill_(length)
            elif tensor.shape == feeds[name].shape:
                tensor.copy_(feeds[name])
            else:  # a mask over the tokens there are: 0 for the room behind them
                tensor.zero_()
                tensor[:, : feeds[name].shape[1]].copy_(feeds[name])


class StaticState:
    """Caches in a slot, and how many tokens they hold. What is forgotten stays, masked, until it is written over."""

    def __init__(self, runtime: "StaticRuntime", grown: GrowingState) -> None:
        self.runtime, self.length = runtime, grown.length
        self.fixed, self.made = grown.fixed, grown.made
        self.slot = runtime.slot(grown, grown.length)

    @property
    def batch(self) -> int:
        return self.slot.logits.shape[0]

    def reorder(self, index: Tensor) -> None:
        self.slot.reorder(index.to(self.slot.logits.device), self.length)

    def crop(self, length: int) -> None:
        self.length = length

    def expand(self, times: int) -> None:
        self.select(torch.arange(self.batch).repeat_interleave(times))

    def select(self, index: Tensor) -> None:
        grown = self.grown()
        grown.select(index)
        self.fixed = grown.fixed
        self.slot = self.runtime.slot(grown, self.length)

    def views(self) -> Mapping[str, Tensor]:
        return self.slot.read(self.length) | {name: self.fixed[name] for name in self.made}

    def grown(self) -> GrowingState:
        """The same caches, each a tensor of its own length."""
        own = {name: tensor.contiguous() for name, tensor in self.slot.read(self.length).items()}
        return GrowingState(own, self.fixed, self.slot.axes, self.made)

    def make_room(self, length: int) -> None:
        """Move to a larger bucket if `length` tokens don't fit into this one."""
        if length > self.slot.bucket:
            self.slot = self.runtime.slot(replace(self.grown(), own=self.slot.read(self.length)), length)


class StaticRuntime:
    """Steps of one token over caches of fixed length; all else over `whole`, the merged decoder."""

    def __init__(self, whole: GrowingRuntime, step: BoundSession, buckets: Sequence[int]) -> None:
        self._whole, self._step = whole, step
        self.buckets = sorted(buckets)
        self.device, self.dtype = whole.device, whole.dtype

    def encode(self, feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return self._whole.encode(feeds)

    def prefill(self, feeds: Mapping[str, Tensor]) -> tuple[Tensor, StaticState]:
        logits, grown = self._whole.prefill(feeds)
        return logits, StaticState(self, grown)

    def resume(self, caches: Sequence[Tensor], feeds: Mapping[str, Tensor]) -> StaticState:
        return StaticState(self, self._whole.resume(caches, feeds))

    def step(self, feeds: Mapping[str, Tensor], state: StaticState) -> Tensor:
        """Raises `AccelError` if the largest bucket has no room for the new tokens."""
        new = feeds["input_ids"].shape[1]
        state.make_room(state.length + new)
        if new == 1:
            state.slot.give(feeds, state.length)
            state.slot.run()
            logits = state.slot.logits.clone()
        else:
            grown = state.grown()
            logits = self._whole.step(feeds, grown)
            state.slot.write(grown.own, state.length, new)
        state.length += new
        return logits

    def slot(self, grown: GrowingState, length: int) -> Slot:
        """The caches of `grown` in the smallest bucket that `length` tokens fit into."""
        bucket = next((bucket for bucket in self.buckets if bucket >= length), None)
        if bucket is None:
            raise AccelError(
                f"no room for {length} tokens in the decoder's cache: the largest of "
                f"runtime.buckets={self.buckets} is too small. Add a larger one, or say runtime.static=false"
            )
        return Slot(self._step, grown, self._whole.grown, bucket)

    def close(self) -> None:
        self._whole.close()
        del self._step


def open_static(folder: Path, settings: SessionSettings, device: str, buckets: Sequence[int]) -> StaticRuntime:
    """The runtime over a deployable's folder that holds a static step as well: see `layout.STATIC_STEP`.

    Both decoders read the same weights.
    """
    where = torch.device(device)
    weights = SharedWeights(where)
    whole = open_growing(folder, settings, device, weights.of(folder / DECODER))
    step = open_session(folder / STATIC_STEP, settings, weights.of(folder / STATIC_STEP))
    return StaticRuntime(whole, BoundSession(step, where), buckets)
