"""Encoder runs captured as CUDA graphs, one for each of the input shapes used last."""

from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor

from accel.runtime.cuda_graph import CudaGraphCallable, free_dropped_graphs
from accel.runtime.device_memory import translate_out_of_memory
from accel.runtime.io_binding import BoundSession, FixedCall
from accel.runtime.padding import Padding, Shape, copy_padded, leading_view, shapes
from accel.runtime.streams import on_shared_stream

MAX_GRAPHS = 16  # input shapes whose graphs are kept
MAX_OUTPUT_BYTES = 16 * 2**20  # above, computing takes longer than launching, so that a CUDA graph gains nothing


class EncoderGraph:
    """Inputs and outputs of an encoder for one input shape, at constant addresses, and a call bound to them.

    Args:
        session: The encoder's session.
        inputs: Input -> its shape.
        outputs: Output -> its shape.
    """

    @torch.inference_mode(False)  # tensors made in inference mode can't be written outside of it, in a later generation
    def __init__(self, session: BoundSession, inputs: Mapping[str, Shape], outputs: Mapping[str, Shape]) -> None:
        self.inputs = _allocate(session, inputs)
        self.outputs = _allocate(session, outputs)
        call = FixedCall(session, self.inputs, self.outputs)
        call.warm_up()
        shape = " x ".join(map(str, next(iter(inputs.values()))))
        self.run = CudaGraphCallable(call, session.device, f"the encoder for inputs of shape {shape}")


def _allocate(session: BoundSession, shapes_by_name: Mapping[str, Shape]) -> dict[str, Tensor]:
    """Allocate zeros for inputs or outputs of a session."""
    return {
        name: torch.zeros(shape, dtype=session.dtype(name), device=session.device)
        for name, shape in shapes_by_name.items()
    }


class CapturedEncoder:
    """Encoder session whose runs are captured as CUDA graphs: an input shape is captured when it comes a second time.

    Masked axes are padded (`Padding`), and the number of sequences is rounded up to a power of 2, so that similar
    shapes share a graph. Runs with outputs of more than `MAX_OUTPUT_BYTES` are ordinary runs.

    Args:
        session: A session that `supports` returns True for.
    """

    def __init__(self, session: BoundSession) -> None:
        self.session = session
        self._padding = Padding(session, session.inputs)
        # padded input shapes -> graph, the one used last at the end
        self.graphs: OrderedDict[tuple[tuple[str, Shape], ...], EncoderGraph] = OrderedDict()

    @staticmethod
    def supports(session: BoundSession) -> bool:
        """Return True if the session can be captured and every dynamic axis of its outputs is an axis of its inputs."""
        input_axes = {axis for spec in session.inputs.values() for axis in spec.shape}
        output_axes = {axis for spec in session.outputs.values() for axis in spec.shape if isinstance(axis, str)}
        return session.session.capturable and output_axes <= input_axes

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the encoder.

        Args:
            inputs: Input -> tensor, unpadded. Names that the graph doesn't take are ignored.

        Returns:
            Output -> a tensor of its own, with the lengths of `inputs`.

        Raises:
            KeyError: An input is missing.
            DeviceMemoryError: The device is out of memory.
        """
        with on_shared_stream(self.session.device), translate_out_of_memory():
            placed = {name: self.session.place(name, inputs[name]) for name in self.session.inputs}
            padded_shapes = {name: self._padded(name, shape) for name, shape in shapes(placed).items()}
            padded_outputs = self._output_shapes(padded_shapes)
            if self._bytes(padded_outputs) > MAX_OUTPUT_BYTES:
                return dict(zip(padded_outputs, self.session(placed, list(padded_outputs)), strict=True))
            entry = self._entry(padded_shapes, padded_outputs)
            for name, buffer in entry.inputs.items():
                copy_padded(buffer, placed[name])
            entry.run()
            # The next run overwrites the graph's outputs: return copies.
            return {
                name: leading_view(entry.outputs[name], shape).clone()
                for name, shape in self._output_shapes(shapes(placed)).items()
            }

    def _padded(self, name: str, shape: Shape) -> Shape:
        """Return the shape of an input in a graph's buffers."""
        batch, *others = self._padding.padded(name, shape)
        return 1 << (batch - 1).bit_length(), *others

    def _output_shapes(self, inputs: Mapping[str, Shape]) -> dict[str, Shape]:
        """Return the outputs' shapes for inputs of these shapes."""
        lengths = self._padding.lengths(inputs)
        specs = self.session.outputs
        return {name: tuple(lengths.get(axis, axis) for axis in spec.shape) for name, spec in specs.items()}

    def _bytes(self, outputs: Mapping[str, Shape]) -> int:
        """Return the bytes of outputs of these shapes."""
        sizes = (torch.Size(shape).numel() * self.session.dtype(name).itemsize for name, shape in outputs.items())
        return sum(sizes)

    def _entry(self, inputs: Mapping[str, Shape], outputs: Mapping[str, Shape]) -> EncoderGraph:
        """Return the graph for these input shapes; drop the ones that weren't used for longest."""
        key = tuple(inputs.items())
        if key not in self.graphs:
            self.graphs[key] = EncoderGraph(self.session, inputs, outputs)
        self.graphs.move_to_end(key)
        if len(self.graphs) > MAX_GRAPHS:
            self.graphs.popitem(last=False)
            free_dropped_graphs(self.session.device)
        return self.graphs[key]
