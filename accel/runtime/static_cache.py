"""Static KV caches: decode steps of one token write into caches of a bucket's length, in place.

A decode step allocates nothing and every tensor keeps its address, so that it can be captured as a CUDA graph. Prefills
and decode steps of several tokens run on the merged decoder, and their new entries are copied into the static caches.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from accel import progress
from accel.config.engines import FUSED, ONNXRUNTIME
from accel.errors import AccelError, DeviceMemoryError
from accel.runtime.buckets import Buckets
from accel.runtime.cuda_graph import free_dropped_graphs
from accel.runtime.decode_buffers import DecodeBuffers, DecodeGraphs
from accel.runtime.decode_step import SessionStep, open_decode_step
from accel.runtime.decoder_inputs import positions_are_below
from accel.runtime.device_memory import MB, check_weights_fit, free_device_memory
from accel.runtime.dynamic_cache import DynamicCacheRuntime, open_dynamic
from accel.runtime.encoder_graphs import CapturedEncoder
from accel.runtime.io_binding import BoundSession
from accel.runtime.layout import BUCKET, POSITION, POSITION_IDS, DeployableFiles
from accel.runtime.padding import PAD_TO_MULTIPLE_OF, Padding, Shape, shapes
from accel.runtime.protocol import C
from accel.runtime.ring_cache import ring_length, windows
from accel.runtime.rows import CacheRows
from accel.runtime.session import SessionSettings, open_capturable, open_session
from accel.runtime.spare_buffers import LEAST_SPARE, number_kept
from accel.runtime.static_state import StaticCacheState
from accel.runtime.streams import on_shared_stream
from accel.runtime.token_history import TokenHistory
from accel.runtime.weights import SharedWeights

logger = logging.getLogger(__name__)

BufferKey = tuple[int, int, tuple[tuple[str, Shape], ...]]
"""Batch, bucket and padded shapes of the constants: decode buffers with the same key are interchangeable."""


class StaticCacheRuntime:
    """Runtime with static caches for decode steps of one token. Implements `protocol.Runtime`.

    Args:
        dynamic: Runtime over the merged decoder, for all other calls.
        graphs: The static decode graph and, if there is one, the cross-attention cache graph.
        buckets: Lengths that a static cache may have.
        capture_batch_sizes: Numbers of sequences, beams counted, that may be decoded at once; empty for any.

    Attributes:
        engine: What computes decode steps of one token: `onnxruntime` or `fused`.
        cross_caches: Names of the cross-attention cache inputs.
        windows: Number of keys that a layer with a sliding window sees, by the axis of its caches.
        starts_static: The first token can be computed as a decode step, without a prefill.
        spare_buffers: Buffers for the next generation of the same kind; the ones released last are at the end.
        captured_encoder: Captured form of the encoder; None where it can't be captured.
    """

    def __init__(
        self,
        dynamic: DynamicCacheRuntime,
        graphs: DecodeGraphs,
        buckets: Buckets,
        capture_batch_sizes: Sequence[int] = (),
    ) -> None:
        self.dynamic, self._graphs = dynamic, graphs
        self.buckets, self.capture_batch_sizes = buckets, sorted(capture_batch_sizes)
        self.device, self.dtype, self.engine = dynamic.device, dynamic.dtype, graphs.decode.engine
        self.exclusive = True  # generations take buffers from one pool, and captured graphs share one stream
        self.positions_from_mask = dynamic.positions_from_mask
        self.cross_caches = [name for name in dynamic.cache if name not in dynamic.self_cache_outputs]
        self.windows = windows(graphs.decode.inputs)
        self.spare_buffers: list[tuple[BufferKey, DecodeBuffers]] = []
        self._max_spare = max(LEAST_SPARE, len(capture_batch_sizes) * len(buckets.lengths))
        self._padding = Padding(dynamic.decoder, dynamic.constants)
        self.starts_static = self._can_start_static()
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
        if inputs["input_ids"].shape[1] == 1 and self.starts_static:
            state = self._empty_state(inputs)
            if state is not None:
                return self._decode(inputs, state), state
        fits = self.fits_tables(inputs, 0)
        logits, dynamic = self.dynamic.prefill(inputs)
        state = StaticCacheState(self, dynamic, history=self._new_history())
        state.fits_tables = fits
        state.note(inputs)
        return logits, state

    def _new_history(self) -> TokenHistory | None:
        """Return the history of a new generation; None where all entries of the caches are kept."""
        if not self.windows:
            return None
        return TokenHistory({name: spec.shape for name, spec in self.dynamic.decoder.inputs.items()})

    def _empty_state(self, inputs: Mapping[str, Tensor]) -> StaticCacheState | None:
        """Return a state without tokens, its constants taken from `inputs` and its cross-attention caches computed.

        None if no static cache has room for a token.
        """
        constants = self.dynamic.place_constants(inputs)
        lengths = self._padding.lengths(shapes(constants))
        cross_cache_shapes = {
            name: tuple(lengths.get(axis, axis) for axis in self._padding.axes[name]) for name in self.cross_caches
        }
        constant_shapes = shapes(constants) | cross_cache_shapes
        buffers = self.take_buffers(len(inputs["input_ids"]), 1, constant_shapes)
        if buffers is None:
            return None
        buffers.reset(constants)
        buffers.compute_cross_caches()
        return StaticCacheState(self, buffers=buffers, constants=constant_shapes, history=self._new_history())

    def resume(self, caches: Sequence[Tensor], inputs: Mapping[str, Tensor]) -> StaticCacheState:
        """Return a state over existing caches, given in the order of `State.views`."""
        return StaticCacheState(self, self.dynamic.resume(caches, inputs))

    def decode(self, inputs: Mapping[str, Tensor], state: StaticCacheState) -> Tensor:
        """Run the decoder over new tokens and the caches in `state`.

        Args:
            inputs: `input_ids` [batch, new] and the other inputs that change with every call. One new token runs on the
                static decode graph if a static cache has room for it, else as several do, on the merged decoder.
            state: Updated in place; moved to a larger bucket if necessary.

        Returns:
            Logits [batch, new, vocabulary].

        Raises:
            AccelError: The batch size isn't one of `capture_batch_sizes`.
        """
        return self._decode(inputs, state)

    def _decode(self, inputs: Mapping[str, Tensor], state: StaticCacheState) -> Tensor:
        """Run `decode`; a prefill calls this, so that what is timed or counted at `decode` are decode steps alone."""
        state.fits_tables = self.fits_tables(inputs, state.length)
        one = state.fits_tables and inputs["input_ids"].shape[1] == 1
        buffers = state.make_static(state.length + 1) if one else None
        state.note(inputs)
        if buffers is None:
            return self.dynamic.decode(inputs, state.make_dynamic())
        buffers.write_inputs(inputs, state.length)
        state.advance()
        return buffers.run().clone()

    def decode_and_select(
        self, inputs: Callable[[], Mapping[str, Tensor]], state: StaticCacheState, selection: C
    ) -> C | None:
        """Run `decode` over the ids selected last, and select the next ones from its logits.

        Where decode steps are captured, one CUDA graph holds both. See `protocol.Runtime`.

        Raises:
            AccelError: The batch size isn't one of `capture_batch_sizes`.
        """
        if self.device.type == "cuda" and not self._graphs.decode.capturable:
            return None
        buffers = state.make_static(state.length + 1) if state.fits_tables else None
        if buffers is None:
            return None
        state.note_selected(selection)
        selection = buffers.decode_and_select(inputs, state.length, selection)
        state.advance()
        return selection

    def fits_tables(self, inputs: Mapping[str, Tensor], length: int) -> bool:
        """Return whether the fused engine's tables, with a row a cache entry, have the positions of new tokens."""
        looks_up = self.engine == FUSED and POSITION_IDS in self._graphs.decode.inputs
        return not looks_up or positions_are_below(length, inputs)

    def take_room(self, batch: int, tokens: int, reserved: int, constants: Mapping[str, Shape]) -> DecodeBuffers | None:
        """Return decode buffers with the room that `room` gives; arguments are those of it and of `take_buffers`."""
        room = self.room(batch, tokens, reserved)
        buffers = self.take_buffers(batch, room, constants)
        shorter = self.room(batch, tokens, reserved)
        if buffers is None or shorter == room:
            return buffers
        self.release(buffers)  # binding them showed that the step reads whole caches
        return self.take_buffers(batch, shorter, constants)

    def room(self, batch: int, tokens: int, reserved: int) -> int:
        """Return the number of tokens to make room for: all that are reserved, where that costs neither time nor much.

        For a step that reads whole caches, these move from bucket to bucket, which takes milliseconds. For one that
        reads only what is written (`DecodeStep.reads_prefix`) a long cache costs no time.

        Args:
            batch: Number of sequences, beams counted.
            tokens: Number of tokens that there must be room for.
            reserved: Number that a generation may reach; 0 if unknown.
        """
        reserved = min(reserved, self.buckets.limit or reserved)
        if reserved <= tokens or not self._graphs.decode.reads_prefix(batch):
            return tokens
        bucket = self.buckets.smallest(reserved)
        affordable = bucket is not None and self.cache_bytes(batch, bucket) <= free_device_memory(self.device) / 2
        return reserved if affordable else tokens

    def take_buffers(self, batch: int, capacity: int, constants: Mapping[str, Shape]) -> DecodeBuffers | None:
        """Return decode buffers of the smallest bucket for `capacity` tokens: spare ones if there are any, or new ones.

        Returns:
            The buffers; None if the model has fewer positions, or the device too little memory for such a bucket.

        Raises:
            AccelError: The batch size isn't one of `capture_batch_sizes`.
        """
        bucket = self.buckets.smallest(capacity)
        if bucket is None:
            return None
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
        if needed > free_device_memory(self.device):
            logger.warning(
                f"a static cache for {batch} sequences of {bucket} tokens needs {needed / MB:.0f} MB, more than the "
                "device has free: the generation goes on, slower, with caches that grow"
            )
            return None
        typed = {name: (self.dynamic.decoder.dtype(name), shape) for name, shape in padded.items()}
        return DecodeBuffers(self._graphs, batch, bucket, self.dynamic.axes, self.dynamic.cache, typed)

    def open_rows(self, capacity: int, tokens: int, source: int) -> CacheRows:
        """Return rows that hold sequences of different lengths.

        Args:
            capacity: Number of rows.
            tokens: Tokens that each row has room for; rounded up to a bucket.
            source: Length of the dynamic axes of the constants, in source tokens; rounded up where they are masked.

        Raises:
            AccelError: The model has fewer positions, the static decode graph has one position for all rows, or
                `capacity` isn't one of `capture_batch_sizes`.
            DeviceMemoryError: The device has too little memory.
        """
        if not self._graphs.decode.inputs[POSITION]:
            raise AccelError(
                "the static decode graph has one position for all rows: an earlier version of accel made it. "
                "Build the deployable again"
            )
        if self.buckets.smallest(tokens) is None:
            raise AccelError(f"max_length={tokens}: the model has {self.buckets.limit} positions")
        buffers = self.take_buffers(capacity, tokens, self._constant_shapes(capacity, source))
        if buffers is None:
            raise DeviceMemoryError(
                f"{capacity} rows of {tokens} tokens don't fit into the device's memory. Reduce capacity or max_length"
            )
        return CacheRows(self, buffers, self._padding)

    def _constant_shapes(self, batch: int, source: int) -> dict[str, Shape]:
        """Return the shapes of the constants of `batch` sequences, with `source` for their other dynamic axes."""
        lengths = {"batch_size": batch}
        axes = self._graphs.decode.inputs  # of the merged decoder, more axes are dynamic
        return {
            name: tuple(lengths.get(dim, source) if isinstance(dim, str) else dim for dim in axes[name])
            for name in self._padding.axes
        }

    def cache_bytes(self, batch: int, bucket: int) -> int:
        """Return the bytes of the self-attention caches in one set of decode buffers."""
        decode = self._graphs.decode
        lengths: dict[int | str, int] = {"batch_size": batch, BUCKET: bucket}
        lengths |= {axis: ring_length(window, bucket) for axis, window in self.windows.items()}
        total = 0
        for name in self.dynamic.axes:
            shape = [lengths.get(dim, dim) for dim in decode.inputs[name]]
            total += decode.dtype(name).itemsize * math.prod(length for length in shape if isinstance(length, int))
        return total

    def release(self, buffers: DecodeBuffers) -> None:
        """Keep buffers for a later generation of the same shape; drop the ones released first if there are too many."""
        self.spare_buffers.append(((buffers.batch, buffers.bucket, tuple(shapes(buffers.constants).items())), buffers))
        sizes = [spare.bytes for _, spare in self.spare_buffers]
        kept = number_kept(sizes, self._max_spare, buffers.capturable, self.device)
        if kept < len(sizes):
            self.spare_buffers = self.spare_buffers[-kept:]
            free_dropped_graphs(self.device)

    def prepare(self, source: int = PAD_TO_MULTIPLE_OF) -> None:
        """Capture the decode graph for each of `capture_batch_sizes` in every bucket.

        Args:
            source: Length of the dynamic axes of the constants, in source tokens.
        """
        pairs = [(batch, bucket) for batch in self.capture_batch_sizes for bucket in self.buckets.lengths]
        for batch, bucket in progress.track(pairs, "capturing"):
            constants = self._constant_shapes(batch, source)
            with on_shared_stream(self.device):
                buffers = self.take_buffers(batch, bucket, constants)
                if buffers is None:
                    continue
                for _ in range(2):  # the first call runs the graph, the second captures it
                    buffers.compute_cross_caches()
                    buffers.run()
            self.release(buffers)

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
    buckets: Buckets,
    *,
    session: Mapping[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
    engine: str = ONNXRUNTIME,
    tune: bool = False,
    capture: bool = False,
    capture_batch_sizes: Sequence[int] = (),
    with_encoder: bool = True,
    prefill_chunk: int = 0,
    fused_prefill: int = 0,
) -> StaticCacheRuntime:
    """Open the components of a bundle or deployable that has a static decode graph.

    The merged decoder, the static decode graph and the cross-attention cache graph share their weights in memory.

    Args:
        files: Its files, at least the merged decoder and the static decode graph.
        settings: Settings of all sessions.
        device: torch's device.
        buckets: Lengths that a static cache may have.
        session: Session configuration entries of the static graphs, in place of those in `settings`.
        environment: Environment variables of the static graphs, in place of those in `settings`.
        engine: What computes decode steps of one token: one of `accel.config.engines.ENGINES`.
        tune: Let the fused engine measure settings of its kernel.
        capture: Capture the encoder and the static graphs as CUDA graphs.
        capture_batch_sizes: Numbers of sequences, beams counted, that may be decoded at once; empty for any.
        with_encoder: Open the encoder.
        prefill_chunk: Tokens of a prompt to compute at once; 0 for all.
        fused_prefill: Number of tokens of all prompts from which on the fused engine computes them.

    Raises:
        AccelError: The engine can't run the static decode graph.
        DeviceMemoryError: The weights don't fit into the device's memory.
    """
    torch_device = torch.device(device)
    check_weights_fit([path for path in (files.decoder, files.encoder) if path.is_file()], torch_device)
    weights = SharedWeights(torch_device)
    initializers = weights.initializers(files.decoder)
    dynamic = open_dynamic(files, settings, device, initializers, with_encoder=False, prefill_chunk=prefill_chunk)
    open_graph = open_capturable if capture else open_session
    if with_encoder and files.encoder.is_file():
        dynamic.encoder = BoundSession(open_graph(files.encoder, settings), torch_device)
    environment = {**settings.environment, **(environment or {})}
    static_settings = replace(settings, session={**settings.session, **(session or {})}, environment=environment)

    def open_bound(path: Path) -> BoundSession:
        """Open a session of a static graph."""
        return BoundSession(open_graph(path, static_settings, weights.initializers(path)), torch_device)

    decode = open_decode_step(files, engine, weights, capture, open_bound, tune)
    dynamic.planned_prefill = decode.prompt_engine(fused_prefill)
    cross = SessionStep(open_bound(files.cross_cache)) if files.cross_cache.is_file() else None
    return StaticCacheRuntime(dynamic, DecodeGraphs(decode, cross), buckets, capture_batch_sizes)
