"""Reads and writes at indices that are data. Negative indices count from the end of their axis."""

import torch
from torch import Tensor

from accel.engine.registry import operator, unsupported


@operator("Gather")
def gather(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    """Return the entries of x at `indices` along `axis`, whose place the axes of `indices` take."""
    # Not x[indices]: in Python, torch reads an index without axes on the host.
    return torch.ops.aten.index(x, [None] * (axis % x.ndim) + [indices])  # type: ignore[no-any-return]


@operator("GatherElements")
def gather_elements(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    """Return, for every element of `indices`, the one of x at the same position, but at that index along `axis`."""
    return torch.gather(x, axis, torch.where(indices < 0, indices + x.shape[axis], indices))


@operator("GatherND")
def gather_nd(x: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    """Return the entries of x at `indices` [..., K], which index the first K axes."""
    if batch_dims:
        raise unsupported("batch_dims", batch_dims, "0")
    return torch.ops.aten.index(x, indices.unbind(-1))  # type: ignore[no-any-return]


@operator("ScatterND", writes={0: 0})
def scatter_nd(x: Tensor, indices: Tensor, updates: Tensor, *, reduction: str = "none") -> Tensor:
    """Write `updates` to x at `indices` [..., K], which index the first K axes, or add them."""
    if reduction not in ("none", "add"):
        raise unsupported("reduction", reduction, "'none' and 'add'")
    return x.index_put_(indices.unbind(-1), updates, accumulate=reduction == "add")


@operator("TensorScatter", writes={0: 0})
def tensor_scatter(
    cache: Tensor, update: Tensor, starts: Tensor | None = None, *, axis: int = -2, mode: str = "linear"
) -> Tensor:
    """Write new entries to a cache, at a position of its own for each sequence.

    Args:
        cache: [B, ..., S, ...], S along `axis`.
        update: The same shape, but for the number of new entries N along `axis`.
        starts: Position of the first new entry of each sequence, int64 [B]; 0 by default.
        axis: Axis of positions.
        mode: `linear`, or `circular` where positions go on at 0 after the last one.
    """
    if mode not in ("linear", "circular"):
        raise unsupported("mode", mode, "'linear' and 'circular'")
    new = update.shape[axis]
    if starts is None:
        starts = torch.zeros(len(cache), dtype=torch.int64, device=cache.device)
    positions = starts[:, None]  # [B, N]
    if new > 1:
        positions = positions + torch.arange(new, device=cache.device)
    if mode == "circular":
        positions = positions % cache.shape[axis]
    lengths = [1] * cache.ndim
    lengths[0], lengths[axis] = positions.shape
    return cache.scatter_(axis, positions.reshape(lengths).expand(update.shape), update)


@operator("NonZero", data_dependent=True)
def non_zero(x: Tensor) -> Tensor:
    """Return the indices of the elements that aren't zero, int64 [rank, count], in row-major order."""
    return x.nonzero().T
