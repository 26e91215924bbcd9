"""Calls a session on torch tensors without copying: inputs by address, outputs where ONNX Runtime allocates them."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from accel.runtime.bridge import TYPES, Bridge, bridge
from accel.runtime.room import enough_memory
from accel.runtime.stream import on_shared_stream, run_options, turn

if TYPE_CHECKING:
    import onnxruntime

HOST = torch.device("cpu")


class BoundSession:
    """A session called with tensors by name. Outputs share ONNX Runtime's memory, which lives as long as they do.

    On CUDA a call returns before the work is done: it is queued on the stream that sessions share with torch.
    """

    def __init__(self, session: "onnxruntime.InferenceSession", device: torch.device, by: Bridge | None = None) -> None:
        self.session = session
        self.device = device
        self.inputs = {port.name: port for port in session.get_inputs()}
        self.outputs = {port.name: port for port in session.get_outputs()}
        self.types = {name: TYPES[port.type] for name, port in (self.inputs | self.outputs).items()}
        self.bridge = by or bridge(device)
        self.options = run_options(device)
        self.turn = turn(device)

    def dtype(self, name: str) -> torch.dtype:
        """Type of an input or output."""
        return self.types[name][0]

    def place(self, name: str, tensor: Tensor) -> Tensor:
        """`tensor` as input `name` takes it; itself if it is of that type, there, and contiguous already."""
        dtype = self.types[name][0]
        # The condition of an If is read on the host: on the device it would cost a round trip at every step.
        return tensor.to(HOST if dtype is torch.bool else self.device, dtype).contiguous()

    def __call__(self, feeds: Mapping[str, Tensor], wanted: Sequence[str]) -> list[Tensor]:
        """Run on `feeds` and return the outputs `wanted`, in that order. Feeds the graph doesn't take are left out.

        Raises `KeyError` if an input is missing, `OutOfMemory` if the device has no room; the session stays usable.
        """
        return Binding(self, {})(feeds, wanted)


class Binding:
    """A session with some inputs given for good: `fixed` is bound once, not at every call."""

    def __init__(self, bound: BoundSession, fixed: Mapping[str, Tensor]) -> None:
        self._bound = bound
        self._binding = bound.session.io_binding()
        with on_shared_stream(bound.device):
            self._fixed = {name: self._bind(name, fixed[name]) for name in bound.inputs if name in fixed}

    def __call__(self, feeds: Mapping[str, Tensor], wanted: Sequence[str]) -> list[Tensor]:
        """As `BoundSession`'s, with the inputs that are not fixed."""
        bound, binding = self._bound, self._binding
        with on_shared_stream(bound.device), enough_memory():
            # What is bound by address must outlive the run.
            held = [self._bind(name, feeds[name]) for name in bound.inputs if name not in self._fixed]
            for name in wanted:
                binding.bind_output(name, bound.device.type, bound.device.index or 0)
            with bound.turn:
                bound.session.run_with_iobinding(binding, bound.options)
            del held
            return [bound.bridge(value, bound.session) for value in binding.get_outputs_as_ortvaluevector()]

    def _bind(self, name: str, given: Tensor) -> Tensor:
        tensor = self._bound.place(name, given)
        where, number = tensor.device, self._bound.types[name][1]
        self._binding.bind_input(name, where.type, where.index or 0, number, tuple(tensor.shape), tensor.data_ptr())
        return tensor
