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
from accel.runtime.decode_buffers import DecodeBuffers, DecodeGraphs
from accel.runtime.device_memory import check_allocation, check_weights_fit, free_device_memory
from accel.runtime.dynamic_cache import DynamicCacheRuntime, DynamicCacheState, open_dynamic
from accel.runtime.encoder_graphs import CapturedEncoder
from accel.runtime.io_binding import BoundSession
from accel.runtime.layout import CROSS_CACHE, DECODER, ENCODER, STATIC_DECODE
from accel.runtime.padding import STEP, Padding, Shape, begin, shapes
from accel.runtime.session import SessionSettings, open_capturable, open_session
from accel.runtime.streams import on_shared_stream
from accel.runtime.weights import SharedWeights

logger = logging.getLogger(__name__)

SPARE = 4  # slots kept for the next generation of the same shape

Kind = tuple[int, int, tuple[tuple[str, Shape], ...]]  # batch, bucket, shapes of what is fixed

Encode = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


class StaticCacheState:
    """Caches in a slot, and how many tokens they hold. What is forgotten stays, masked, until it is written over."""

    def __init__(
        self, runtime: "StaticCacheRuntime", buffers: DecodeBuffers, constants: Mapping[str, Shape], length: int
    ) -> None:
        """`fixed`: what the generation fixed at its beginning, and its shape, which the slot may have rounded up."""
        self.runtime, self.buffers, self._shapes, self.length = runtime, buffers, dict(constants), length

    def __del__(self) -> None:
        self.runtime.release(self.buffers)

    @property
    def batch(self) -> int:
        return self.buffers.batch

    def reorder(self, index: Tensor) -> None:
        self.buffers.reorder(index.to(self.buffers.logits.device), self.length)

    def crop(self, length: int) -> None:
        self.length = length
        self.buffers.ancestry.begin(length)

    def expand(self, times: int) -> None:
        self.select(torch.arange(self.batch).repeat_interleave(times))

    def select(self, index: Tensor) -> None:
        grown = self.grown()
        grown.select(index)
        self._move_to(grown, self.length)

    def _move_to(self, grown: DynamicCacheState, length: int) -> None:
        """Keep what `grown` holds in a slot with room for `length` tokens, in place of this one."""
        before, self.buffers = self.buffers, self.runtime.take(grown, length)
        self._shapes = shapes(grown.constants)
        self.runtime.release(before)

    def views(self) -> Mapping[str, Tensor]:
        constants = self._constants()
        return self.buffers.read(self.length) | {name: constants[name] for name in self.runtime.cross_caches}

    def _constants(self) -> dict[str, Tensor]:
        return {name: begin(self.buffers.constants[name], shape) for name, shape in self._shapes.items()}

    def grown(self) -> DynamicCacheState:
        """The same caches, each a tensor of its own length."""
        self_caches = {name: tensor.contiguous() for name, tensor in self.buffers.read(self.length).items()}
        return DynamicCacheState(self_caches, self._constants(), self.buffers.axes, self.runtime.cross_caches)

    def ensure_capacity(self, length: int) -> None:
        """Move to a larger bucket if `length` tokens don't fit into this one."""
        if length > self.buffers.bucket:
            held = DynamicCacheState(
                self.buffers.read(self.length), self._constants(), self.buffers.axes, self.runtime.cross_caches
            )
            ancestry = self.buffers.ancestry
            self._move_to(held, length)
            self.buffers.ancestry.take(ancestry, self.length)


class StaticCacheRuntime:
    """Steps of one token over caches of fixed length; all else over `whole`, the merged decoder.

    `batches`: how many sequences, beams counted, it may decode at once; empty: any.
    """

    def __init__(
        self, dynamic: DynamicCacheRuntime, graphs: DecodeGraphs, buckets: Sequence[int], batches: Sequence[int] = ()
    ) -> None:
        self.dynamic, self._graphs = dynamic, graphs
        self.buckets, self.batches = sorted(buckets), sorted(batches)
        self.device, self.dtype = dynamic.device, dynamic.dtype
        self._spare: list[tuple[Kind, DecodeBuffers]] = []  # the one given back last comes last
        self._kept = max(SPARE, len(batches) * len(buckets))
        self.cross_caches = [
            name for name in dynamic.cache if name not in dynamic.self_cache
        ]  # caches that a generation fixes
        self._padding = Padding(dynamic.decoder, dynamic.constants)
        self._begins = self._can_begin()
        self._encode: Encode = dynamic.encode
        if dynamic.encoder is not None and CapturedEncoder.fits(dynamic.encoder):
            self._encode = CapturedEncoder(dynamic.encoder)

    def _can_begin(self) -> bool:
        """Whether a generation may begin with a step: caches that it only reads are made here, as long as its input."""
        axes = self._padding.axes
        given = {axis for name in axes if name not in self.cross_caches for axis in axes[name]}
        self_caches = {axis for name in self.cross_caches for axis in axes[name] if isinstance(axis, str)}
        return (self._graphs.cross is not None or not self.cross_caches) and self_caches <= given

    def encode(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return self._encode(inputs)

    def prefill(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, StaticCacheState]:
        """The first token alone is a step like any other, at place 0, once the caches that it only reads are made."""
        if inputs["input_ids"].shape[1] == 1 and self._begins:
            state = self._begin(inputs)
            return self._decode_one(inputs, state), state
        logits, grown = self.dynamic.prefill(inputs)
        return logits, self._from_dynamic(grown)

    def _begin(self, inputs: Mapping[str, Tensor]) -> StaticCacheState:
        """No token yet."""
        given = self.dynamic.context(inputs)
        lengths = self._padding.lengths(shapes(given))
        cross_caches = {
            name: tuple(lengths.get(axis, axis) for axis in self._padding.axes[name]) for name in self.cross_caches
        }
        constants = shapes(given) | cross_caches
        buffers = self._buffers(len(inputs["input_ids"]), 1, constants)
        buffers.begin(given)
        buffers.run_cross_cache()
        return StaticCacheState(self, buffers, constants, 0)

    def _from_dynamic(self, grown: DynamicCacheState) -> StaticCacheState:
        return StaticCacheState(self, self.take(grown, grown.length), shapes(grown.constants), grown.length)

    def resume(self, caches: Sequence[Tensor], inputs: Mapping[str, Tensor]) -> StaticCacheState:
        return self._from_dynamic(self.dynamic.resume(caches, inputs))

    def decode(self, inputs: Mapping[str, Tensor], state: StaticCacheState) -> Tensor:
        """Raises `AccelError` if the largest bucket has no room for the new tokens."""
        new = inputs["input_ids"].shape[1]
        state.ensure_capacity(state.length + new)
        if new == 1:
            return self._decode_one(inputs, state)
        grown = state.grown()
        logits = self.dynamic.decode(inputs, grown)
        state.buffers.write(grown.self_caches, state.length, new)
        state.length += new
        return logits

    def _decode_one(self, inputs: Mapping[str, Tensor], state: StaticCacheState) -> Tensor:
        state.buffers.write_inputs(inputs, state.length)
        state.length += 1
        return state.buffers.run().clone()

    def take(self, grown: DynamicCacheState, length: int) -> DecodeBuffers:
        """The caches of `grown` in a slot with room for `length` tokens. Raises as `_slot` does."""
        buffers = self._buffers(grown.batch, length, shapes(grown.constants))
        buffers.begin(grown.constants)
        buffers.write(grown.self_caches, 0, grown.length)
        return buffers

    def _buffers(self, batch: int, length: int, constants: Mapping[str, Shape]) -> DecodeBuffers:
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
                f"{batch} sequences at once, beams counted, are none of runtime.capture_batch_sizes={self.batches}. "
                "Add the number, or say runtime.capture_batch_sizes=[] to capture any when it comes"
            )
        padded = {name: self._padding.padded(name, shape) for name, shape in constants.items()}
        kind = (batch, bucket, tuple(padded.items()))
        for index, (known, buffers) in enumerate(self._spare):
            if known == kind:
                del self._spare[index]
                return buffers
        needed = self.bytes(batch, bucket)
        if needed > free_device_memory(self.device):
            self._spare.clear()
        what = f"a cache for {batch} sequences of {bucket} tokens"
        check_allocation(needed, self.device, what, "runtime.buckets")
        typed = {name: (self.dynamic.decoder.dtype(name), shape) for name, shape in padded.items()}
        return DecodeBuffers(self._graphs, batch, bucket, self.dynamic.axes, self.dynamic.cache, typed)

    def bytes(self, batch: int, bucket: int) -> int:
        """What the caches of a slot take, once."""
        decode = self._graphs.decode
        sizes = (
            decode.dtype(name).itemsize
            * batch
            * bucket
            * torch.Size(dim for dim in decode.inputs[name].shape if isinstance(dim, int)).numel()
            for name in self.dynamic.axes
        )
        return sum(sizes)

    def release(self, buffers: DecodeBuffers) -> None:
        """Keep a slot for the next generation of its kind; of those kept longest, too many go."""
        kind = (
            buffers.batch,
            buffers.bucket,
            tuple((name, tuple(room.shape)) for name, room in buffers.constants.items()),
        )
        self._spare = [*self._spare, (kind, buffers)][-self._kept :]

    def prepare(self, source: int = STEP) -> None:
        """Capture a step for each of `batches` and every bucket. `source`: length of what is fixed."""
        pairs = [(batch, bucket) for batch in self.batches for bucket in self.buckets]
        for batch, bucket in progress.track(pairs, "capturing"):
            start = time.perf_counter()
            constants = {
                name: tuple(batch if axis == "batch" else source if isinstance(axis, str) else axis for axis in axes)
                for name, axes in self._padding.axes.items()
            }
            with on_shared_stream(self.device):
                buffers = self._buffers(batch, bucket, constants)
                for _ in range(2):
                    buffers.run_cross_cache()
                    buffers.run()
            self.release(buffers)
            logger.info("captured %d x %d in %.3f s", batch, bucket, time.perf_counter() - start)

    def close(self) -> None:
        self._spare.clear()
        self._encode = self.dynamic.encode
        self.dynamic.close()
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
) -> StaticCacheRuntime:
    """The runtime over a deployable's folder that holds a static step as well: see `layout.STATIC_STEP`.

    Both decoders read the same weights. `session`, `environment`: of the static step's session, in place of those of
    `settings`.
    """
    where = torch.device(device)
    check_weights_fit([path for path in (folder / DECODER, folder / ENCODER) if path.is_file()], where)
    weights = SharedWeights(where)
    dynamic = open_dynamic(folder, settings, device, weights.of(folder / DECODER), with_encoder=False)
    opening = open_capturable if capture else open_session
    if with_encoder and (folder / ENCODER).is_file():
        dynamic.encoder = BoundSession(opening(folder / ENCODER, settings), where)
    how = replace(
        settings,
        session={**settings.session, **(session or {})},
        environment={**settings.environment, **(environment or {})},
    )
    decode, *cross = (
        BoundSession(opening(path, how, weights.of(path)), where)
        for path in (folder / STATIC_DECODE, folder / CROSS_CACHE)
        if path.is_file()
    )
    return StaticCacheRuntime(dynamic, DecodeGraphs(decode, *cross), buckets, batches)
