"""Operators on shapes: those that read them, and those that change them without touching elements."""

from collections.abc import Sequence

import torch
from torch import Tensor

from accel.engine.registry import operator


@operator("Shape")
def shape(x: Tensor, *, start: int = 0, end: int | None = None) -> Tensor:
    """Return the lengths of the axes from `start` to before `end`, int64."""
    return torch.tensor(x.shape[start:end], dtype=torch.int64, device=x.device)


@operator("Reshape", host=(1,))
def reshape(x: Tensor, target: Tensor, *, allowzero: int = 0) -> Tensor:
    """Return x in the shape `target`, in which -1 is inferred, and 0 means the length in x unless `allowzero` is 1."""
    lengths: list[int] = target.tolist()
    if not allowzero:
        lengths = [x.shape[axis] if length == 0 else length for axis, length in enumerate(lengths)]
    return x.reshape(lengths)


@operator("Unsqueeze", host=(1,))
def unsqueeze(x: Tensor, axes: Tensor) -> Tensor:
    """Return x with new axes of length 1, at these positions of the result."""
    positions: list[int] = axes.tolist()
    rank = x.ndim + len(positions)
    for position in sorted(position % rank for position in positions):
        x = x.unsqueeze(position)
    return x


@operator("Squeeze", host=(1,))
def squeeze(x: Tensor, axes: Tensor | None = None) -> Tensor:
    """Return x without these axes, or without all that have length 1."""
    return x.squeeze() if axes is None else x.squeeze(tuple(axes.tolist()))


@operator("Transpose")
def transpose(x: Tensor, *, perm: Sequence[int] | None = None) -> Tensor:
    """Return x with its axes in the order `perm`; reversed by default."""
    return x.permute(*(range(x.ndim)[::-1] if perm is None else perm))


@operator("Expand", host=(1,))
def expand(x: Tensor, target: Tensor) -> Tensor:
    """Return x broadcast with a tensor of shape `target`, so an axis may be longer in x than there."""
    return x.expand(torch.broadcast_shapes(x.shape, target.tolist()))


@operator("Tile", host=(1,))
def tile(x: Tensor, repeats: Tensor) -> Tensor:
    """Return x repeated along each axis. An axis of length 1 is broadcast, without a copy."""
    times: list[int] = repeats.tolist()
    pairs = list(zip(x.shape, times, strict=True))
    if all(length == 1 or count == 1 for length, count in pairs):
        return x.expand([length * count for length, count in pairs])
    return x.repeat(times)


@operator("Concat")
def concat(*values: Tensor, axis: int) -> Tensor:
    """Return the tensors joined along `axis`."""
    return torch.cat(values, axis)


@operator("Split", host=(1,))
def split(x: Tensor, sizes: Tensor | None = None, *, axis: int = 0, num_outputs: int = 0) -> tuple[Tensor, ...]:
    """Return parts of x along `axis`: of these sizes, or `num_outputs` equal ones, the last of which may be smaller."""
    return torch.split(x, sizes.tolist() if sizes is not None else -(-x.shape[axis] // num_outputs), axis)


@operator("Slice", host=(1, 2, 3, 4))
def slice_(x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Tensor | None = None) -> Tensor:
    """Return x[start:end:step] along each of the axes; negative numbers as in Python, beyond the ends cut off."""
    count = len(starts)
    all_axes: list[int] = list(range(count)) if axes is None else axes.tolist()
    all_steps: list[int] = [1] * count if steps is None else steps.tolist()
    index = [slice(None)] * x.ndim
    reversed_axes = []
    for axis, start, end, step in zip(all_axes, starts.tolist(), ends.tolist(), all_steps, strict=True):
        selected = range(*slice(start, end, step).indices(x.shape[axis]))
        if step < 0:  # torch takes no negative step
            selected = selected[::-1]
            reversed_axes.append(axis)
        index[axis] = slice(selected.start, selected.stop, selected.step) if selected else slice(0)
    part = x[tuple(index)]
    return part.flip(reversed_axes) if reversed_axes else part


@operator("Range", host=(0, 1, 2))
def range_(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    """Return start, start + delta, ... up to before `limit`; empty if it is behind."""
    first, last, step = start.item(), limit.item(), delta.item()
    if (last - first) * step < 0:
        last = first
    return torch.arange(first, last, step, dtype=start.dtype, device=start.device)
