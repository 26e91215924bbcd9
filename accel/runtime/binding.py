"""Calls a session on torch tensors without copying: inputs by address, outputs where ONNX Runtime allocates them."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

if TYPE_CHECKING:
    import onnxruntime

# ONNX Runtime names element types as C++ does; the numbers are onnx.TensorProto's.
TYPES = {
    "tensor(float)": (torch.float32, 1),
    "tensor(int32)": (torch.int32, 6),
    "tensor(int64)": (torch.int64, 7),
    "tensor(bool)": (torch.bool, 9),
    "tensor(float16)": (torch.float16, 10),
    "tensor(double)": (torch.float64, 11),
    "tensor(bfloat16)": (torch.bfloat16, 16),
}


class BoundSession:
    """A session called with tensors by name. Outputs share ONNX Runtime's memory, which lives as long as they do."""

    def __init__(self, session: "onnxruntime.InferenceSession", device: torch.device) -> None:
        self.session = session
        self.device = device
        self.inputs = {port.name: port for port in session.get_inputs()}
        self.outputs = {port.name: port for port in session.get_outputs()}

    def dtype(self, name: str) -> torch.dtype:
        """Type of an input or output."""
        port = self.inputs.get(name) or self.outputs[name]
        return TYPES[port.type][0]

    def __call__(self, feeds: Mapping[str, Tensor], wanted: Sequence[str]) -> list[Tensor]:
        """Run on `feeds` and return the outputs `wanted`, in that order. Feeds the graph doesn't take are left out."""
        binding = self.session.io_binding()
        held = []  # what is bound by address must outlive the run
        for name, port in self.inputs.items():
            dtype, number = TYPES[port.type]
            # The condition of an If is read on the host: on the device it would cost a round trip at every step.
            device = torch.device("cpu") if dtype is torch.bool else self.device
            tensor = feeds[name].to(device, dtype).contiguous()
            held.append(tensor)
            binding.bind_input(name, device.type, device.index or 0, number, tuple(tensor.shape), tensor.data_ptr())
        for name in wanted:
            binding.bind_output(name, self.device.type, self.device.index or 0)
        self.session.run_with_iobinding(binding)
        return [from_dlpack(value) for value in binding.get_outputs()]
