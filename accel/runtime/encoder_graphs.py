"""An encoder recorded as CUDA graphs, one for each shape of its inputs that came last."""

from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor

from accel.runtime.cuda_graph import CudaGraphCallable
from accel.runtime.device_memory import translate_out_of_memory
from accel.runtime.io_binding import BoundSession, FixedCall
from accel.runtime.padding import Padding, Shape, begin, fill, shapes
from accel.runtime.streams import on_shared_stream

KEPT = 4  # shapes
LARGEST = 16 * 2**20  # bytes of outputs; above, computing takes longer than launching


class EncoderGraph:
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
        self.run = CudaGraphCallable(call, session.device, f"an encoder over {shape}")


class CapturedEncoder:
    """Calls of an encoder's session. What comes in a shape for the second time is recorded, and from then on replayed.

    Only where outputs are as long as inputs (see `fits`), and small.
    """

    def __init__(self, session: BoundSession) -> None:
        self.session = session
        self._padding = Padding(session, session.inputs)
        self._entries: OrderedDict[tuple[tuple[str, Shape], ...], EncoderGraph] = (
            OrderedDict()
        )  # the one used last comes last

    @staticmethod
    def fits(session: BoundSession) -> bool:
        """Whether a session was opened for it, and its outputs have no length of their own."""
        known = {axis for spec in session.inputs.values() for axis in spec.shape}
        axes = {axis for spec in session.outputs.values() for axis in spec.shape if isinstance(axis, str)}
        return session.session.capturable and axes <= known

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inputs by name -> outputs by name. What the encoder doesn't take is left out."""
        with on_shared_stream(self.session.device), translate_out_of_memory():
            given = {name: self.session.place(name, inputs[name]) for name in self.session.inputs}
            padded = {name: self._padding.padded(name, shape) for name, shape in shapes(given).items()}
            outputs = self._outputs(padded)
            if self._bytes(outputs) > LARGEST:
                return dict(zip(outputs, self.session(given, list(outputs)), strict=True))
            entry = self._entry(padded, outputs)
            for name, room in entry.inputs.items():
                fill(room, given[name])
            entry.run()
            return {
                name: begin(entry.outputs[name], shape).clone() for name, shape in self._outputs(shapes(given)).items()
            }

    def _outputs(self, inputs: Mapping[str, Shape]) -> dict[str, Shape]:
        lengths = self._padding.lengths(inputs)
        specs = self.session.outputs
        return {name: tuple(lengths.get(axis, axis) for axis in spec.shape) for name, spec in specs.items()}

    def _bytes(self, outputs: Mapping[str, Shape]) -> int:
        sizes = (torch.Size(shape).numel() * self.session.dtype(name).itemsize for name, shape in outputs.items())
        return sum(sizes)

    def _entry(self, inputs: Mapping[str, Shape], outputs: Mapping[str, Shape]) -> EncoderGraph:
        kind = tuple(inputs.items())
        if kind not in self._entries:
            self._entries[kind] = EncoderGraph(self.session, inputs, outputs)
        self._entries.move_to_end(kind)
        while len(self._entries) > KEPT:
            self._entries.popitem(last=False)
        return self._entries[kind]
