"""ONNX Runtime with a growing cache: every step returns longer caches, which the next step takes."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accel.runtime import layout
from accel.runtime.device_memory import check_weights_fit
from accel.runtime.dlpack import OrtValueHandle, Value
from accel.runtime.io_binding import BoundSession
from accel.runtime.session import SessionSettings, open_session

PAST = "past"  # the axis along which the decoder's own caches grow
MOVING = {"new", "kept", "total", PAST}  # axes of what changes with every call


@dataclass
class DynamicCacheState:
    """Caches as the graph returned them. `grown` grows with every token; `fixed` was given or made once, by prefill."""

    self_cache: Mapping[str, Value]  # cache input -> [batch, heads, length, head size]
    constants: dict[str, Tensor]  # other inputs of a step -> tensor, batch first
    axes: Mapping[str, int]  # cache input that grows -> axis of its length
    cross_caches: Collection[str] = ()  # those of `fixed` that are caches
    bound_constants: Mapping[str, Value] | None = None  # `fixed`, as a step takes it

    @property
    def self_caches(self) -> dict[str, Tensor]:
        """The caches that grow, as tensors."""
        return {
            name: value.tensor() if isinstance(value, OrtValueHandle) else value
            for name, value in self.self_cache.items()
        }

    @self_caches.setter
    def self_caches(self, tensors: Mapping[str, Tensor]) -> None:
        self.self_cache = tensors

    @property
    def length(self) -> int:
        name, value = next(iter(self.self_cache.items()))
        return value.shape[self.axes[name]]

    @property
    def batch(self) -> int:
        return next(iter(self.self_cache.values())).shape[0]

    def reorder(self, index: Tensor) -> None:
        # The beams of one input share its encoder output: what is fixed stays as it is.
        self_caches = self.self_caches
        index = index.to(next(iter(self_caches.values())).device)
        self.self_caches = {name: tensor.index_select(0, index) for name, tensor in self_caches.items()}

    def crop(self, length: int) -> None:
        self.self_caches = {
            name: tensor.narrow(self.axes[name], 0, length).contiguous() for name, tensor in self.self_caches.items()
        }

    def expand(self, times: int) -> None:
        self.select(torch.arange(self.batch).repeat_interleave(times))

    def select(self, index: Tensor) -> None:
        self.reorder(index)
        self.constants = {
            name: tensor.index_select(0, index.to(tensor.device)) for name, tensor in self.constants.items()
        }
        self.bound_constants = None

    def views(self) -> Mapping[str, Tensor]:
        return self.self_caches | {name: self.constants[name] for name in self.cross_caches}


class DynamicCacheRuntime:
    """Prefill and step over one merged decoder, or over two graphs (`prefill`, `step`) that share nothing."""

    def __init__(
        self,
        encoder: BoundSession | None,
        prefill: BoundSession,
        decode: BoundSession,
        cache: Mapping[str, str],
        flag: str | None = None,
    ) -> None:
        self.encoder, self._prefill, self._decode = encoder, prefill, decode
        self.device = decode.device
        self.dtype = decode.dtype("logits")
        self.cache = dict(cache)
        self.self_cache = {name: source for name, source in cache.items() if PAST in decode.inputs[name].shape}
        self.axes = {name: decode.inputs[name].shape.index(PAST) for name in self.self_cache}
        self.constants = [name for name, spec in decode.inputs.items() if not MOVING & set(spec.shape) and name != flag]
        self.flag = flag
        self._on, self._off = torch.ones((), dtype=torch.bool), torch.zeros((), dtype=torch.bool)

    def encode(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if self.encoder is None:
            raise TypeError("a decoder-only model has no encoder")
        names = list(self.encoder.outputs)
        return dict(zip(names, self.encoder(inputs, names), strict=True))

    def prefill(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, DynamicCacheState]:
        given = dict(inputs)
        if self.flag:
            given |= {self.flag: self._off} | self._no_past(inputs["input_ids"].shape[0])
        logits, *caches = self._prefill(given, ["logits", *self.cache.values()])
        return logits, self._state(dict(zip(self.cache, caches, strict=True)), inputs)

    def resume(self, caches: Sequence[Tensor], inputs: Mapping[str, Tensor]) -> DynamicCacheState:
        names = [*self.self_cache, *(name for name in self.cache if name not in self.self_cache)]
        given = {name: self._decode.place(name, tensor) for name, tensor in zip(names, caches, strict=True)}
        return self._state(given, inputs)

    def _state(self, present: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> DynamicCacheState:
        self_caches = {name: tensor for name, tensor in present.items() if name in self.self_cache}
        cross_caches = {name: tensor for name, tensor in present.items() if name not in self.self_cache}
        return DynamicCacheState(self_caches, self.context(inputs) | cross_caches, self.axes, cross_caches)

    def context(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `feeds` fix for a whole generation."""
        return {name: self._decode.place(name, inputs[name]) for name in self.constants if name in inputs}

    def _no_past(self, batch: int) -> dict[str, Tensor]:
        """Caches of length 0, which a merged decoder takes in place of a past; they hold no memory."""
        shapes = {name: self._decode.inputs[name].shape for name in self.cache}
        return {
            name: torch.empty(
                [batch, *(dim if isinstance(dim, int) else 0 for dim in shape[1:])],
                dtype=self._decode.dtype(name),
                device=self.device,
            )
            for name, shape in shapes.items()
        }

    def decode(self, inputs: Mapping[str, Tensor], state: DynamicCacheState) -> Tensor:
        if state.bound_constants is None:
            constants = {name: tensor for name, tensor in state.constants.items() if name in self._decode.inputs}
            state.bound_constants = {name: self._decode.hold(name, tensor) for name, tensor in constants.items()}
        given = {**inputs, **state.self_cache, **state.bound_constants} | ({self.flag: self._on} if self.flag else {})
        logits, *caches = self._decode.run(given, ["logits", *self.self_cache.values()], len(self.self_cache))
        state.self_cache = dict(zip(self.self_cache, caches, strict=True))
        return logits if isinstance(logits, Tensor) else logits.tensor()

    @property
    def decoder(self) -> BoundSession:
        """The session that steps run on."""
        return self._decode

    def close(self) -> None:
        self.encoder = None
        del self._prefill, self._decode


def open_dynamic(
    folder: Path,
    settings: SessionSettings,
    device: str = "cpu",
    weights: Mapping[str, Any] | None = None,
    with_encoder: bool = True,
) -> DynamicCacheRuntime:
    """The runtime over a deployable's (or a candidate's) folder. Raises `FileNotFoundError` if it is none.

    `weights`: those of the decoder that are in memory already, by name.
    """
    where = torch.device(device)
    files = (layout.DECODER, layout.ENCODER) if with_encoder else (layout.DECODER,)
    paths = [folder / file for file in files if (folder / file).is_file()]
    if weights is None:
        check_weights_fit(paths, where)
    decoder, *encoder = (
        BoundSession(open_session(path, settings, weights if path.name == layout.DECODER else None), where)
        for path in paths
    )
    metadata = decoder.session.get_modelmeta().custom_metadata_map
    cache, flag = json.loads(metadata[layout.CACHE]), metadata[layout.FLAG]
    return DynamicCacheRuntime(encoder[0] if encoder else None, decoder, decoder, cache, flag)
