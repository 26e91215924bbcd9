"""ONNX Runtime with a growing cache: every step returns longer caches, which the next step takes."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accel.runtime import layout
from accel.runtime.device_memory import check_room
from accel.runtime.dlpack import Held, Value
from accel.runtime.io_binding import BoundSession
from accel.runtime.session import SessionSettings, open_session

PAST = "past"  # the axis along which the decoder's own caches grow
MOVING = {"new", "kept", "total", PAST}  # axes of what changes with every call


@dataclass
class GrowingState:
    """Caches as the graph returned them. `grown` grows with every token; `fixed` was given or made once, by prefill."""

    grown: Mapping[str, Value]  # cache input -> [batch, heads, length, head size]
    fixed: dict[str, Tensor]  # other inputs of a step -> tensor, batch first
    axes: Mapping[str, int]  # cache input that grows -> axis of its length
    made: Collection[str] = ()  # those of `fixed` that are caches
    ready: Mapping[str, Value] | None = None  # `fixed`, as a step takes it

    @property
    def own(self) -> dict[str, Tensor]:
        """The caches that grow, as tensors."""
        return {name: value.tensor() if isinstance(value, Held) else value for name, value in self.grown.items()}

    @own.setter
    def own(self, tensors: Mapping[str, Tensor]) -> None:
        self.grown = tensors

    @property
    def length(self) -> int:
        name, value = next(iter(self.grown.items()))
        return value.shape[self.axes[name]]

    @property
    def batch(self) -> int:
        return next(iter(self.grown.values())).shape[0]

    def reorder(self, index: Tensor) -> None:
        # The beams of one input share its encoder output: what is fixed stays as it is.
        own = self.own
        index = index.to(next(iter(own.values())).device)
        self.own = {name: tensor.index_select(0, index) for name, tensor in own.items()}

    def crop(self, length: int) -> None:
        self.own = {name: tensor.narrow(self.axes[name], 0, length).contiguous() for name, tensor in self.own.items()}

    def expand(self, times: int) -> None:
        self.select(torch.arange(self.batch).repeat_interleave(times))

    def select(self, index: Tensor) -> None:
        self.reorder(index)
        self.fixed = {name: tensor.index_select(0, index.to(tensor.device)) for name, tensor in self.fixed.items()}
        self.ready = None

    def views(self) -> Mapping[str, Tensor]:
        return self.own | {name: self.fixed[name] for name in self.made}


class GrowingRuntime:
    """Prefill and step over one merged decoder, or over two graphs (`prefill`, `step`) that share nothing."""

    def __init__(
        self,
        encoder: BoundSession | None,
        prefill: BoundSession,
        step: BoundSession,
        cache: Mapping[str, str],
        flag: str | None = None,
    ) -> None:
        self.encoder, self._prefill, self._step = encoder, prefill, step
        self.device = step.device
        self.dtype = step.dtype("logits")
        self.cache = dict(cache)
        self.grown = {name: source for name, source in cache.items() if PAST in step.inputs[name].shape}
        self.axes = {name: step.inputs[name].shape.index(PAST) for name in self.grown}
        self.fixed = [name for name, port in step.inputs.items() if not MOVING & set(port.shape) and name != flag]
        self.flag = flag
        self._on, self._off = torch.ones((), dtype=torch.bool), torch.zeros((), dtype=torch.bool)

    def encode(self, feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if self.encoder is None:
            raise TypeError("a decoder-only model has no encoder")
        names = list(self.encoder.outputs)
        return dict(zip(names, self.encoder(feeds, names), strict=True))

    def prefill(self, feeds: Mapping[str, Tensor]) -> tuple[Tensor, GrowingState]:
        given = dict(feeds)
        if self.flag:
            given |= {self.flag: self._off} | self._no_past(feeds["input_ids"].shape[0])
        logits, *caches = self._prefill(given, ["logits", *self.cache.values()])
        return logits, self._state(dict(zip(self.cache, caches, strict=True)), feeds)

    def resume(self, caches: Sequence[Tensor], feeds: Mapping[str, Tensor]) -> GrowingState:
        names = [*self.grown, *(name for name in self.cache if name not in self.grown)]
        given = {name: self._step.place(name, tensor) for name, tensor in zip(names, caches, strict=True)}
        return self._state(given, feeds)

    def _state(self, present: Mapping[str, Tensor], feeds: Mapping[str, Tensor]) -> GrowingState:
        own = {name: tensor for name, tensor in present.items() if name in self.grown}
        made = {name: tensor for name, tensor in present.items() if name not in self.grown}
        return GrowingState(own, self.context(feeds) | made, self.axes, made)

    def context(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `feeds` fix for a whole generation."""
        return {name: self._step.place(name, feeds[name]) for name in self.fixed if name in feeds}

    def _no_past(self, batch: int) -> dict[str, Tensor]:
        """Caches of length 0, which a merged decoder takes in place of a past; they hold no memory."""
        shapes = {name: self._step.inputs[name].shape for name in self.cache}
        return {
            name: torch.empty(
                [batch, *(dim if isinstance(dim, int) else 0 for dim in shape[1:])],
                dtype=self._step.dtype(name),
                device=self.device,
            )
            for name, shape in shapes.items()
        }

    def step(self, feeds: Mapping[str, Tensor], state: GrowingState) -> Tensor:
        if state.ready is None:
            fixed = {name: tensor for name, tensor in state.fixed.items() if name in self._step.inputs}
            state.ready = {name: self._step.hold(name, tensor) for name, tensor in fixed.items()}
        given = {**feeds, **state.grown, **state.ready} | ({self.flag: self._on} if self.flag else {})
        logits, *caches = self._step.run(given, ["logits", *self.grown.values()], len(self.grown))
        state.grown = dict(zip(self.grown, caches, strict=True))
        return logits if isinstance(logits, Tensor) else logits.tensor()

    @property
    def decoder(self) -> BoundSession:
        """The session that steps run on."""
        return self._step

    def close(self) -> None:
        self.encoder = None
        del self._prefill, self._step


def open_growing(
    folder: Path,
    settings: SessionSettings,
    device: str = "cpu",
    weights: Mapping[str, Any] | None = None,
    with_encoder: bool = True,
) -> GrowingRuntime:
    """The runtime over a deployable's (or a candidate's) folder. Raises `FileNotFoundError` if it is none.

    `weights`: those of the decoder that are in memory already, by name.
    """
    where = torch.device(device)
    files = (layout.DECODER, layout.ENCODER) if with_encoder else (layout.DECODER,)
    paths = [folder / file for file in files if (folder / file).is_file()]
    if weights is None:
        check_room(paths, where)
    decoder, *encoder = (
        BoundSession(open_session(path, settings, weights if path.name == layout.DECODER else None), where)
        for path in paths
    )
    metadata = decoder.session.get_modelmeta().custom_metadata_map
    cache, flag = json.loads(metadata[layout.CACHE]), metadata[layout.FLAG]
    return GrowingRuntime(encoder[0] if encoder else None, decoder, decoder, cache, flag)
