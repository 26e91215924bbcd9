"""A slot: all that a static step reads and writes for one batch, at addresses that stay."""

from collections.abc import Callable, Mapping
from itertools import groupby

import torch
from torch import Tensor

from accel.runtime.binding import BoundSession, FixedCall
from accel.runtime.capture import Captured
from accel.runtime.histories import Histories
from accel.runtime.layout import BUCKET, POSITION

LOGITS = "logits"
ONE_TOKEN = {"new": 1, "kept": 1}

Shapes = Mapping[str, tuple[int, ...]]
"""Input -> shape, of what a generation fixes at its beginning."""


class Slot:
    """Room for the caches of `batch` sequences of up to `bucket` tokens, and a step over them.

    `axes`: cache that grows -> axis of its tokens; `outputs`: cache -> output that holds it after a step; `fixed`: what
    a generation fixes at its beginning, and the shape it has here. With `capture`, the step is recorded and replayed.
    """

    def __init__(
        self,
        step: BoundSession,
        batch: int,
        bucket: int,
        axes: Mapping[str, int],
        outputs: Mapping[str, str],
        fixed: Shapes,
        capture: bool,
    ) -> None:
        self.step, self.batch, self.bucket = step, batch, bucket
        self.axes, self.outputs, self.capture = axes, outputs, capture
        self.fixed = {name: self._room(name, shape) for name, shape in fixed.items()}
        self.given = {
            name: self._room(name, self._shape(name)) for name in step.inputs if name not in axes and name not in fixed
        }
        self.logits = self._room(LOGITS, self._shape(LOGITS))
        self.stacks = self._stacks()
        self.own = {
            name: cache for names, stack in self.stacks.items() for name, cache in zip(names, stack, strict=True)
        }
        self.histories = Histories(batch, bucket, step.device)
        self.run_step = self._step_over()

    def _shape(self, name: str) -> tuple[int, ...]:
        lengths = {**ONE_TOKEN, "batch": self.batch, BUCKET: self.bucket}
        port = (self.step.inputs | self.step.outputs)[name]
        return tuple(lengths[dim] if isinstance(dim, str) else dim for dim in port.shape)

    def _room(self, name: str, shape: tuple[int, ...]) -> Tensor:
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

    def _step_over(self) -> Callable[[], None]:
        written = {self.outputs[name]: tensor for name, tensor in self.own.items()}
        call = FixedCall(self.step, self.own | self.fixed | self.given, written | {LOGITS: self.logits})
        if not self.capture:
            return call
        call.warm_up()
        return Captured(call, self.step.device, f"a step of {self.batch} x {self.bucket}")

    def begin(self, fixed: Mapping[str, Tensor]) -> None:
        """Take what a generation fixes; where there is room for more, the rest is 0, as in the mask over it.

        So are the caches: what another generation left would be masked, but not if it is no number.
        """
        for stack in self.stacks.values():
            stack.zero_()
        for name, room in self.fixed.items():
            given = fixed[name]
            if given.shape != room.shape:
                room.zero_()
            room[tuple(slice(length) for length in given.shape)].copy_(given)

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

    def run(self) -> Tensor:
        """The step. Returns the logits [batch, 1, vocabulary], valid until the next one."""
        self.run_step()
        return self.logits
