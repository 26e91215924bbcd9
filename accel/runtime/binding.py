"""Sessions called with torch tensors."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from accel.runtime.bridge import TYPES, Bridge, bridge
from accel.runtime.providers import onnxruntime
from accel.runtime.room import enough_memory
from accel.runtime.session import Session
from accel.runtime.stream import on_shared_stream, run_options

HOST = torch.device("cpu")


class BoundSession:
    """A session called with tensors by name. Outputs share ONNX Runtime's memory, which lives as long as they do.

    On CUDA a call returns before the work is done: it is queued on the stream that sessions share with torch.
    """

    def __init__(self, session: Session, device: torch.device, by: "Bridge | None" = None) -> None:
        self.session = session
        self.device = device if device.type == "cpu" else torch.device(device.type, device.index or 0)
        self.inputs = {port.name: port for port in session.get_inputs()}
        self.outputs = {port.name: port for port in session.get_outputs()}
        self.types = {name: TYPES[port.type] for name, port in (self.inputs | self.outputs).items()}
        self.place_of_outputs = onnxruntime.OrtDevice.make(device.type, device.index or 0)._get_c_device()
        self.options = run_options(device)
        self.bridge = by or bridge(device)

    def dtype(self, name: str) -> torch.dtype:
        """Type of an input or output."""
        return self.types[name][0]

    def place(self, name: str, tensor: Tensor) -> Tensor:
        """`tensor` as input `name` takes it; itself if it is of that type, there, and contiguous already."""
        dtype = self.types[name][0]
        # The condition of an If is read on the host: on the device it would cost a round trip at every step.
        device = HOST if dtype is torch.bool else self.device
        if tensor.dtype is not dtype or tensor.device != device or tensor.requires_grad:
            tensor = tensor.detach().to(device, dtype)
        return tensor.contiguous()

    def __call__(self, feeds: Mapping[str, Tensor], wanted: Sequence[str]) -> list[Tensor]:
        """Run on `feeds` and return the outputs `wanted`, in that order. Feeds the graph doesn't take are left out.

        Raises `KeyError` if an input is missing, `OutOfMemory` if the device has no room; the session stays usable.
        """
        with on_shared_stream(self.device), enough_memory():
            placed = {name: self.place(name, feeds[name]) for name in self.inputs}
            return self.bridge(self, placed, wanted)
