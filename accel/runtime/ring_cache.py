"""Static caches that are filled in turn: the entry of position p is in slot p modulo the cache's length.

A layer whose attention has a sliding window sees few keys at a time, so its cache need not be as long as the bucket. In
a cache that is, each position has its own slot, and all of this holds as well.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from accel.runtime.layout import WINDOW

SLACK = 24  # entries beyond the window: as many tokens can be dropped, as an assistant's 20 candidates
MULTIPLE = 32  # to which lengths are rounded up


def windows(axes: Mapping[str, Sequence[int | str | None]]) -> dict[str, int]:
    """Return the number of keys that a layer sees, by the axis of its caches, of those with a sliding window.

    Args:
        axes: Input of a static decode graph -> its axes.
    """
    names = {axis for each in axes.values() for axis in each if isinstance(axis, str) and axis.startswith(WINDOW)}
    return {name: int(name.removeprefix(WINDOW)) for name in sorted(names)}


def ring_length(window: int, bucket: int) -> int:
    """Return the number of entries in the caches of a layer that sees `window` keys."""
    return min(bucket, (window + SLACK + MULTIPLE - 1) // MULTIPLE * MULTIPLE)


def runs(first: int, last: int, length: int) -> Iterator[tuple[int, int]]:
    """Yield (first, last) of consecutive positions whose slots follow each other in a cache of `length` slots."""
    while first < last:
        end = min(last, first - first % length + length)
        yield first, end
        first = end


def copy_entries(source: Tensor, target: Tensor, axis: int, tokens: int) -> None:
    """Copy the last entries of `tokens` that both caches have slots for.

    Args:
        source: [batch, heads, slots, head_size], or several of them, stacked.
        target: The same with another number of slots.
        axis: Axis of the slots.
        tokens: Number of positions written to `source`.
    """
    sizes = source.shape[axis], target.shape[axis]
    for first, last in runs(max(0, tokens - min(sizes)), tokens, sizes[0]):
        for begin, end in runs(first, last, sizes[1]):
            entries = source.narrow(axis, begin % sizes[0], end - begin)
            target.narrow(axis, begin % sizes[1], end - begin).copy_(entries)


def last_entries(source: Tensor, axis: int, slots: int, padding: Tensor | None = None) -> Tensor:
    """Return what a cache of `slots` slots holds of each row: the last entries, each in the slot of its position.

    Args:
        source: [rows, heads, tokens, head_size], at least `slots` tokens.
        axis: Axis of the tokens.
        slots: Number of slots.
        padding: Number of first tokens of each row that are dropped, so that positions count from the one behind them,
            int64 [rows]; None for none. Slots that are left over hold the row's last entry.

    Returns:
        [rows, heads, slots, head_size]; `source` itself where it holds the same.
    """
    tokens = source.shape[axis]
    if padding is None:
        if slots == tokens:
            return source
        return source.index_select(axis, held_positions(slots, tokens, source.device))
    taken = held_positions(slots, tokens - padding[:, None], source.device) + padding[:, None]  # [rows, slots]
    index_shape = [1] * source.ndim
    index_shape[0], index_shape[axis] = taken.shape
    shape = list(source.shape)
    shape[axis] = slots
    return source.gather(axis, taken.clamp(max=tokens - 1).view(index_shape).expand(shape))


def in_order(cache: Tensor, axis: int, tokens: int) -> Tensor:
    """Return the entries of positions 0, 1, ..., `tokens` - 1.

    Args:
        cache: [batch, heads, slots, head_size]
        axis: Axis of the slots.
        tokens: Number of positions written.

    Returns:
        A view if there are as many slots, else a copy with zeros for the entries that are lost.
    """
    if tokens <= cache.shape[axis]:
        return cache.narrow(axis, 0, tokens)
    shape = list(cache.shape)
    shape[axis] = tokens
    entries = cache.new_zeros(shape)
    copy_entries(cache, entries, axis, tokens)
    return entries


def held_positions(slots: int, tokens: int | Tensor, device: torch.device) -> Tensor:
    """Return the position whose entry each slot holds, int64 [slots]: its own number where it holds none yet.

    Args:
        slots: Number of slots.
        tokens: Number of positions written; int64 [1] on the device where the host doesn't know it, or [rows, 1] for a
            result [rows, slots].
        device: Device of the result.
    """
    own = torch.arange(slots, device=device)
    held = tokens - 1 - (tokens - 1 - own) % slots
    return torch.where(held < 0, own, held)


class HeldEntries:
    """Which of a generation's entries the caches of layers with a window still hold.

    Args:
        windows: See `windows`.
    """

    def __init__(self, windows: Mapping[str, int]) -> None:
        self._windows = windows
        self._first = dict.fromkeys(windows, 0)  # axis -> first position whose entry, and all behind it, is held

    def write(self, tokens: int, bucket: int) -> None:
        """Note that static caches of a bucket hold the last of `tokens` entries."""
        for axis, window in self._windows.items():
            self._first[axis] = max(self._first[axis], tokens - ring_length(window, bucket))

    def suffice(self, tokens: int) -> bool:
        """Return whether the token behind the first `tokens` would find all entries that it sees."""
        return all(self._first[axis] <= max(0, tokens + 1 - window) for axis, window in self._windows.items())

    def copy(self) -> "HeldEntries":
        """Return an independent copy."""
        copy = HeldEntries(self._windows)
        copy._first.update(self._first)
        return copy
