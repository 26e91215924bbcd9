"""Lengths rounded up where a mask hides the rest, so that few shapes have to be made ready."""

from collections.abc import Collection, Mapping

from torch import Tensor

from accel.runtime.io_binding import BoundSession

STEP = 16  # source lengths are rounded up to a multiple of it
Shape = tuple[int, ...]


class Padding:
    """The shapes that inputs `names` of a session are given. An axis is rounded up if there is a mask [batch, axis]."""

    def __init__(self, session: BoundSession, names: Collection[str]) -> None:
        self.axes = {name: tuple(session.inputs[name].shape) for name in names}
        self.masked = {axes[1] for name, axes in self.axes.items() if name.endswith("mask") and len(axes) == 2}

    def padded(self, name: str, shape: Shape) -> Shape:
        """What an input of `shape` becomes."""
        return tuple(
            -(-length // STEP) * STEP if axis in self.masked else length
            for axis, length in zip(self.axes[name], shape, strict=True)
        )

    def lengths(self, shapes: Mapping[str, Shape]) -> dict[int | str, int]:
        """Axis -> its length in `shapes`."""
        return {
            axis: length for name, shape in shapes.items() for axis, length in zip(self.axes[name], shape, strict=True)
        }


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def fill(room: Tensor, given: Tensor) -> None:
    """Copy `given` to the beginning of `room`; the rest becomes 0."""
    if given.shape != room.shape:
        room.zero_()
    begin(room, tuple(given.shape)).copy_(given)


def begin(room: Tensor, shape: Shape) -> Tensor:
    """The beginning of `room` along every axis, in place."""
    return room[tuple(map(slice, shape))]
