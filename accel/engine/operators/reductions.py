"""Reductions along axes, and what orders or normalises along one."""

import torch
from torch import Tensor

from accel.engine.registry import operator


@operator("ReduceSum", host=(1,))
def reduce_sum(x: Tensor, axes: Tensor | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
    """Return the sum over `axes`; over all of them if there are none, unless `noop_with_empty_axes` is 1."""
    reduced = _reduced_axes(x, axes, noop_with_empty_axes)
    return x.sum(reduced, keepdim=bool(keepdims), dtype=x.dtype) if reduced else x


@operator("ReduceMax", host=(1,))
def reduce_max(x: Tensor, axes: Tensor | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
    """Return the maximum over `axes`; over all of them if there are none, unless `noop_with_empty_axes` is 1."""
    reduced = _reduced_axes(x, axes, noop_with_empty_axes)
    return x.amax(reduced, keepdim=bool(keepdims)) if reduced else x


def _reduced_axes(x: Tensor, axes: Tensor | None, noop_with_empty_axes: int) -> list[int]:
    """Return the axes to reduce; none where x is to be returned as it is."""
    named: list[int] = [] if axes is None else axes.tolist()
    return named if named or noop_with_empty_axes else list(range(x.ndim))


@operator("CumSum", host=(1,))
def cumulative_sum(x: Tensor, axis: Tensor, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """Return the sums of the elements up to each one along `axis`; without that one if `exclusive`, or from the end."""
    along = int(axis.item())
    if reverse:
        x = x.flip(along)
    sums = x.cumsum(along, dtype=x.dtype)
    if exclusive:
        first = torch.zeros_like(sums.narrow(along, 0, 1))
        sums = torch.cat([first, sums.narrow(along, 0, sums.shape[along] - 1)], along)
    return sums.flip(along) if reverse else sums


@operator("TopK", host=(1,))
def top_k(x: Tensor, k: Tensor, *, axis: int = -1, largest: int = 1, sorted: int = 1) -> tuple[Tensor, Tensor]:
    """Return the `k` largest, or smallest, elements along `axis` and their indices, in order.

    Of equal ones the first is taken, which only a stable sort promises. `sorted` = 0 allows any order, so this one too.
    """
    values, indices = x.sort(dim=axis, descending=bool(largest), stable=True)
    count = int(k.item())
    return values.narrow(axis, 0, count), indices.narrow(axis, 0, count)


@operator("Softmax")
def softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """Return exp(x) / sum(exp(x)) along `axis`; of 16-bit formats, summed in FP32."""
    return torch.softmax(x, axis)
