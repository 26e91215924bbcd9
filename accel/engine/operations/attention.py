"""Attention of one token over a cache: one to which the token's keys and values are written first, or a fixed one."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from accel.engine.operations.normalize import Norm
from accel.engine.operations.normalize import reference as normalized


@dataclass(frozen=True)
class Heads:
    """Where the heads of queries, keys or values lie among the features of a row.

    Head g * per_group + i begins at feature start + g * group_stride + i * stride.

    Attributes:
        start: First feature of the first head.
        groups: Number of groups of heads.
        per_group: Heads in a group.
        group_stride: Features from one group to the next.
        stride: Features from one head of a group to the next.
        size: Features of a head, side by side.
        scale: Factor of all features.
        norm: Norm of every head before the rotation, or None.
    """

    start: int
    groups: int
    per_group: int
    group_stride: int
    stride: int
    size: int
    scale: float = 1.0
    norm: Norm | None = None

    @property
    def count(self) -> int:
        """Number of heads."""
        return self.groups * self.per_group

    def features(self) -> NDArray[np.int64]:
        """Return the index of every feature, [heads, size]."""
        group, head, feature = np.ogrid[: self.groups, : self.per_group, : self.size]
        index: NDArray[np.int64] = self.start + group * self.group_stride + head * self.stride + feature
        return index.reshape(self.count, self.size)


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding: https://arxiv.org/abs/2104.09864.

    Attributes:
        size: Features of a head that are rotated, the first ones.
        interleaved: Pairs are neighbours, instead of feature i and i + size / 2.
        angles: Which of a row's cosines belongs to feature i, the same of sines: `full`, number i; `halves`, i modulo
            size / 2; `pairs`, i / 2 rounded down.
    """

    size: int
    interleaved: bool
    angles: str


ANGLES = {"full": lambda i, size: i, "halves": lambda i, size: i % (size // 2), "pairs": lambda i, size: i // 2}
"""Kind of `Rotary.angles` -> function of a feature and `Rotary.size` that returns the index of its cosine."""


@dataclass(frozen=True)
class Bias:
    """How a bias broadcasts to the scores [B, H, 1, S].

    Attributes:
        batched: It has a row of its own for each row of the batch.
        per_head: It has numbers of its own for each head.
        scale: Factor of the bias.
    """

    batched: bool
    per_head: bool
    scale: float = 1.0


@dataclass(frozen=True)
class Attention:
    """Attention of one token.

    A cache of S entries is filled in turn: position p is written to entry p modulo S, and the query sees the first
    min(p + 1, S) entries, its own among them. One that is longer than all positions is never filled again.

    The tensors follow each other in this order: query; if a key and a value are written, the rows that hold them, and
    where they are written: int64 [B]; both caches; weights of the norms of queries and keys, where they have them;
    cosines and sines; biases; where beams share entries, the row of both caches that holds each entry of a row: int32
    [B, L], by position, for more positions than there are. New entries are read by their own rows alone.

    Attributes:
        query: Heads of the query.
        key: Heads of the new key, and None where the cache is fixed: cross-attention.
        value: Heads of the new value, or None.
        kv_heads: Heads of the cache. There is a multiple of them of queries, of which consecutive ones share one.
        rotary: Rotation of query and key, or None.
        scale: Factor of the scores.
        softcap: Largest magnitude of the scores before biases are added, by c * tanh(x / c); 0: any.
        biases: How each bias broadcasts: masks, distances.
        dtype: Dtype of the output.
        ancestry: Entries are read from the rows that computed them, so that beams are reordered without a copy: see
            `BeamAncestry`.
    """

    query: Heads
    key: Heads | None
    value: Heads | None
    kv_heads: int
    rotary: Rotary | None
    scale: float
    softcap: float
    biases: tuple[Bias, ...]
    dtype: torch.dtype
    ancestry: bool = False

    def __post_init__(self) -> None:
        if self.ancestry and self.key is None:
            raise ValueError("a fixed cache has no ancestry: beams of one input share it")


def attention(*tensors: Tensor, spec: Attention) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Return the heads' outputs side by side, and the caches where they are written. All is computed in FP32.

    Args:
        tensors: See `Attention`. Rows [B, ..., features], caches [B, KV, S, D], cosines and sines with one row of
            numbers for each row of the batch or for all.
        spec: What is computed.

    Returns:
        [B, 1, H * D]; with a key the caches, too, which are written in place.
    """
    rest = list(tensors)
    ancestry = rest.pop() if spec.ancestry else None
    query, rows, positions = rest.pop(0), list[Tensor](), None
    if spec.key is not None:
        rows, positions = [rest.pop(0), rest.pop(0)], rest.pop(0)
    keys, values = rest.pop(0), rest.pop(0)
    q = cut_heads(query, spec.query, rest)
    cuts = [heads for heads in (spec.key, spec.value) if heads is not None]
    new = [cut_heads(row, heads, rest) for row, heads in zip(rows, cuts, strict=True)]
    if spec.rotary is not None:
        cos, sin = (angles_of(rest.pop(0), spec.rotary) for _ in range(2))
        q, *new[:1] = (rotated(each, cos, sin, spec.rotary) for each in (q, *new[:1]))
    if positions is not None:
        for cache, entry in zip((keys, values), new, strict=True):
            index = (positions % cache.shape[2]).reshape(-1, 1, 1, 1)
            index = index.expand(len(cache), cache.shape[1], 1, cache.shape[3])
            cache.scatter_(2, index, entry.to(cache.dtype)[:, :, None])
    seen = (keys, values)
    if ancestry is not None and positions is not None:
        seen = (_entries(keys, positions, ancestry), _entries(values, positions, ancestry))
    output = _attend(q, *seen, positions, rest, spec)
    return output if spec.key is None else (output, keys, values)


def _entries(cache: Tensor, positions: Tensor, ancestry: Tensor) -> Tensor:
    """Return the entries of every row, [B, KV, S, D], out of the rows of a cache that hold them.

    Args:
        cache: [B, KV, S, D].
        positions: Position of the last entry of each row, int64 [B].
        ancestry: See `Attention`, [B, L].
    """
    last = positions.reshape(-1, 1)
    slots = torch.arange(cache.shape[2], device=cache.device)
    held = last - (last - slots) % cache.shape[2]  # [B, S], the position of each slot's entry; negative in empty slots
    rows = ancestry.gather(1, held.clamp(min=0)).long()
    return cache.gather(0, rows[:, None, :, None].expand_as(cache))


def _attend(
    q: Tensor, keys: Tensor, values: Tensor, positions: Tensor | None, biases: list[Tensor], spec: Attention
) -> Tensor:
    """Return softmax(scale * q @ keys.T + biases) @ values, [B, 1, H * D]: q [B, H, D], keys, values [B, KV, S, D].

    Entries behind `positions`, where they are given, are not seen.
    """
    grouped = q.reshape(len(q), spec.kv_heads, -1, q.shape[-1])  # [B, KV, H / KV, D]
    scores = grouped @ keys.float().mT * spec.scale
    if spec.softcap:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    scores = scores.reshape(len(q), spec.query.count, 1, -1)
    for bias, kind in zip(biases, spec.biases, strict=True):
        shape = (len(q) if kind.batched else 1, spec.query.count if kind.per_head else 1, 1, -1)
        scores = scores + (bias.reshape(shape).float() * kind.scale if kind.scale != 1 else bias.reshape(shape))
    if positions is not None:
        unseen = torch.arange(keys.shape[2], device=q.device) > positions.reshape(-1, 1, 1, 1)
        scores = scores.masked_fill(unseen, -torch.inf)
    weights = functional.softmax(scores, -1).reshape(*grouped.shape[:3], -1)
    return (weights @ values.float()).reshape(len(q), 1, -1).to(spec.dtype)


def cut_heads(row: Tensor, heads: Heads, weights: list[Tensor]) -> Tensor:
    """Return heads cut from rows, [B, heads, size] in FP32, normed with the next of `weights` where they are."""
    flat = row.reshape(len(row), -1)
    sizes = (len(row), heads.groups, heads.per_group, heads.size)
    strides = (flat.stride(0), heads.group_stride, heads.stride, 1)
    cut = flat.as_strided(sizes, strides, flat.storage_offset() + heads.start).reshape(
        len(row), heads.count, heads.size
    )
    cut = heads.norm(cut, weights.pop(0)) if heads.norm is not None else cut.float()
    return cut * heads.scale if heads.scale != 1 else cut


def angle_count(rotary: Rotary) -> int:
    """Return the number of cosines in a row."""
    return rotary.size if rotary.angles == "full" else rotary.size // 2


def angles_of(values: Tensor, rotary: Rotary) -> Tensor:
    """Return the cosine or sine of every rotated feature, [B or 1, 1, size]."""
    rows = values.reshape(-1, 1, angle_count(rotary)).float()
    if rotary.angles == "full":
        return rows
    return torch.cat([rows, rows], -1) if rotary.angles == "halves" else rows.repeat_interleave(2, -1)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, rotary: Rotary) -> Tensor:
    """Return x [B, H, D] with pairs of its first features rotated."""
    part, rest = x[..., : rotary.size], x[..., rotary.size :]
    if rotary.interleaved:
        partners = torch.stack([-part[..., 1::2], part[..., 0::2]], -1).flatten(-2)
    else:
        first, second = part.chunk(2, -1)
        partners = torch.cat([-second, first], -1)
    return torch.cat([part * cos + partners * sin, rest], -1)


Array = NDArray[Any]


def reference(*tensors: Array, spec: Attention) -> tuple[Array, Array | None, Array | None]:
    """Return `attention` in numpy and FP64: heads [B, H * D], and copies of the caches where they are written."""
    rest = list(tensors)
    ancestry = rest.pop() if spec.ancestry else None  # [B, L]
    query, rows, positions = rest.pop(0), list[Array](), np.empty(0, int)
    if spec.key is not None:
        rows, positions = [rest.pop(0), rest.pop(0)], rest.pop(0).reshape(-1)
    keys, values = rest.pop(0).copy(), rest.pop(0).copy()  # [B, KV, S, D]

    def cut(row: Array, heads: Heads) -> Array:
        """Return [B, heads, size]."""
        result = row.reshape(len(row), -1)[:, heads.features()]
        return heads.scale * (result if heads.norm is None else normalized(result, rest.pop(0), norm=heads.norm))

    q = cut(query, spec.query)
    new = [cut(row, heads) for row, heads in zip(rows, (spec.key, spec.value), strict=False) if heads]
    if spec.rotary is not None:
        cos, sin = rest.pop(0), rest.pop(0)
        q, *new[:1] = (turned(each, cos, sin, spec.rotary) for each in (q, *new[:1]))
    for cache, entries in zip((keys, values), new, strict=False):
        for row, position in enumerate(positions):
            cache[row, :, position % cache.shape[2]] = entries[row]
    result = np.empty((len(q), spec.query.count, values.shape[3]))
    for row in range(len(q)):
        seen = min(positions[row] + 1, keys.shape[2]) if spec.key else keys.shape[2]
        own_keys, own_values = keys[row, :, :seen].copy(), values[row, :, :seen].copy()  # [KV, seen, D]
        if ancestry is not None:
            for position in range(positions[row] + 1 - seen, positions[row] + 1):
                source, slot = ancestry[row, position], position % keys.shape[2]
                own_keys[:, slot], own_values[:, slot] = keys[source, :, slot], values[source, :, slot]
        for head in range(spec.query.count):
            group = head // (spec.query.count // spec.kv_heads)
            scores = spec.scale * own_keys[group] @ q[row, head]  # [seen]
            if spec.softcap:
                scores = spec.softcap * np.tanh(scores / spec.softcap)
            for bias, kind in zip(rest, spec.biases, strict=True):
                table = bias.reshape(len(q) if kind.batched else 1, spec.query.count if kind.per_head else 1, -1)
                scores = scores + kind.scale * table[row if kind.batched else 0, head if kind.per_head else 0, :seen]
            weights = np.exp(scores - scores.max())
            result[row, head] = weights / weights.sum() @ own_values[group]
    return result.reshape(len(q), -1), keys if spec.key else None, values if spec.key else None


def turned(x: Array, cos: Array, sin: Array, rotary: Rotary) -> Array:
    """Return x [B, H, D] with its first features rotated, in numpy; cosines and sines as of `attention`."""
    result, half = x.copy(), rotary.size // 2
    count = rotary.size if rotary.angles == "full" else half
    cosines, sines = (each.reshape(-1, count) for each in (cos, sin))
    for i in range(rotary.size):
        partner, sign = (i + half) % rotary.size, -1 if i < half else 1
        if rotary.interleaved:
            partner, sign = i ^ 1, -1 if i % 2 == 0 else 1
        at = ANGLES[rotary.angles](i, rotary.size)
        result[..., i] = x[..., i] * cosines[:, at, None] + sign * x[..., partner] * sines[:, at, None]
    return result
