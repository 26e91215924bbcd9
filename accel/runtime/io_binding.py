"""Sessions called with torch tensors."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from accel.runtime.device_memory import translate_out_of_memory
from accel.runtime.dlpack import TYPES, OrtValueHandle, TensorExchange, Value, hold, run_with_dlpack, tensor_exchange
from accel.runtime.providers import onnxruntime
from accel.runtime.session import Session
from accel.runtime.streams import on_shared_stream, run_options

HOST = torch.device("cpu")


class BoundSession:
    """A session called with tensors by name. Outputs share ONNX Runtime's memory, which lives as long as they do.

    On CUDA a call returns before the work is done: it is queued on the stream that sessions share with torch.
    """

    def __init__(self, session: Session, device: torch.device, by: "TensorExchange | None" = None) -> None:
        self.session = session
        self.device = device if device.type == "cpu" else torch.device(device.type, device.index or 0)
        self.inputs = {spec.name: spec for spec in session.get_inputs()}
        self.outputs = {spec.name: spec for spec in session.get_outputs()}
        self.types = {name: TYPES[spec.type] for name, spec in (self.inputs | self.outputs).items()}
        self.place_of_outputs = onnxruntime.OrtDevice.make(device.type, device.index or 0)._get_c_device()
        self.options = run_options(device)
        self.tensor_exchange = by or tensor_exchange(device)

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

    def __call__(self, inputs: Mapping[str, Tensor], wanted: Sequence[str]) -> list[Tensor]:
        """Run on `feeds` and return the outputs `wanted`, in that order. Feeds the graph doesn't take are left out.

        Raises `KeyError` if an input is missing, `OutOfMemory` if the device has no room; the session stays usable.
        """
        return [value if isinstance(value, Tensor) else value.tensor() for value in self.run(inputs, wanted)]

    def run(self, inputs: Mapping[str, Value], wanted: Sequence[str], held: int = 0) -> list[Value]:
        """As a call, but the last `held` outputs may stay ONNX Runtime's, and so may feeds."""
        with on_shared_stream(self.device), translate_out_of_memory():
            given = {name: inputs[name] for name in self.inputs}
            placed = {
                name: value if isinstance(value, OrtValueHandle) else self.place(name, value)
                for name, value in given.items()
            }
            return self.tensor_exchange(self, placed, wanted, held)

    def hold(self, name: str, tensor: Tensor) -> Value:
        """`tensor` as input `name` takes it, made ready once for many runs."""
        placed = self.place(name, tensor)
        return hold(placed) if self.tensor_exchange is run_with_dlpack and placed.dtype is not torch.bool else placed


class FixedCall:
    """Calls of a session whose inputs and outputs stay where they are: bound once, run as often as they change.

    An output may be an input's own memory, where the graph writes in place. Raises `KeyError` if a tensor is missing.
    """

    def __init__(self, bound: BoundSession, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        self.bound = bound
        self.tensors = [*inputs.values(), *outputs.values()]  # bound by address: they must live as long
        self.binding = bound.session.io_binding()
        for name in bound.inputs:
            self.binding.bind_input(name, *self._where(name, inputs[name]))
        for name, tensor in outputs.items():
            self.binding.bind_output(name, *self._where(name, tensor))

    def _where(self, name: str, tensor: Tensor) -> tuple[str, int, int, tuple[int, ...], int]:
        """Device, type, shape and address, as a binding takes them."""
        dtype, number = self.bound.types[name]
        if tensor.dtype is not dtype or not tensor.is_contiguous():
            raise ValueError(f"{name}: {tensor.dtype}, where a contiguous {dtype} is to be bound")
        return tensor.device.type, tensor.device.index or 0, number, tuple(tensor.shape), tensor.data_ptr()

    def __call__(self) -> None:
        self._run(self.bound.options)

    def warm_up(self) -> None:
        """The session's first run, after which it gives back the memory that only a first one needs, to tune products.

        Later ones may not: what was recorded reads and writes memory that the session takes for free.
        """
        if not self.bound.session.warm:
            self.bound.session.warm = True
            self._run(run_options(self.bound.device, shrink=True))

    def _run(self, options: Any) -> None:
        with on_shared_stream(self.bound.device), translate_out_of_memory():
            self.bound.session.run_with_iobinding(self.binding, options)
