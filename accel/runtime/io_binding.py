"""ONNX Runtime sessions called with torch tensors."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from accel.runtime.device_memory import translate_out_of_memory
from accel.runtime.dlpack import (
    TYPES,
    OrtValueHandle,
    TensorExchange,
    Value,
    run_with_dlpack,
    tensor_exchange,
    to_handle,
)
from accel.runtime.layout import NUM_KEPT
from accel.runtime.providers import onnxruntime
from accel.runtime.session import Session
from accel.runtime.streams import on_shared_stream, run_options

HOST = torch.device("cpu")


class BoundSession:
    """Session called with torch tensors by name. Outputs share ONNX Runtime's memory and keep it alive.

    On CUDA a call returns before the work is done: it is queued on the stream that sessions share with torch.

    Args:
        session: The session.
        device: Device of its provider.
        exchange: Function that passes tensors to and from ONNX Runtime; None for the fastest one available.

    Attributes:
        inputs: Input -> ONNX Runtime's description: `name`, `shape` (int or axis name) and `type`.
        optional: Inputs that have a default.
        outputs: Output -> the same.
        types: Input or output -> torch dtype and the type's number in onnx.TensorProto.DataType.
    """

    def __init__(self, session: Session, device: torch.device, exchange: "TensorExchange | None" = None) -> None:
        self.session = session
        self.device = device if device.type == "cpu" else torch.device(device.type, device.index or 0)
        optional = session.get_overridable_initializers()
        self.optional = {spec.name for spec in optional}
        self.inputs = {spec.name: spec for spec in (*session.get_inputs(), *optional)}
        self.outputs = {spec.name: spec for spec in session.get_outputs()}
        self.types = {name: TYPES[spec.type] for name, spec in (self.inputs | self.outputs).items()}
        self.output_device = onnxruntime.OrtDevice.make(device.type, device.index or 0)._get_c_device()
        self.options = run_options(device)
        self.tensor_exchange = exchange or tensor_exchange(device)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of an input or output."""
        return self.types[name][0]

    def place(self, name: str, tensor: Tensor) -> Tensor:
        """Return `tensor` contiguous, on the device and in the dtype of input `name`; itself where it is so already."""
        dtype = self.types[name][0]
        # ONNX Runtime reads the condition of an If, and the bounds of a slice, on the host: on the device they would
        # cost a copy at every step.
        device = HOST if dtype is torch.bool or name == NUM_KEPT else self.device
        if tensor.dtype is not dtype or tensor.device != device or tensor.requires_grad:
            # a copy from the host is complete, for the host, when the call returns, though the device isn't waited for
            tensor = tensor.detach().to(device, dtype, non_blocking=device != HOST)
        return tensor.contiguous()

    def __call__(self, inputs: Mapping[str, Tensor], output_names: Sequence[str]) -> list[Tensor]:
        """Run the session. It stays usable after an error.

        Args:
            inputs: Input -> tensor of any dtype, device and layout. Names that the graph doesn't take are ignored.
            output_names: Outputs to return.

        Returns:
            The outputs, in the order of `output_names`.

        Raises:
            KeyError: An input is missing.
            DeviceMemoryError: The device is out of memory.
        """
        return [value if isinstance(value, Tensor) else value.tensor() for value in self.run(inputs, output_names)]

    def run(self, inputs: Mapping[str, Value], output_names: Sequence[str], handles: int = 0) -> list[Value]:
        """Run the session like a call, with OrtValue handles allowed among the inputs and outputs.

        Args:
            inputs: Input -> tensor or handle.
            output_names: Outputs to return.
            handles: Number of last outputs that may be returned as `OrtValueHandle`.

        Returns:
            The outputs, in the order of `output_names`.
        """
        with on_shared_stream(self.device), translate_out_of_memory():
            placed: dict[str, Value] = {}
            for name in self.inputs:
                if name in self.optional and name not in inputs:
                    continue
                value = inputs[name]
                placed[name] = value if isinstance(value, OrtValueHandle) else self.place(name, value)
            return self.tensor_exchange(self, placed, output_names, handles)

    def binding_arguments(self, name: str, tensor: Tensor) -> tuple[str, int, int, tuple[int, ...], int]:
        """Return what binds a tensor by its address: device type and index, type number, shape, address.

        Raises:
            ValueError: The tensor has another dtype than the input or output, or isn't contiguous.
        """
        dtype, type_number = self.types[name]
        if tensor.dtype is not dtype or not tensor.is_contiguous():
            raise ValueError(f"{name}: {tensor.dtype}, where a contiguous {dtype} is to be bound")
        return tensor.device.type, tensor.device.index or 0, type_number, tuple(tensor.shape), tensor.data_ptr()

    def bind(self, name: str, tensor: Tensor) -> Value:
        """Convert `tensor` once to what input `name` takes, for use in many runs."""
        placed = self.place(name, tensor)
        if self.tensor_exchange is run_with_dlpack and placed.dtype is not torch.bool:
            return to_handle(placed)
        return placed


class FixedCall:
    """Repeated run of a session over the same tensors, whose addresses are bound once.

    An output may share the memory of an input, for a graph that updates it in place.

    Args:
        bound: The session.
        inputs: Every input of the graph -> contiguous tensor of its dtype.
        outputs: Every output to compute -> contiguous tensor of its dtype.

    Raises:
        KeyError: An input is missing.
        ValueError: A tensor has another dtype or isn't contiguous.
    """

    def __init__(self, bound: BoundSession, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        self.bound = bound
        self.tensors = [*inputs.values(), *outputs.values()]  # bound by address, so they must be kept alive
        self.binding = bound.session.io_binding()
        for name in bound.inputs:
            self.binding.bind_input(name, *bound.binding_arguments(name, inputs[name]))
        for name, tensor in outputs.items():
            self.binding.bind_output(name, *bound.binding_arguments(name, tensor))

    def __call__(self) -> None:
        """Run the session."""
        self._run(self.bound.options)

    def warm_up(self) -> None:
        """Run the session, so that the next run allocates what a capture, which can't allocate, will need.

        From a first run with inputs of these shapes, ONNX Runtime plans one block of memory for all further ones, which
        the second run allocates. The session's very first run frees the memory that only tuning needs. Memory must not
        be freed after a later run: a captured graph reads and writes memory that the session's allocator counts as
        unused.
        """
        if not self.bound.session.warm:
            self.bound.session.warm = True
            self._run(run_options(self.bound.device, shrink=True))
        self._run(self.bound.options)

    def _run(self, options: Any) -> None:
        """Run the session with these run options."""
        with on_shared_stream(self.bound.device), translate_out_of_memory():
            self.bound.session.run_with_iobinding(self.binding, options)
