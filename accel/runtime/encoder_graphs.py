"""An encoder recorded as CUDA graphs, one for each shape of its inputs that came last."""

from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor

from accel.runtime.cuda_graph import Captured
from accel.runtime.device_memory import enough_memory
from accel.runtime.io_binding import BoundSession, FixedCall
from accel.runtime.padding import Padding, Shape, begin, fill, shapes
from accel.runtime.streams import on_shared_stream

KEPT = 4  # shapes
LARGEST = 16 * 2**20  # bytes of outputs; above, computing takes longer than launching


class Desk:
    """An encoder's inputs and outputs of one shape, at addresses that stay, and a call over them."""

    def __init__(self, session: BoundSession, inputs: Mapping[str, Shape], outputs: Mapping[str, Shape]) -> None:
        self.inputs, self.outputs = (
            {
                name: torch.zeros(shape, dtype=session.dtype(name), device=session.device)
                for name, shape in rooms.items()
            }
            for rooms in (inputs, outputs)
        )
        call = FixedCall(session, self.inputs, self.outputs)
        call.warm_up()
        shape = " x ".join(map(str, next(iter(inputs.values()))))
        self.run = Captured(call, session.device, f"an encoder over {shape}")


class CapturedEncoder:
    """Calls of an encoder's session. What comes in a shape for the second time is recorded, and from then on replayed.

    Only where outputs are as long as inputs (see `fits`), and small.
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
            padded = {name: self._padding.padded(name, shape) for name, shape in shapes(given).items()}
            outputs = self._outputs(padded)
            if self._bytes(outputs) > LARGEST:
                return dict(zip(outputs, self.session(given, list(outputs)), strict=True))
            desk = self._desk(padded, outputs)
            for name, room in desk.inputs.items():
                fill(room, given[name])
            desk.run()
            return {
                name: begin(desk.outputs[name], shape).clone() for name, shape in self._outputs(shapes(given)).items()
            }

    def _outputs(self, inputs: Mapping[str, Shape]) -> dict[str, Shape]:
        lengths = self._padding.lengths(inputs)
        ports = self.session.outputs
        return {name: tuple(lengths.get(axis, axis) for axis in port.shape) for name, port in ports.items()}

    def _bytes(self, outputs: Mapping[str, Shape]) -> int:
        sizes = (torch.Size(shape).numel() * self.session.dtype(name).itemsize for name, shape in outputs.items())
        return sum(sizes)

    def _desk(self, inputs: Mapping[str, Shape], outputs: Mapping[str, Shape]) -> Desk:
        kind = tuple(inputs.items())
        if kind not in self._desks:
            self._desks[kind] = Desk(self.session, inputs, outputs)
        self._desks.move_to_end(kind)
        while len(self._desks) > KEPT:
            self._desks.popitem(last=False)
        return self._desks[kind]
