"""ONNX Runtime with caches of a fixed length, a bucket's, which a step writes in place.

From token to token nothing is allocated, and every tensor keeps its address, so that a GPU can record a step as a CUDA
graph and replay it. What is no step of one token (a prefill, several new tokens at once) the decoder with a growing
cache does, and its new entries are copied.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from accel import progress
from accel.errors import AccelError
from accel.runtime.decode_buffers import Graphs, Slot
from accel.runtime.device_memory import check_room, check_room_for, room_left
from accel.runtime.dynamic_cache import GrowingRuntime, GrowingState, open_growing
from accel.runtime.encoder_graphs import CapturedEncoder
from accel.runtime.io_binding import BoundSession
from accel.runtime.layout import CROSS_CACHE, DECODER, ENCODER, STATIC_STEP
from accel.runtime.padding import STEP, Padding, Shape, begin, shapes
from accel.runtime.session import SessionSettings, open_recordable, open_session
from accel.runtime.streams import on_shared_stream
from accel.runtime.weights import SharedWeights

logger = logging.getLogger(__name__)

SPARE = 4  # slots kept for the next generation of the same shape

Kind = tuple[int, int, tuple[tuple[str, Shape], ...]]  # batch, bucket, shapes of what is fixed

Encode = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


class StaticState:
    """Caches in a slot, and how many tokens they hold. What is forgotten stays, masked, until it is written over."""

    def __init__(self, runtime: "StaticRuntime", slot: Slot, fixed: Mapping[str, Shape], length: int) -> None:
        """`fixed`: what the generation fixed at its beginning, and its shape, which the slot may have rounded up."""
        self.runtime, self.slot, self._shapes, self.length = runtime, slot, dict(fixed), length

    def __del__(self) -> None:
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
        self._move_to(grown, self.length)

    def _move_to(self, grown: GrowingState, length: int) -> None:
        """Keep what `grown` holds in a slot with room for `length` tokens, in place of this one."""
        before, self.slot = self.slot, self.runtime.take(grown, length)
        self._shapes = shapes(grown.fixed)
        self.runtime.give_back(before)

    def views(self) -> Mapping[str, Tensor]:
        fixed = self._fixed()
        return self.slot.read(self.length) | {name: fixed[name] for name in self.runtime.made}

    def _fixed(self) -> dict[str, Tensor]:
        return {name: begin(self.slot.fixed[name], shape) for name, shape in self._shapes.items()}

    def grown(self) -> GrowingState:
        """The same caches, each a tensor of its own length."""
        own = {name: tensor.contiguous() for name, tensor in self.slot.read(self.length).items()}
        return GrowingState(own, self._fixed(), self.slot.axes, self.runtime.made)

    def make_room(self, length: int) -> None:
        """Move to a larger bucket if `length` tokens don't fit into this one."""
        if length > self.slot.bucket:
            held = GrowingState(self.slot.read(self.length), self._fixed(), self.slot.axes, self.runtime.made)
            histories = self.slot.histories
            self._move_to(held, length)
            self.slot.histories.take(histories, self.length)


class StaticRuntime:
    """Steps of one token over caches of fixed length; all else over `whole`, the merged decoder.

    `batches`: how many sequences, beams counted, it may decode at once; empty: any.
    """

    def __init__(
        self, whole: GrowingRuntime, graphs: Graphs, buckets: Sequence[int], batches: Sequence[int] = ()
    ) -> None:
        self.whole, self._graphs = whole, graphs
        self.buckets, self.batches = sorted(buckets), sorted(batches)
        self.device, self.dtype = whole.device, whole.dtype
        self._spare: list[tuple[Kind, Slot]] = []  # the one given back last comes last
        self._kept = max(SPARE, len(batches) * len(buckets))
        self.made = [name for name in whole.cache if name not in whole.grown]  # caches that a generation fixes
        self._padding = Padding(whole.decoder, whole.fixed)
        self._begins = self._can_begin()
        self._encode: Encode = whole.encode
        if whole.encoder is not None and CapturedEncoder.fits(whole.encoder):
            self._encode = CapturedEncoder(whole.encoder)

    def _can_begin(self) -> bool:
        """Whether a generation may begin with a step: caches that it only reads are made here, as long as its input."""
        axes = self._padding.axes
        given = {axis for name in axes if name not in self.made for axis in axes[name]}
        own = {axis for name in self.made for axis in axes[name] if isinstance(axis, str)}
        return (self._graphs.cross is not None or not self.made) and own <= given

    def encode(self, feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return self._encode(feeds)

    def prefill(self, feeds: Mapping[str, Tensor]) -> tuple[Tensor, StaticState]:
        """The first token alone is a step like any other, at place 0, once the caches that it only reads are made."""
        if feeds["input_ids"].shape[1] == 1 and self._begins:
            state = self._begin(feeds)
            return self._one_more(feeds, state), state
        logits, grown = self.whole.prefill(feeds)
        return logits, self._over(grown)

    def _begin(self, feeds: Mapping[str, Tensor]) -> StaticState:
        """No token yet."""
        given = self.whole.context(feeds)
        lengths = self._padding.lengths(shapes(given))
        made = {name: tuple(lengths.get(axis, axis) for axis in self._padding.axes[name]) for name in self.made}
        fixed = shapes(given) | made
        slot = self._slot(len(feeds["input_ids"]), 1, fixed)
        slot.begin(given)
        slot.make_fixed()
        return StaticState(self, slot, fixed, 0)

    def _over(self, grown: GrowingState) -> StaticState:
        return StaticState(self, self.take(grown, grown.length), shapes(grown.fixed), grown.length)

    def resume(self, caches: Sequence[Tensor], feeds: Mapping[str, Tensor]) -> StaticState:
        return self._over(self.whole.resume(caches, feeds))

    def step(self, feeds: Mapping[str, Tensor], state: StaticState) -> Tensor:
        """Raises `AccelError` if the largest bucket has no room for the new tokens."""
        new = feeds["input_ids"].shape[1]
        state.make_room(state.length + new)
        if new == 1:
            return self._one_more(feeds, state)
        grown = state.grown()
        logits = self.whole.step(feeds, grown)
        state.slot.write(grown.own, state.length, new)
        state.length += new
        return logits

    def _one_more(self, feeds: Mapping[str, Tensor], state: StaticState) -> Tensor:
        state.slot.give(feeds, state.length)
        state.length += 1
        return state.slot.run().clone()

    def take(self, grown: GrowingState, length: int) -> Slot:
        """The caches of `grown` in a slot with room for `length` tokens. Raises as `_slot` does."""
        slot = self._slot(grown.batch, length, shapes(grown.fixed))
        slot.begin(grown.fixed)
        slot.write(grown.own, 0, grown.length)
        return slot

    def _slot(self, batch: int, length: int, fixed: Mapping[str, Shape]) -> Slot:
        """A slot of the smallest bucket that `length` tokens fit into: a spare one of that kind, or a new one.

        Raises `AccelError` if none is large enough, `OutOfMemory` if the device has no room for it.
        """
        bucket = next((bucket for bucket in self.buckets if bucket >= length), None)
        if bucket is None:
            raise AccelError(
                f"no room for {length} tokens in the decoder's cache: the largest of "
                f"runtime.buckets={self.buckets} is too small. Add a larger one, or say runtime.static=false"
            )
        if self.batches and batch not in self.batches:
            raise AccelError(
                f"{batch} sequences at once, beams counted, are none of runtime.batches={self.batches}. "
                "Add the number, or say runtime.batches=[] to capture any when it comes"
            )
        padded = {name: self._padding.padded(name, shape) for name, shape in fixed.items()}
        kind = (batch, bucket, tuple(padded.items()))
        for index, (known, slot) in enumerate(self._spare):
            if known == kind:
                del self._spare[index]
                return slot
        needed = self.bytes(batch, bucket)
        if needed > room_left(self.device):
            self._spare.clear()
        what = f"a cache for {batch} sequences of {bucket} tokens"
        check_room_for(needed, self.device, what, "runtime.buckets")
        typed = {name: (self.whole.decoder.dtype(name), shape) for name, shape in padded.items()}
        return Slot(self._graphs, batch, bucket, self.whole.axes, self.whole.cache, typed)

    def bytes(self, batch: int, bucket: int) -> int:
        """What the caches of a slot take, once."""
        step = self._graphs.step
        sizes = (
            step.dtype(name).itemsize
            * batch
            * bucket
            * torch.Size(dim for dim in step.inputs[name].shape if isinstance(dim, int)).numel()
            for name in self.whole.axes
        )
        return sum(sizes)

    def give_back(self, slot: Slot) -> None:
        """Keep a slot for the next generation of its kind; of those kept longest, too many go."""
        kind = (slot.batch, slot.bucket, tuple((name, tuple(room.shape)) for name, room in slot.fixed.items()))
        self._spare = [*self._spare, (kind, slot)][-self._kept :]

    def prepare(self, source: int = STEP) -> None:
        """Capture a step for each of `batches` and every bucket. `source`: length of what is fixed."""
        pairs = [(batch, bucket) for batch in self.batches for bucket in self.buckets]
        for batch, bucket in progress.track(pairs, "capturing"):
            start = time.perf_counter()
            fixed = {
                name: tuple(batch if axis == "batch" else source if isinstance(axis, str) else axis for axis in axes)
                for name, axes in self._padding.axes.items()
            }
            with on_shared_stream(self.device):
                slot = self._slot(batch, bucket, fixed)
                for _ in range(2):
                    slot.make_fixed()
                    slot.run()
            self.give_back(slot)
            logger.info("captured %d x %d in %.3f s", batch, bucket, time.perf_counter() - start)

    def close(self) -> None:
        self._spare.clear()
        self._encode = self.whole.encode
        self.whole.close()
        del self._graphs


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
    whole = open_growing(folder, settings, device, weights.of(folder / DECODER), with_encoder=False)
    opening = open_recordable if capture else open_session
    if with_encoder and (folder / ENCODER).is_file():
        whole.encoder = BoundSession(opening(folder / ENCODER, settings), where)
    how = replace(
        settings,
        session={**settings.session, **(session or {})},
        environment={**settings.environment, **(environment or {})},
    )
    step, *cross = (
        BoundSession(opening(path, how, weights.of(path)), where)
        for path in (folder / STATIC_STEP, folder / CROSS_CACHE)
        if path.is_file()
    )
    return StaticRuntime(whole, Graphs(step, *cross), buckets, batches)
