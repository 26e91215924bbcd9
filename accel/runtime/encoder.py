"""An encoder recorded as CUDA graphs, one for each shape of its inputs that came last."""

from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor

from accel.runtime.binding import BoundSession, FixedCall
from accel.runtime.capture import Captured
from accel.runtime.padding import Padding, Shape, begin, fill, shapes
from accel.runtime.room import enough_memory
from accel.runtime.stream import on_shared_stream

KEPT = 4  # shapes


class Desk:
    """An encoder's inputs and outputs of one shape, at addresses that stay, and a call over them."""

    def __init__(self, session: BoundSession, shapes: Mapping[str, Shape], lengths: Mapping[int | str, int]) -> None:
        """`lengths`: those of all axes."""
        self.inputs = {name: self._room(session, name, shape) for name, shape in shapes.items()}
        self.outputs = {
            name: self._room(session, name, tuple(lengths.get(axis, axis) for axis in port.shape))
            for name, port in session.outputs.items()
        }
        call = FixedCall(session, self.inputs, self.outputs)
        call.warm_up()
        self.run = Captured(
            call, session.device, f"an encoder over {' x '.join(map(str, next(iter(shapes.values()))))}"
        )

    @staticmethod
    def _room(session: BoundSession, name: str, shape: Shape) -> Tensor:
        return torch.zeros(shape, dtype=session.dtype(name), device=session.device)


class CapturedEncoder:
    """Calls of an encoder's session. What comes in a shape for the second time is recorded, and from then on replayed.

    Only where outputs are as long as inputs: see `fits`.
    """

    def __init__(self, session: BoundSession) -> None:
        self.session = session
        self._padding = Padding(session, session.inputs)
        self._desks: OrderedDict[tuple[tuple[str, Shape], ...], Desk] = OrderedDict()  # the one used last comes last

    @staticmethod
    def fits(session: BoundSession) -> bool:
        """Whether a session was opened for it, and its outputs have no length of their own."""
        known = {axis for port in session.inputs.values() for axis in port.shape}
        axes = {axis for port in session.outputs.values() for axis in port.shape if isinstance(axis, str)}
        return session.session.recordable and axes <= known

    def __call__(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inputs by name -> outputs by name. What the encoder doesn't take is left out."""
        with on_shared_stream(self.session.device), enough_memory():
            given = {name: self.session.place(name, feeds[name]) for name in self.session.inputs}
            lengths = self._padding.lengths(shapes(given))
            desk = self._desk({name: self._padding.padded(name, shape) for name, shape in shapes(given).items()})
            for name, room in desk.inputs.items():
                fill(room, given[name])
            desk.run()
            ports = self.session.outputs
            wanted = {name: tuple(lengths.get(axis, axis) for axis in ports[name].shape) for name in desk.outputs}
            return {name: begin(room, wanted[name]).clone() for name, room in desk.outputs.items()}

    def _desk(self, shapes: Mapping[str, Shape]) -> Desk:
        kind = tuple(shapes.items())
        if kind not in self._desks:
            self._desks[kind] = Desk(self.session, shapes, self._padding.lengths(shapes))
        self._desks.move_to_end(kind)
        while len(self._desks) > KEPT:
            self._desks.popitem(last=False)
        return self._desks[kind]
