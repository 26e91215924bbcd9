"""Padding of masked axes to a multiple of 16, so that similar lengths share buffers and CUDA graphs."""

from collections.abc import Collection, Mapping

from torch import Tensor

from accel.runtime.io_binding import BoundSession

PAD_TO_MULTIPLE_OF = 16  # source tokens
Shape = tuple[int, ...]


class Padding:
    """Padded shapes of inputs of a session. An axis is padded if some input named `*mask` has the shape [batch, axis].

    Args:
        session: The session.
        names: Inputs to pad.

    Attributes:
        axes: Input -> its shape in the graph, names for dynamic axes.
    """

    def __init__(self, session: BoundSession, names: Collection[str]) -> None:
        self.axes = {name: tuple(session.inputs[name].shape) for name in names}
        self.masked = {axes[1] for name, axes in self.axes.items() if name.endswith("mask") and len(axes) == 2}

    def padded(self, name: str, shape: Shape) -> Shape:
        """Return the shape of input `name` with its masked axes rounded up."""
        padded_shape = []
        for axis, length in zip(self.axes[name], shape, strict=True):
            if axis in self.masked:
                multiples = (length + PAD_TO_MULTIPLE_OF - 1) // PAD_TO_MULTIPLE_OF
                length = multiples * PAD_TO_MULTIPLE_OF
            padded_shape.append(length)
        return tuple(padded_shape)

    def lengths(self, shapes: Mapping[str, Shape]) -> dict[int | str, int]:
        """Return axis -> length, for inputs of these shapes."""
        return {
            axis: length for name, shape in shapes.items() for axis, length in zip(self.axes[name], shape, strict=True)
        }


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    """Return the shape of every tensor."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def copy_padded(target: Tensor, source: Tensor) -> None:
    """Copy `source` to the beginning of `target` along every axis, and fill the rest of `target` with zeros."""
    if source.shape != target.shape:
        target.zero_()
    leading_view(target, tuple(source.shape)).copy_(source)


def leading_view(tensor: Tensor, shape: Shape) -> Tensor:
    """Return a view of the first `shape[i]` elements of `tensor` along every axis i."""
    return tensor[tuple(slice(length) for length in shape)]
