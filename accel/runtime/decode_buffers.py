"""A slot: all that a static step reads and writes for one batch, at addresses that stay."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from accel.runtime.beam_cache import BeamAncestry
from accel.runtime.cuda_graph import CudaGraphCallable
from accel.runtime.io_binding import BoundSession, FixedCall
from accel.runtime.layout import BUCKET, POSITION
from accel.runtime.padding import Shape, fill

LOGITS = "logits"
ONE_TOKEN = {"new": 1, "kept": 1}


@dataclass(frozen=True)
class DecodeGraphs:
    """What computes in a slot: the step, and what makes the caches that a generation fixes, where any does."""

    decode: BoundSession
    cross: BoundSession | None = None


class DecodeBuffers:
    """Room for the caches of `batch` sequences of up to `bucket` tokens, and a step over them.

    `axes`: cache that grows -> axis of its tokens; `outputs`: cache -> output that holds it; `fixed`: what a generation
    fixes at its beginning, its type and the shape it has here. What a session was opened for (`open_recordable`) is
    recorded and replayed.
    """

    def __init__(
        self,
        graphs: DecodeGraphs,
        batch: int,
        bucket: int,
        axes: Mapping[str, int],
        outputs: Mapping[str, str],
        constants: Mapping[str, tuple[torch.dtype, Shape]],
    ) -> None:
        self.decode, self.batch, self.bucket = graphs.decode, batch, bucket
        self.axes, self.outputs = axes, outputs
        device = graphs.decode.device
        self.constants = {
            name: torch.zeros(shape, dtype=dtype, device=device) for name, (dtype, shape) in constants.items()
        }
        changing = [name for name in self.decode.inputs if name not in axes and name not in constants]
        self.given = {name: self._room(name, self._shape(name)) for name in changing}
        self.logits = self._room(LOGITS, self._shape(LOGITS))
        self.stacks = self._stacks()
        self.self_caches = {
            name: cache for names, stack in self.stacks.items() for name, cache in zip(names, stack, strict=True)
        }
        self.ancestry = BeamAncestry(batch, bucket, device)
        written = {
            outputs[name]: cache for name, cache in (self.self_caches | self.constants).items() if name in outputs
        }
        self.run_decode = self._calls(graphs.decode, written | {LOGITS: self.logits}, "decode")
        self.run_cross = self._calls(graphs.cross, written, "cross-attention cache") if graphs.cross else None

    def _shape(self, name: str) -> Shape:
        lengths = {**ONE_TOKEN, "batch": self.batch, BUCKET: self.bucket}
        spec = (self.decode.inputs | self.decode.outputs)[name]
        return tuple(lengths[dim] if isinstance(dim, str) else dim for dim in spec.shape)

    def _room(self, name: str, shape: Shape) -> Tensor:
        return torch.zeros(shape, dtype=self.decode.dtype(name), device=self.decode.device)

    def _stacks(self) -> dict[tuple[str, ...], Tensor]:
        """Names of caches -> [caches, *shape of one]: those of one shape lie in one tensor."""

        def kind(name: str) -> tuple[object, ...]:
            return (str(self.decode.dtype(name)), self._shape(name), self.axes[name])

        stacks = {}
        for (_, shape, _), group in groupby(sorted(self.axes, key=kind), kind):
            names = tuple(group)
            stacks[names] = self._room(names[0], (len(names), *shape))  # type: ignore[misc]
        return stacks

    def _calls(self, session: BoundSession, outputs: Mapping[str, Tensor], what: str) -> Callable[[], None]:
        """Runs of `session` over this slot; of `outputs` it writes those that it has."""
        written = {name: outputs[name] for name in session.outputs}
        call = FixedCall(session, self.self_caches | self.constants | self.given, written)
        if not session.session.capturable:
            return call
        call.warm_up()
        return CudaGraphCallable(call, session.device, f"a {what} of {self.batch} x {self.bucket}")

    def begin(self, constants: Mapping[str, Tensor]) -> None:
        """Take what a generation fixes; where there is room for more, the rest is 0, as in the mask over it.

        So are the caches: what another generation left would be masked, but not if it is no number.
        """
        for stack in self.stacks.values():
            stack.zero_()
        for name, given in constants.items():
            fill(self.constants[name], given)
        self.ancestry.begin(0)

    def write(self, caches: Mapping[str, Tensor], start: int, length: int) -> None:
        """Copy the entries `start` to `start + length` of `caches`."""
        for name, axis in self.axes.items():
            self.self_caches[name].narrow(axis, start, length).copy_(caches[name].narrow(axis, start, length))
        self.ancestry.begin(start)

    def read(self, length: int) -> dict[str, Tensor]:
        """The first `length` entries, in place."""
        return {name: self.self_caches[name].narrow(axis, 0, length) for name, axis in self.axes.items()}

    def reorder(self, index: Tensor, length: int) -> None:
        """Let sequence i hold the first `length` entries of what was sequence `index[i]`."""
        stacks = [(stack, self.axes[names[0]] + 1) for names, stack in self.stacks.items()]
        self.ancestry.reorder(index, length, stacks)

    def write_inputs(self, inputs: Mapping[str, Tensor], length: int) -> None:
        """Put what changes with each token where the session reads it."""
        for name, tensor in self.given.items():
            if name == POSITION:
                tensor.fill_(length)
            elif tensor.shape == inputs[name].shape:
                tensor.copy_(inputs[name])
            else:  # a mask over the tokens there are: 0 for the room behind them
                tensor.zero_()
                tensor[:, : inputs[name].shape[1]].copy_(inputs[name])

    def run_cross_cache(self) -> None:
        """Those of the fixed caches that are computed, from what `begin` took."""
        if self.run_cross is not None:
            self.run_cross()

    def run(self) -> Tensor:
        """The step. Returns the logits [batch, 1, vocabulary], valid until the next one."""
        self.run_decode()
        return self.logits
