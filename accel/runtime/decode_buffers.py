"""A slot: all that a static step reads and writes for one batch, at addresses that stay."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from accel.runtime.beam_cache import Histories
from accel.runtime.cuda_graph import Captured
from accel.runtime.io_binding import BoundSession, FixedCall
from accel.runtime.layout import BUCKET, POSITION
from accel.runtime.padding import Shape, fill

LOGITS = "logits"
ONE_TOKEN = {"new": 1, "kept": 1}


@dataclass(frozen=True)
class Graphs:
    """What computes in a slot: the step, and what makes the caches that a generation fixes, where any does."""

    step: BoundSession
    cross: BoundSession | None = None


class Slot:
    """Room for the caches of `batch` sequences of up to `bucket` tokens, and a step over them.

    `axes`: cache that grows -> axis of its tokens; `outputs`: cache -> output that holds it; `fixed`: what a generation
    fixes at its beginning, its type and the shape it has here. What a session was opened for (`open_recordable`) is
    recorded and replayed.
    """

    def __init__(
        self,
        graphs: Graphs,
        batch: int,
        bucket: int,
        axes: Mapping[str, int],
        outputs: Mapping[str, str],
        fixed: Mapping[str, tuple[torch.dtype, Shape]],
    ) -> None:
        self.step, self.batch, self.bucket = graphs.step, batch, bucket
        self.axes, self.outputs = axes, outputs
        device = graphs.step.device
        self.fixed = {name: torch.zeros(shape, dtype=dtype, device=device) for name, (dtype, shape) in fixed.items()}
        changing = [name for name in self.step.inputs if name not in axes and name not in fixed]
        self.given = {name: self._room(name, self._shape(name)) for name in changing}
        self.logits = self._room(LOGITS, self._shape(LOGITS))
        self.stacks = self._stacks()
        self.own = {
            name: cache for names, stack in self.stacks.items() for name, cache in zip(names, stack, strict=True)
        }
        self.histories = Histories(batch, bucket, device)
        written = {outputs[name]: cache for name, cache in (self.own | self.fixed).items() if name in outputs}
        self.run_step = self._calls(graphs.step, written | {LOGITS: self.logits}, "step")
        self.run_cross = self._calls(graphs.cross, written, "cross-attention cache") if graphs.cross else None

    def _shape(self, name: str) -> Shape:
        lengths = {**ONE_TOKEN, "batch": self.batch, BUCKET: self.bucket}
        port = (self.step.inputs | self.step.outputs)[name]
        return tuple(lengths[dim] if isinstance(dim, str) else dim for dim in port.shape)

    def _room(self, name: str, shape: Shape) -> Tensor:
        return torch.zeros(shape, dtype=self.step.dtype(name), device=self.step.device)

    def _stacks(self) -> dict[tuple[str, ...], Tensor]:
        """Names of caches -> [caches, *shape of one]: those of one shape lie in one tensor."""

        def kind(name: str) -> tuple[object, ...]:
            return (str(self.step.dtype(name)), self._shape(name), self.axes[name])

        stacks = {}
        for (_, shape, _), group in groupby(sorted(self.axes, key=kind), kind):
            names = tuple(group)
            stacks[names] = self._room(names[0], (len(names), *shape))  # type: ignore[misc]
        return stacks

    def _calls(self, session: BoundSession, outputs: Mapping[str, Tensor], what: str) -> Callable[[], None]:
        """Runs of `session` over this slot; of `outputs` it writes those that it has."""
        written = {name: outputs[name] for name in session.outputs}
        call = FixedCall(session, self.own | self.fixed | self.given, written)
        if not session.session.recordable:
            return call
        call.warm_up()
        return Captured(call, session.device, f"a {what} of {self.batch} x {self.bucket}")

    def begin(self, fixed: Mapping[str, Tensor]) -> None:
        """Take what a generation fixes; where there is room for more, the rest is 0, as in the mask over it.

        So are the caches: what another generation left would be masked, but not if it is no number.
        """
        for stack in self.stacks.values():
            stack.zero_()
        for name, given in fixed.items():
            fill(self.fixed[name], given)
        self.histories.begin(0)

    def write(self, caches: Mapping[str, Tensor], start: int, length: int) -> None:
        """Copy the entries `start` to `start + length` of `caches`."""
        for name, axis in self.axes.items():
            self.own[name].narrow(axis, start, length).copy_(caches[name].narrow(axis, start, length))
        self.histories.begin(start)

    def read(self, length: int) -> dict[str, Tensor]:
        """The first `length` entries, in place."""
        return {name: self.own[name].narrow(axis, 0, length) for name, axis in self.axes.items()}

    def reorder(self, index: Tensor, length: int) -> None:
        """Let sequence i hold the first `length` entries of what was sequence `index[i]`."""
        stacks = [(stack, self.axes[names[0]] + 1) for names, stack in self.stacks.items()]
        self.histories.reorder(index, length, stacks)

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

    def make_fixed(self) -> None:
        """Those of the fixed caches that are computed, from what `begin` took."""
        if self.run_cross is not None:
            self.run_cross()

    def run(self) -> Tensor:
        """The step. Returns the logits [batch, 1, vocabulary], valid until the next one."""
        self.run_step()
        return self.logits
