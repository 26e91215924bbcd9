"""ONNX Runtime with dynamic KV caches: every decode step returns longer caches, which are inputs of the next one."""

import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from accel.config.engines import ONNXRUNTIME
from accel.runtime import layout
from accel.runtime.cache_buffers import CacheBuffers
from accel.runtime.cache_views import CacheViews
from accel.runtime.chunked_prefill import NEW, TOTAL, decode_in_chunks, needs_chunks, prefill_in_chunks
from accel.runtime.device_memory import check_weights_fit
from accel.runtime.dlpack import OrtValueHandle, Value
from accel.runtime.io_binding import BoundSession
from accel.runtime.protocol import C
from accel.runtime.session import SessionSettings, open_session

logger = logging.getLogger(__name__)

PAST = "past"  # token axis of the self-attention caches
# ONNX Runtime 1.31 chooses this kernel of MultiHeadAttention by the number of queries, though it is the number of keys
# that must be a multiple of four: 8 queries over 5 keys end with an error. Encoders have as many queries as keys.
# https://github.com/microsoft/onnxruntime/blob/main/onnxruntime/contrib_ops/cuda/bert/multihead_attention.cc
DECODER_ENVIRONMENT = {"ORT_DISABLE_MEMORY_EFFICIENT_ATTENTION": "1"}
CHANGING_AXES = {NEW, "kept", TOTAL, PAST}  # axes whose length changes from call to call


@dataclass
class DynamicCacheState:
    """KV caches of one generation, as the decoder returned them. Implements `protocol.State`.

    Attributes:
        self_cache_values: Self-attention cache input -> tensor or OrtValue handle, [batch, heads, length, head_size].
        constants: Other decoder input that stays the same for the whole generation -> tensor, batch first:
            cross-attention caches, the encoder's output, its mask.
        axes: Self-attention cache input -> its token axis.
        cross_caches: Names in `constants` that are cross-attention caches.
        bound_constants: `constants` as the decoder's session takes them, made by the first decode step; None before it
            and after a change of `constants`.
        buffers: The self-attention caches where decode steps extend them in place; `self_cache_values` is empty then.
    """

    self_cache_values: Mapping[str, Value]
    constants: Mapping[str, Tensor]
    axes: Mapping[str, int]
    cross_caches: Collection[str] = ()
    bound_constants: Mapping[str, Value] | None = None
    buffers: CacheBuffers | None = None

    @property
    def self_caches(self) -> CacheViews:
        """Self-attention caches as tensors, [batch, heads, length, head_size]."""
        if self.buffers is not None:
            return self.buffers.read()
        values = self.self_cache_values

        def tensor(name: str) -> Tensor:
            value = values[name]
            return value.tensor() if isinstance(value, OrtValueHandle) else value

        return CacheViews(values, tensor)

    @self_caches.setter
    def self_caches(self, tensors: Mapping[str, Tensor]) -> None:
        self.self_cache_values, self.buffers = tensors, None

    @property
    def length(self) -> int:
        """Number of decoder tokens in the caches."""
        if self.buffers is not None:
            return self.buffers.length
        name, value = next(iter(self.self_cache_values.items()))
        return value.shape[self.axes[name]]

    @property
    def batch(self) -> int:
        """Number of sequences, beams counted."""
        if self.buffers is not None:
            return self.buffers.batch
        return next(iter(self.self_cache_values.values())).shape[0]

    def reorder(self, index: Tensor) -> None:
        """Continue every sequence i from sequence `index[i]`, a beam of the same input."""
        # Constants need no reordering: the beams of one input share its encoder output.
        if self.buffers is not None and len(index) == self.buffers.batch:
            self.buffers.reorder(index)
        else:
            self._select_caches(index)

    def crop(self, length: int) -> None:
        """Drop all but the first `length` decoder tokens."""
        if self.buffers is not None:
            self.buffers.length = length
            return
        self.self_caches = {
            name: tensor.narrow(self.axes[name], 0, length).contiguous() for name, tensor in self.self_caches.items()
        }

    def reserve(self, tokens: int) -> None:
        """Do nothing: the caches grow with their tokens."""

    def expand(self, times: int) -> None:
        """Repeat every sequence `times` times: [batch, ...] -> [batch * times, ...]."""
        self.select(torch.arange(self.batch).repeat_interleave(times))

    def select(self, index: Tensor) -> None:
        """Continue with the sequences `index` [new batch] of any input."""
        self._select_caches(index)
        self.constants = {
            name: tensor.index_select(0, index.to(tensor.device)) for name, tensor in self.constants.items()
        }
        self.bound_constants = None

    def _select_caches(self, index: Tensor) -> None:
        """Replace the self-attention caches by those of the sequences `index` [new batch]."""
        caches = dict(self.self_caches)
        index = index.to(next(iter(caches.values())).device)
        self.self_caches = {name: tensor.index_select(0, index) for name, tensor in caches.items()}

    def copy(self) -> "DynamicCacheState":
        """Return an independent state with the same tokens. It shares all tensors that are never changed in place."""
        if self.buffers is not None:
            caches = {name: tensor.clone() for name, tensor in self.buffers.read().items()}
            return DynamicCacheState(caches, dict(self.constants), self.axes, self.cross_caches)
        return DynamicCacheState(self.self_cache_values, dict(self.constants), self.axes, self.cross_caches)

    def __deepcopy__(self, memo: object) -> "DynamicCacheState":
        return self.copy()

    def views(self) -> Mapping[str, Tensor]:
        """Return all caches by input name, self-attention caches first."""
        own, constants = self.self_caches, self.constants
        names = dict.fromkeys([*own, *self.cross_caches])
        return CacheViews(names, lambda name: own[name] if name in own else constants[name])


PromptEngine = Callable[[Mapping[str, Tensor]], tuple[Tensor, Mapping[str, Tensor]] | None]
"""Function of the inputs of a prefill that returns its logits and caches, by input name; None where it can't."""


class DynamicCacheRuntime:
    """Runtime over a merged decoder, or over separate prefill and decode graphs. Implements `protocol.Runtime`.

    Args:
        encoder: Session of the encoder; None for a decoder-only model.
        prefill: Session that takes no past. The same object as `decode` for a merged decoder.
        decode: Session that takes the caches of past tokens.
        cache: Cache input -> the output that becomes it at the next decode step.
        flag: Boolean input of a merged decoder that selects the branch with past; None for separate graphs.
        positions_from_mask: See `protocol.Runtime`.
        single_row_chunks: The graph takes several new tokens behind cached ones for one sequence only: a limit
            of ONNX Runtime's `GroupQueryAttention`, so `decode` runs it for each.
        prefill_chunk: Tokens of a prompt to compute at once; 0 for all.
        in_place: Decode steps extend self-attention caches in place: see `CacheBuffers`.

    Attributes:
        engine: `onnxruntime`.
        planned_prefill: Computes prompts in place of the prefill session, where it can; None without one.
        self_cache_outputs: Those items of `cache` that are self-attention caches.
        axes: Self-attention cache input -> its token axis.
        constants: Names of the decoder inputs that stay the same for a whole generation, with cross-attention caches.
        batched: Names of the decoder inputs whose first axis is the batch.
    """

    def __init__(
        self,
        encoder: BoundSession | None,
        prefill: BoundSession,
        decode: BoundSession,
        cache: Mapping[str, str],
        flag: str | None = None,
        positions_from_mask: bool = False,
        single_row_chunks: bool = False,
        prefill_chunk: int = 0,
        in_place: bool = False,
    ) -> None:
        self.encoder, self._prefill, self._decode = encoder, prefill, decode
        self.device = decode.device
        self.dtype = decode.dtype("logits")
        self.exclusive, self.engine = False, ONNXRUNTIME
        self.positions_from_mask = positions_from_mask
        self.single_row_chunks, self.prefill_chunk, self.in_place = single_row_chunks, prefill_chunk, in_place
        self.cache = dict(cache)
        self.self_cache_outputs = {name: output for name, output in cache.items() if PAST in decode.inputs[name].shape}
        self.axes = {name: decode.inputs[name].shape.index(PAST) for name in self.self_cache_outputs}
        self.constants = [
            name
            for name, spec in decode.inputs.items()
            if not CHANGING_AXES & set(spec.shape) and name not in (flag, layout.NUM_KEPT)
        ]
        batch_axis = decode.inputs["input_ids"].shape[0]
        self.batched = {name for name, spec in decode.inputs.items() if batch_axis in spec.shape[:1]}
        self.flag = flag
        self.planned_prefill: PromptEngine | None = None
        self._empty: tuple[int, Mapping[str, Value]] = (0, {})
        self._true, self._false = torch.ones((), dtype=torch.bool), torch.zeros((), dtype=torch.bool)

    def encode(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Run the encoder. Raise `TypeError` if the model has none."""
        if self.encoder is None:
            raise TypeError("a decoder-only model has no encoder")
        names = list(self.encoder.outputs)
        return dict(zip(names, self.encoder(inputs, names), strict=True))

    def prefill(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, DynamicCacheState]:
        """Run the decoder without past, over long or many prompts in chunks. Return the logits and the caches."""
        if needs_chunks(self, *inputs["input_ids"].shape):
            return prefill_in_chunks(self, inputs)
        return self.prefill_at_once(inputs)

    def prefill_at_once(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, DynamicCacheState]:
        """Run the decoder without past over whole prompts. Return logits [batch, new, vocabulary] and the caches."""
        computed = None if self.planned_prefill is None else self.planned_prefill(inputs)
        if computed is not None:
            return computed[0], self.state_over(computed[1], inputs)
        prefill_inputs: dict[str, Value] = dict(inputs)
        if self.flag:
            prefill_inputs |= {self.flag: self._false, **self._empty_caches(inputs["input_ids"].shape[0])}
        values = self._prefill.run(prefill_inputs, ["logits", *self.cache.values()])
        logits, *caches = (value if isinstance(value, Tensor) else value.tensor() for value in values)
        return logits, self.state_over(dict(zip(self.cache, caches, strict=True)), inputs)

    def resume(self, caches: Sequence[Tensor], inputs: Mapping[str, Tensor]) -> DynamicCacheState:
        """Return a state over existing caches, given in the order of `State.views`."""
        names = [*self.self_cache_outputs, *(name for name in self.cache if name not in self.self_cache_outputs)]
        placed = {name: self._decode.place(name, tensor) for name, tensor in zip(names, caches, strict=True)}
        return self.state_over(placed, inputs)

    def state_over(self, caches: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> DynamicCacheState:
        """Return a state over `caches` by input name, with the constants found in `inputs`."""
        self_caches = {name: tensor for name, tensor in caches.items() if name in self.self_cache_outputs}
        cross_caches = {name: tensor for name, tensor in caches.items() if name not in self.self_cache_outputs}
        return DynamicCacheState(self_caches, self.place_constants(inputs) | cross_caches, self.axes, cross_caches)

    def place_constants(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return those `inputs` that stay the same for a whole generation, on the device and in the graph's dtype."""
        return {name: self._decode.place(name, inputs[name]) for name in self.constants if name in inputs}

    def _empty_caches(self, batch: int) -> Mapping[str, Value]:
        """Return caches of length 0, which a merged decoder takes for a prefill. They take no device memory.

        Those of the last batch size are kept, since making two a layer delays a prompt's first kernel.
        """
        kept_batch, empty = self._empty  # read once: another thread may replace it
        if kept_batch != batch:
            empty = {}
            for name in self.cache:
                _, *dims = self._decode.inputs[name].shape
                shape = [batch, *(dim if isinstance(dim, int) else 0 for dim in dims)]  # [B, H, 0, D]
                tensor = torch.empty(shape, dtype=self._decode.dtype(name), device=self.device)
                empty[name] = self._decode.bind(name, tensor)
            self._empty = (batch, empty)
        return empty

    def decode(self, inputs: Mapping[str, Tensor], state: DynamicCacheState) -> Tensor:
        """Run the decoder over new tokens and the caches in `state`, which are replaced by the longer ones.

        Args:
            inputs: `input_ids` [batch, new] and the other inputs that change with every call.
            state: Updated in place.

        Returns:
            Logits [batch, new, vocabulary].
        """
        new = inputs["input_ids"].shape[1]
        if self.single_row_chunks and state.batch > 1 and new > 1:
            return self._decode_rows(inputs, state)
        if self.prefill_chunk and new > self.prefill_chunk:
            return decode_in_chunks(self, inputs, state)
        return self.decode_at_once(inputs, state)

    def decode_and_select(
        self, inputs: Callable[[], Mapping[str, Tensor]], state: DynamicCacheState, selection: C
    ) -> C | None:
        """Return None: every step allocates its outputs anew, so that nothing is gained by doing both at once."""
        return None

    def decode_at_once(self, inputs: Mapping[str, Tensor], state: DynamicCacheState) -> Tensor:
        """Run `decode` over all new tokens at once."""
        if self.in_place:
            return self._decode_in_place(inputs, state)
        if state.bound_constants is None:
            state.bound_constants = {
                name: self._decode.bind(name, tensor)
                for name, tensor in state.constants.items()
                if name in self._decode.inputs
            }
        decode_inputs: dict[str, Value] = {**inputs, **state.self_cache_values, **state.bound_constants}
        if self.flag:
            decode_inputs[self.flag] = self._true
        output_names = ["logits", *self.self_cache_outputs.values()]
        logits, *caches = self._decode.run(decode_inputs, output_names, handles=len(self.self_cache_outputs))
        state.self_cache_values = dict(zip(self.self_cache_outputs, caches, strict=True))
        return logits if isinstance(logits, Tensor) else logits.tensor()

    def make_room(self, state: DynamicCacheState, new: int) -> CacheBuffers:
        """Return the buffers of `state`, made or enlarged where they have no room for `new` more tokens."""
        if state.buffers is None or state.length + new > state.buffers.capacity:
            caches = dict(state.self_caches)
            state.self_caches = {}
            state.buffers = CacheBuffers(self._decode, caches, self.self_cache_outputs, self.axes, new)
        return state.buffers

    def _decode_in_place(self, inputs: Mapping[str, Tensor], state: DynamicCacheState) -> Tensor:
        """Run `decode` over caches with spare room."""
        buffers = self.make_room(state, inputs["input_ids"].shape[1])
        flag = {self.flag: self._true} if self.flag else {}
        return buffers.decode({**inputs, **state.constants, **flag})

    def _decode_rows(self, inputs: Mapping[str, Tensor], state: DynamicCacheState) -> Tensor:
        """Run the decoder over one sequence after the other; arguments and result as of `decode`."""
        logits, rows = [], []
        for i in range(state.batch):
            row = DynamicCacheState(state.self_caches, state.constants, state.axes, state.cross_caches)
            row.select(torch.tensor([i]))
            of_row = {name: tensor[i : i + 1] if name in self.batched else tensor for name, tensor in inputs.items()}
            logits.append(self.decode(of_row, row))
            rows.append(row.self_caches)
        state.self_caches = {name: torch.cat([row[name] for row in rows]) for name in self.self_cache_outputs}
        return torch.cat(logits)

    @property
    def decoder(self) -> BoundSession:
        """Session that decode steps run on."""
        return self._decode

    def close(self) -> None:
        """Drop the sessions."""
        self.encoder = None
        del self._prefill, self._decode


def open_dynamic(
    files: layout.DeployableFiles,
    settings: SessionSettings,
    device: str = "cpu",
    weights: Mapping[str, Any] | None = None,
    with_encoder: bool = True,
    prefill_chunk: int = 0,
) -> DynamicCacheRuntime:
    """Open the merged decoder, and the encoder if there is one, of a bundle or deployable.

    Args:
        files: Its files, at least the merged decoder.
        settings: Settings of both sessions.
        device: torch's device.
        weights: Initializer -> value, for weights of the decoder that are in memory already (`SharedWeights`).
        with_encoder: Open the encoder.
        prefill_chunk: Tokens of a prompt to compute at once; 0 for all.

    Raises:
        DeviceMemoryError: The weights don't fit into the device's memory.
    """
    torch_device = torch.device(device)
    settings_of = {files.decoder: replace(settings, environment={**settings.environment, **DECODER_ENVIRONMENT})}
    paths = [files.decoder, files.encoder] if with_encoder and files.encoder.is_file() else [files.decoder]
    if weights is None:
        check_weights_fit(paths, torch_device)
    decoder, *encoder = (
        BoundSession(
            open_session(path, settings_of.get(path, settings), weights if path == files.decoder else None),
            torch_device,
        )
        for path in paths
    )
    if layout.SINGLE_ROW_CHUNKS in decoder.session.get_modelmeta().custom_metadata_map and torch_device.type != "cpu":
        logger.warning(
            f"{files.folder} was built for the CPU, and its attention runs there: on {device} every step copies the "
            "caches. Build it again with runtime=cuda"
        )
    return runtime_over(decoder, encoder[0] if encoder else None, prefill_chunk)


def runtime_over(
    decoder: BoundSession, encoder: BoundSession | None = None, prefill_chunk: int = 0
) -> DynamicCacheRuntime:
    """Return the runtime over a merged decoder, with what the file's metadata says of it.

    Args:
        decoder: Session of the merged decoder.
        encoder: Session of the encoder; None for a decoder-only model.
        prefill_chunk: Tokens of a prompt to compute at once; 0 for all.
    """
    metadata = decoder.session.get_modelmeta().custom_metadata_map
    return DynamicCacheRuntime(
        encoder,
        decoder,
        decoder,
        json.loads(metadata[layout.CACHE]),
        metadata[layout.FLAG],
        positions_from_mask=metadata.get(layout.POSITIONS) == layout.POSITIONS_FROM_MASK,
        single_row_chunks=layout.SINGLE_ROW_CHUNKS in metadata,
        prefill_chunk=prefill_chunk,
        in_place=layout.IN_PLACE in metadata and decoder.device.type == "cpu",
    )
