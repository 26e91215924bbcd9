"""ONNX Runtime with static KV caches: decode steps of one token write into caches of a bucket's length, in place.

A decode step allocates nothing and every tensor keeps its address, so that it can be captured as a CUDA graph. A
prefill, and a decode step of several tokens, run on the merged decoder with dynamic caches, whose new entries are then
copied into the static caches.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from accel import progress
from accel.errors import AccelError
from accel.runtime.cuda_graph import free_dropped_graphs
from accel.runtime.decode_buffers import DecodeBuffers, DecodeGraphs
from accel.runtime.device_memory import check_allocation, check_weights_fit, free_device_memory
from accel.runtime.dynamic_cache import DynamicCacheRuntime, DynamicCacheState, open_dynamic
from accel.runtime.encoder_graphs import CapturedEncoder
from accel.runtime.io_binding import BoundSession
from accel.runtime.layout import DeployableFiles
from accel.runtime.padding import PAD_TO_MULTIPLE_OF, Padding, Shape, leading_view, shapes
from accel.runtime.session import SessionSettings, open_capturable, open_session
from accel.runtime.streams import on_shared_stream
from accel.runtime.weights import SharedWeights

logger = logging.getLogger(__name__)

MAX_SPARE = 4  # unused decode buffers kept for later generations

BufferKey = tuple[int, int, tuple[tuple[str, Shape], ...]]
"""Batch, bucket and padded shapes of the constants: decode buffers with the same key are interchangeable."""


class StaticCacheState:
    """KV caches of one generation in decode buffers. Implements `protocol.State`.

    Cache entries from `length` on are masked; they are overwritten by later tokens.

    Args:
        runtime: Runtime that the buffers are returned to when this state is deleted.
        buffers: Decode buffers that hold the caches.
        constants: Input that stays the same for the whole generation -> its unpadded shape.
        length: Number of decoder tokens in the caches.
    """

    def __init__(
        self, runtime: "StaticCacheRuntime", buffers: DecodeBuffers, constants: Mapping[str, Shape], length: int
    ) -> None:
        self.runtime, self.buffers, self.length = runtime, buffers, length
        self._constant_shapes = dict(constants)

    def __del__(self) -> None:
        self.runtime.release(self.buffers)

    @property
    def batch(self) -> int:
        """Number of sequences, beams counted."""
        return self.buffers.batch

    def reorder(self, index: Tensor) -> None:
        """Continue every sequence i from sequence `index[i]`, a beam of the same input."""
        self.buffers.reorder(index.to(self.buffers.logits.device), self.length)

    def crop(self, length: int) -> None:
        """Drop all but the first `length` decoder tokens."""
        self.length = length
        self.buffers.ancestry.reset(length)

    def expand(self, times: int) -> None:
        """Repeat every sequence `times` times: [batch, ...] -> [batch * times, ...]."""
        self.select(torch.arange(self.batch).repeat_interleave(times))

    def select(self, index: Tensor) -> None:
        """Continue with the sequences `index` [new batch] of any input, in decode buffers of that batch size."""
        dynamic = self.to_dynamic()
        dynamic.select(index)
        self._move_to_buffers(dynamic, self.length)

    def _move_to_buffers(self, dynamic: DynamicCacheState, capacity: int) -> None:
        """Copy the caches of `dynamic` to buffers for `capacity` tokens, and use those instead of the current ones."""
        previous, self.buffers = self.buffers, self.runtime.copy_to_buffers(dynamic, capacity)
        self._constant_shapes = shapes(dynamic.constants)
        self.runtime.release(previous)

    def views(self) -> Mapping[str, Tensor]:
        """Return all caches by input name, self-attention caches first."""
        constants = self._constants()
        return self.buffers.read(self.length) | {name: constants[name] for name in self.runtime.cross_caches}

    def _constants(self) -> dict[str, Tensor]:
        """Return views of the constants without their padding."""
        return {
            name: leading_view(self.buffers.constants[name], shape) for name, shape in self._constant_shapes.items()
        }

    def to_dynamic(self) -> DynamicCacheState:
        """Return a state of the dynamic runtime with contiguous copies of the self-attention caches."""
        self_caches = {name: tensor.contiguous() for name, tensor in self.buffers.read(self.length).items()}
        return DynamicCacheState(self_caches, self._constants(), self.buffers.axes, self.runtime.cross_caches)

    def ensure_capacity(self, length: int) -> None:
        """Move to a larger bucket if this one is too short for `length` tokens.

        Raises:
            AccelError: No bucket is long enough.
            DeviceMemoryError: The device is out of memory.
        """
        if length > self.buffers.bucket:
            dynamic = DynamicCacheState(
                self.buffers.read(self.length), self._constants(), self.buffers.axes, self.runtime.cross_caches
            )
            ancestry = self.buffers.ancestry
            self._move_to_buffers(dynamic, length)
            self.buffers.ancestry.copy_from(ancestry, self.length)


class StaticCacheRuntime:
    """Runtime with static caches for decode steps of one token. Implements `protocol.Runtime`.

    Args:
        dynamic: Runtime over the merged decoder, for all other calls.
        graphs: Sessions of the static decode graph and, if there is one, of the cross-attention cache graph.
        buckets: Lengths that a static cache may have, in tokens.
        capture_batch_sizes: Numbers of sequences, beams counted, that may be decoded at once; empty for any.

    Attributes:
        cross_caches: Names of the cross-attention cache inputs.
        spare_buffers: Buffers for the next generation of the same kind; the ones released last are at the end.
        captured_encoder: Captured form of the encoder; None where it can't be captured.
    """

    def __init__(
        self,
        dynamic: DynamicCacheRuntime,
        graphs: DecodeGraphs,
        buckets: Sequence[int],
        capture_batch_sizes: Sequence[int] = (),
    ) -> None:
        self.dynamic, self._graphs = dynamic, graphs
        self.buckets, self.capture_batch_sizes = sorted(buckets), sorted(capture_batch_sizes)
        self.device, self.dtype = dynamic.device, dynamic.dtype
        self.exclusive = True  # generations take buffers from one pool, and captured graphs share one stream
        self.positions_from_mask = dynamic.positions_from_mask
        self.cross_caches = [name for name in dynamic.cache if name not in dynamic.self_cache_outputs]
        self.spare_buffers: list[tuple[BufferKey, DecodeBuffers]] = []
        self._max_spare = max(MAX_SPARE, len(capture_batch_sizes) * len(buckets))
        self._padding = Padding(dynamic.decoder, dynamic.constants)
        self._starts_static = self._can_start_static()
        self.captured_encoder: CapturedEncoder | None = None
        if dynamic.encoder is not None and CapturedEncoder.supports(dynamic.encoder):
            self.captured_encoder = CapturedEncoder(dynamic.encoder)

    def _can_start_static(self) -> bool:
        """Return True if the first token can be computed by the static decode graph, without a prefill.

        That needs no cross-attention caches, or a graph that computes them and whose output lengths are known from the
        other constants.
        """
        axes = self._padding.axes
        known_axes = {axis for name in axes if name not in self.cross_caches for axis in axes[name]}
        cross_cache_axes = {axis for name in self.cross_caches for axis in axes[name] if isinstance(axis, str)}
        computes_cross_caches = self._graphs.cross is not None or not self.cross_caches
        return computes_cross_caches and cross_cache_axes <= known_axes

    def encode(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Run the encoder, through a CUDA graph where it is captured."""
        return self.dynamic.encode(inputs) if self.captured_encoder is None else self.captured_encoder(inputs)

    def prefill(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, StaticCacheState]:
        """Run the decoder without past; a single token runs as a decode step at position 0 where that is possible."""
        if inputs["input_ids"].shape[1] == 1 and self._starts_static:
            state = self._empty_state(inputs)
            return self._decode_one(inputs, state), state
        logits, dynamic = self.dynamic.prefill(inputs)
        return logits, self._from_dynamic(dynamic)

    def _empty_state(self, inputs: Mapping[str, Tensor]) -> StaticCacheState:
        """Return a state without tokens, its constants taken from `inputs` and its cross-attention caches computed."""
        constants = self.dynamic.place_constants(inputs)
        lengths = self._padding.lengths(shapes(constants))
        cross_cache_shapes = {
            name: tuple(lengths.get(axis, axis) for axis in self._padding.axes[name]) for name in self.cross_caches
        }
        constant_shapes = shapes(constants) | cross_cache_shapes
        buffers = self.take_buffers(len(inputs["input_ids"]), 1, constant_shapes)
        buffers.reset(constants)
        buffers.compute_cross_caches()
        return StaticCacheState(self, buffers, constant_shapes, 0)

    def _from_dynamic(self, dynamic: DynamicCacheState) -> StaticCacheState:
        """Return a state with copies of the caches in `dynamic`."""
        buffers = self.copy_to_buffers(dynamic, dynamic.length)
        return StaticCacheState(self, buffers, shapes(dynamic.constants), dynamic.length)

    def resume(self, caches: Sequence[Tensor], inputs: Mapping[str, Tensor]) -> StaticCacheState:
        """Return a state over copies of existing caches, given in the order of `State.views`."""
        return self._from_dynamic(self.dynamic.resume(caches, inputs))

    def decode(self, inputs: Mapping[str, Tensor], state: StaticCacheState) -> Tensor:
        """Run the decoder over new tokens and the caches in `state`.

        Args:
            inputs: `input_ids` [batch, new] and the other inputs that change with every call. One new token runs on the
                static decode graph, several on the merged decoder.
            state: Updated in place; moved to a larger bucket if necessary.

        Returns:
            Logits [batch, new, vocabulary].

        Raises:
            AccelError: The largest bucket is too short for the new tokens.
        """
        new = inputs["input_ids"].shape[1]
        state.ensure_capacity(state.length + new)
        if new == 1:
            return self._decode_one(inputs, state)
        dynamic = state.to_dynamic()
        logits = self.dynamic.decode(inputs, dynamic)
        state.buffers.write(dynamic.self_caches, state.length, new)
        state.length += new
        return logits

    def _decode_one(self, inputs: Mapping[str, Tensor], state: StaticCacheState) -> Tensor:
        """Run one decode step on the static decode graph. Return a copy of its logits, [batch, 1, vocabulary]."""
        state.buffers.write_inputs(inputs, state.length)
        state.length += 1
        return state.buffers.run().clone()

    def copy_to_buffers(self, dynamic: DynamicCacheState, capacity: int) -> DecodeBuffers:
        """Copy the caches and constants of `dynamic` to decode buffers for at least `capacity` tokens.

        Raises:
            AccelError: No bucket is long enough, or the batch size isn't one of `capture_batch_sizes`.
            DeviceMemoryError: The device is out of memory.
        """
        buffers = self.take_buffers(dynamic.batch, capacity, shapes(dynamic.constants))
        buffers.reset(dynamic.constants)
        buffers.write(dynamic.self_caches, 0, dynamic.length)
        return buffers

    def take_buffers(self, batch: int, capacity: int, constants: Mapping[str, Shape]) -> DecodeBuffers:
        """Return decode buffers of the smallest bucket for `capacity` tokens: spare ones if there are any, or new ones.

        Raises `AccelError` and `DeviceMemoryError` as `copy_to_buffers` does.
        """
        bucket = next((bucket for bucket in self.buckets if bucket >= capacity), None)
        if bucket is None:
            raise AccelError(
                f"{capacity} tokens don't fit into the decoder's static cache: the largest of "
                f"runtime.buckets={self.buckets} is too short. Add a longer one, or set runtime.static=false"
            )
        if self.capture_batch_sizes and batch not in self.capture_batch_sizes:
            raise AccelError(
                f"{batch} sequences at once, beams counted: not one of "
                f"runtime.capture_batch_sizes={self.capture_batch_sizes}. Add {batch}, or set "
                "runtime.capture_batch_sizes=[] to capture every batch size when it is first used"
            )
        padded = {name: self._padding.padded(name, shape) for name, shape in constants.items()}
        key = (batch, bucket, tuple(padded.items()))
        for position, (spare_key, buffers) in enumerate(self.spare_buffers):
            if spare_key == key:
                del self.spare_buffers[position]
                return buffers

        needed = self.cache_bytes(batch, bucket)
        if needed > free_device_memory(self.device):
            self.spare_buffers.clear()
        check_allocation(needed, self.device, f"a cache for {batch} sequences of {bucket} tokens", "runtime.buckets")
        typed = {name: (self.dynamic.decoder.dtype(name), shape) for name, shape in padded.items()}
        return DecodeBuffers(self._graphs, batch, bucket, self.dynamic.axes, self.dynamic.cache, typed)

    def cache_bytes(self, batch: int, bucket: int) -> int:
        """Return the bytes of the self-attention caches in one set of decode buffers."""
        decode = self._graphs.decode
        total = 0
        for name in self.dynamic.axes:
            model_dims = [dim for dim in decode.inputs[name].shape if isinstance(dim, int)]  # heads, head size
            total += decode.dtype(name).itemsize * batch * bucket * torch.Size(model_dims).numel()
        return total

    def release(self, buffers: DecodeBuffers) -> None:
        """Keep buffers for a later generation of the same shape; drop the ones released first if there are too many."""
        constant_shapes = tuple((name, tuple(tensor.shape)) for name, tensor in buffers.constants.items())
        key = (buffers.batch, buffers.bucket, constant_shapes)
        is_full = len(self.spare_buffers) == self._max_spare
        self.spare_buffers = [*self.spare_buffers, (key, buffers)][-self._max_spare :]
        if is_full:
            free_dropped_graphs(self.device)

    def prepare(self, source: int = PAD_TO_MULTIPLE_OF) -> None:
        """Capture the decode graph for each of `capture_batch_sizes` in every bucket.

        Args:
            source: Length of the dynamic axes of the constants, in source tokens.
        """
        pairs = [(batch, bucket) for batch in self.capture_batch_sizes for bucket in self.buckets]
        for batch, bucket in progress.track(pairs, "capturing"):
            start = time.perf_counter()
            constants = {}
            for name, axes in self._padding.axes.items():
                dims = [batch if axis == "batch_size" else axis for axis in axes]
                constants[name] = tuple(source if isinstance(dim, str) else dim for dim in dims)
            with on_shared_stream(self.device):
                buffers = self.take_buffers(batch, bucket, constants)
                for _ in range(2):  # the first call runs the graph, the second captures it
                    buffers.compute_cross_caches()
                    buffers.run()
            self.release(buffers)
            logger.info("captured %d x %d in %.3f s", batch, bucket, time.perf_counter() - start)

    def close(self) -> None:
        """Drop all buffers and sessions."""
        self.spare_buffers.clear()
        self.captured_encoder = None
        self.dynamic.close()
        del self._graphs


def open_static(
    files: DeployableFiles,
    settings: SessionSettings,
    device: str,
    buckets: Sequence[int],
    *,
    session: Mapping[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
    capture: bool = False,
    capture_batch_sizes: Sequence[int] = (),
    with_encoder: bool = True,
) -> StaticCacheRuntime:
    """Open the components of a bundle or deployable that has a static decode graph.

    The merged decoder, the static decode graph and the cross-attention cache graph share their weights in memory.

    Args:
        files: Its files, at least the merged decoder and the static decode graph.
        settings: Settings of all sessions.
        device: torch's device.
        buckets: Lengths that a static cache may have, in tokens.
        session: Session configuration entries of the static graphs, in place of those in `settings`.
        environment: Environment variables of the static graphs, in place of those in `settings`.
        capture: Capture the encoder and the static graphs as CUDA graphs.
        capture_batch_sizes: Numbers of sequences, beams counted, that may be decoded at once; empty for any.
        with_encoder: Open the encoder.

    Raises:
        DeviceMemoryError: The weights don't fit into the device's memory.
    """
    torch_device = torch.device(device)
    check_weights_fit([path for path in (files.decoder, files.encoder) if path.is_file()], torch_device)
    weights = SharedWeights(torch_device)
    dynamic = open_dynamic(files, settings, device, weights.initializers(files.decoder), with_encoder=False)
    open_graph = open_capturable if capture else open_session
    if with_encoder and files.encoder.is_file():
        dynamic.encoder = BoundSession(open_graph(files.encoder, settings), torch_device)
    static_settings = replace(
        settings,
        session={**settings.session, **(session or {})},
        environment={**settings.environment, **(environment or {})},
    )
    decode, *cross = (
        BoundSession(open_graph(path, static_settings, weights.initializers(path)), torch_device)
        for path in (files.static_decode, files.cross_cache)
        if path.is_file()
    )
    return StaticCacheRuntime(dynamic, DecodeGraphs(decode, *cross), buckets, capture_batch_sizes)
