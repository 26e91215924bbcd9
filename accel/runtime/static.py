"""ONNX Runtime with caches of a fixed length, a bucket's, which a step writes in place.

From token to token nothing is allocated, and every tensor keeps its address, so that a GPU can record a step as a CUDA
graph and replay it. What is no step of one token (a prefill, several new tokens at once) the decoder with a growing
cache does, and its new entries are copied.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from accel import console
from accel.errors import AccelError
from accel.runtime.binding import BoundSession
from accel.runtime.layout import DECODER, ENCODER, STATIC_STEP
from accel.runtime.onnx import GrowingRuntime, GrowingState, open_growing
from accel.runtime.room import check_room, check_room_for, room_left
from accel.runtime.session import SessionSettings, open_recordable, open_session
from accel.runtime.slot import Shapes, Slot
from accel.runtime.stream import on_shared_stream
from accel.runtime.weights import SharedWeights

logger = logging.getLogger(__name__)

SOURCES = 16  # source lengths are rounded up to a multiple of it where a mask hides the rest
SPARE = 4  # slots kept for the next generation of the same shape

Kind = tuple[int, int, tuple[tuple[str, tuple[int, ...]], ...]]  # batch, bucket, shapes of what is fixed


class StaticState:
    """Caches in a slot, and how many tokens they hold. What is forgotten stays, masked, until it is written over."""

    def __init__(self, runtime: "StaticRuntime", grown: GrowingState) -> None:
        self.runtime, self.length, self.made = runtime, grown.length, grown.made
        self._hold(grown, grown.length)

    def _hold(self, grown: GrowingState, length: int) -> None:
        """Keep what `grown` holds in a slot with room for `length` tokens."""
        before, self.slot = getattr(self, "slot", None), self.runtime.take(grown, length)
        self._shapes = {name: tensor.shape for name, tensor in grown.fixed.items() if name in self.slot.fixed}
        self._beside = {name: tensor for name, tensor in grown.fixed.items() if name not in self.slot.fixed}
        if before is not None:
            self.runtime.give_back(before)

    def __del__(self) -> None:
        if hasattr(self, "slot"):
            self.runtime.give_back(self.slot)

    @property
    def batch(self) -> int:
        return self.slot.batch

    def reorder(self, index: Tensor) -> None:
        self.slot.reorder(index.to(self.slot.logits.device), self.length)

    def crop(self, length: int) -> None:
        self.length = length
        self.slot.histories.begin(length)

    def expand(self, times: int) -> None:
        self.select(torch.arange(self.batch).repeat_interleave(times))

    def select(self, index: Tensor) -> None:
        grown = self.grown()
        grown.select(index)
        self._hold(grown, self.length)

    def views(self) -> Mapping[str, Tensor]:
        fixed = self._fixed()
        return self.slot.read(self.length) | {name: fixed[name] for name in self.made}

    def _fixed(self) -> dict[str, Tensor]:
        """What the generation fixed at its beginning, without what the slot added to its lengths."""
        held = {name: self.slot.fixed[name][tuple(map(slice, shape))] for name, shape in self._shapes.items()}
        return held | self._beside

    def grown(self) -> GrowingState:
        """The same caches, each a tensor of its own length."""
        own = {name: tensor.contiguous() for name, tensor in self.slot.read(self.length).items()}
        return GrowingState(own, self._fixed(), self.slot.axes, self.made)

    def make_room(self, length: int) -> None:
        """Move to a larger bucket if `length` tokens don't fit into this one."""
        if length > self.slot.bucket:
            held = GrowingState(self.slot.read(self.length), self._fixed(), self.slot.axes, self.made)
            histories = self.slot.histories
            self._hold(held, length)
            self.slot.histories.take(histories, self.length)


class StaticRuntime:
    """Steps of one token over caches of fixed length; all else over `whole`, the merged decoder.

    `batches`: how many sequences, beams counted, it may decode at once; empty: any.
    """

    def __init__(
        self,
        whole: GrowingRuntime,
        step: BoundSession,
        buckets: Sequence[int],
        capture: bool = False,
        batches: Sequence[int] = (),
    ) -> None:
        self.whole, self._step = whole, step
        self.buckets, self.batches = sorted(buckets), sorted(batches)
        self.device, self.dtype = whole.device, whole.dtype
        self.capture = capture
        self._spare: list[tuple[Kind, Slot]] = []  # the one given back last comes last
        self._kept = max(SPARE, len(batches) * len(buckets))
        fixed = [name for name in whole.fixed if name in step.inputs]
        shapes = {name: step.inputs[name].shape for name in fixed}
        # axes of what is fixed that a mask over them lets grow
        self.masked = {
            shape[1] for name, shape in shapes.items() if len(shape) == 2 and step.dtype(name) is torch.int64
        }
        self.shapes = shapes

    def encode(self, feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return self.whole.encode(feeds)

    def prefill(self, feeds: Mapping[str, Tensor]) -> tuple[Tensor, StaticState]:
        logits, grown = self.whole.prefill(feeds)
        return logits, StaticState(self, grown)

    def resume(self, caches: Sequence[Tensor], feeds: Mapping[str, Tensor]) -> StaticState:
        return StaticState(self, self.whole.resume(caches, feeds))

    def step(self, feeds: Mapping[str, Tensor], state: StaticState) -> Tensor:
        """Raises `AccelError` if the largest bucket has no room for the new tokens."""
        new = feeds["input_ids"].shape[1]
        state.make_room(state.length + new)
        if new == 1:
            state.slot.give(feeds, state.length)
            logits = state.slot.run().clone()
        else:
            grown = state.grown()
            logits = self.whole.step(feeds, grown)
            state.slot.write(grown.own, state.length, new)
        state.length += new
        return logits

    def take(self, grown: GrowingState, length: int) -> Slot:
        """The caches of `grown` in a slot of the smallest bucket that `length` tokens fit into.

        Raises `AccelError` if none is large enough, `OutOfMemory` if the device has no room for it.
        """
        bucket = next((bucket for bucket in self.buckets if bucket >= length), None)
        if bucket is None:
            raise AccelError(
                f"no room for {length} tokens in the decoder's cache: the largest of "
                f"runtime.buckets={self.buckets} is too small. Add a larger one, or say runtime.static=false"
            )
        if self.batches and grown.batch not in self.batches:
            raise AccelError(
                f"{grown.batch} sequences at once, beams counted, are none of runtime.batches={self.batches}. "
                "Add the number, or say runtime.batches=[] to capture any when it comes"
            )
        slot = self._slot(grown.batch, bucket, self._rounded(grown.fixed))
        slot.begin(grown.fixed)
        slot.write(grown.own, 0, grown.length)
        return slot

    def _rounded(self, fixed: Mapping[str, Tensor]) -> Shapes:
        """The shapes that a slot has for what is fixed: somewhat longer, so that few differ, where a mask hides it."""

        def length(dim: int | str, given: int) -> int:
            return -(-given // SOURCES) * SOURCES if dim in self.masked else given

        return {
            name: tuple(length(dim, given) for dim, given in zip(shape, fixed[name].shape, strict=True))
            for name, shape in self.shapes.items()
        }

    def _slot(self, batch: int, bucket: int, fixed: Shapes) -> Slot:
        """A spare one of that kind, or a new one."""
        kind = (batch, bucket, tuple(fixed.items()))
        for index, (known, slot) in enumerate(self._spare):
            if known == kind:
                del self._spare[index]
                return slot
        needed = self.bytes(batch, bucket)
        if needed > room_left(self.device):
            self._spare.clear()
        what = f"a cache for {batch} sequences of {bucket} tokens"
        check_room_for(needed, self.device, what, "runtime.buckets")
        return Slot(self._step, batch, bucket, self.whole.axes, self.whole.grown, fixed, self.capture)

    def bytes(self, batch: int, bucket: int) -> int:
        """What the caches of a slot take, once."""
        sizes = (
            self._step.dtype(name).itemsize
            * batch
            * bucket
            * torch.Size(dim for dim in self._step.inputs[name].shape if isinstance(dim, int)).numel()
            for name in self.whole.axes
        )
        return sum(sizes)

    def give_back(self, slot: Slot) -> None:
        """Keep a slot for the next generation of its kind; of those kept longest, too many go."""
        kind = (slot.batch, slot.bucket, tuple((name, tuple(room.shape)) for name, room in slot.fixed.items()))
        self._spare = [*self._spare, (kind, slot)][-self._kept :]

    def prepare(self, source: int = SOURCES) -> None:
        """Capture a step for each of `batches` and every bucket. `source`: length of what is fixed."""
        pairs = [(batch, bucket) for batch in self.batches for bucket in self.buckets]
        for batch, bucket in console.track(pairs, "capturing"):
            start = time.perf_counter()
            lengths = {"batch": batch} | dict.fromkeys(self.masked, source)
            fixed = {
                name: tuple(lengths.get(dim, source) if isinstance(dim, str) else dim for dim in shape)
                for name, shape in self.shapes.items()
            }
            with on_shared_stream(self.device):
                slot = self._slot(batch, bucket, fixed)
                slot.run()
                slot.run()
            self.give_back(slot)
            logger.info("captured %d x %d in %.3f s", batch, bucket, time.perf_counter() - start)

    def close(self) -> None:
        self._spare.clear()
        self.whole.close()
        del self._step


def open_static(
    folder: Path,
    settings: SessionSettings,
    device: str,
    buckets: Sequence[int],
    *,
    session: Mapping[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
    capture: bool = False,
    batches: Sequence[int] = (),
    with_encoder: bool = True,
) -> StaticRuntime:
    """The runtime over a deployable's folder that holds a static step as well: see `layout.STATIC_STEP`.

    Both decoders read the same weights. `session`, `environment`: of the static step's session, in place of those of
    `settings`.
    """
    where = torch.device(device)
    check_room([path for path in (folder / DECODER, folder / ENCODER) if path.is_file()], where)
    weights = SharedWeights(where)
    whole = open_growing(folder, settings, device, weights.of(folder / DECODER), with_encoder)
    path = folder / STATIC_STEP
    opening = open_recordable if capture else open_session
    how = replace(
        settings,
        session={**settings.session, **(session or {})},
        environment={**settings.environment, **(environment or {})},
    )
    step = opening(path, how, weights.of(path))
    return StaticRuntime(whole, BoundSession(step, where), buckets, step.recordable, batches)
