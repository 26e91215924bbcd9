"""Choice of the next ids from logits: filters of the scores, the best id or a draw, and which rows have ended."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FORBID = "forbid"


@dataclass(frozen=True)
class Filter:
    """A function of the scores of a row. All but `finite` and `log softmax` give ids that they remove the score `fill`.

    Attributes:
        name: Key of `FILTERS`, or `forbid`: ids are removed until a number of ids, one for each id, was chosen.
        value: Its parameter.
        least: Number of ids, the best ones, that are never removed.
        fill: Score of ids that are removed.
    """

    name: str
    value: float = 0.0
    least: int = 1
    fill: float = -math.inf


LOG_SOFTMAX = Filter("log softmax")


@dataclass(frozen=True)
class Choice:
    """Choice of one id for each row.

    The tensors follow each other in this order: logits; with a filter `forbid` the number of ids chosen so far, int64
    [1], and for each such filter int64 [V], from which number on an id is allowed; if rows can end the ids that end
    one, int64 [E], the id that follows them, int64 [], the rows that have ended, bool [B, 1], and whether all have,
    bool []. The last two are updated in place.

    Attributes:
        filters: Applied to the scores one after the other.
        sample: Draw an id by the softmax of the scores, in place of the best one.
        ends: Number of ids that end a row; 0 if none does.
    """

    filters: tuple[Filter, ...] = ()
    sample: bool = False
    ends: int = 0

    @property
    def is_greedy(self) -> bool:
        """True if the best id of the logits is chosen, or the best of those that no filter forbids."""
        return not self.sample and self.filters in ((), (Filter(FORBID),))

    @property
    def filter_tensors(self) -> int:
        """Number of tensors of the filters, the first ones behind the logits."""
        forbidding = sum(each.name == FORBID for each in self.filters)
        return 1 + forbidding if forbidding else 0


def choice(logits: Tensor, *tensors: Tensor, spec: Choice) -> Tensor:
    """Return the next ids. Scores are FP32, whatever the logits are.

    Args:
        logits: [B, N, V], of which the last ones of a row count. Not overwritten.
        tensors: The others; see `Choice`.
        spec: What is chosen.

    Returns:
        int64 [B, 1]; the first one of several best ids.
    """
    scores = logits[:, -1]
    if spec.filters or spec.sample:
        scores = filtered(scores.float(), tensors[: spec.filter_tensors], spec.filters)
    ids = draw(scores, 1) if spec.sample else first_best(scores)
    if spec.ends:
        ends, padding, ended, all_ended = tensors[spec.filter_tensors :]
        ids = torch.where(ended, padding, ids)
        ended |= (ids == ends).any(-1, keepdim=True)
        torch.all(ended, out=all_ended)
    return ids


def first_best(scores: Tensor) -> Tensor:
    """Return the first one of the best ids of every row: [B, V] -> int64 [B, 1]. NaN counts as the best score."""
    if on_cpu(scores) and scores.dtype is torch.float32:
        # vectorised, as `torch.argmax` (2.13) isn't on the CPU: it takes ten times as long for 8 rows of 32,128 ids
        return torch.from_numpy(scores.detach().numpy().argmax(-1, keepdims=True))
    return scores.argmax(-1, keepdim=True)


def on_cpu(scores: Tensor) -> bool:
    """Return whether what is fast on the CPU alone may be used: it can't be captured as a CUDA graph."""
    return scores.device.type == "cpu"


def draw(scores: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw `count` different indices of every row by the softmax of `scores`: [B, V] -> [B, count].

    Random numbers are `generator`'s, by default those of the device's own.
    """
    return torch.multinomial(scores.softmax(-1), count, generator=generator)


def draw_each(scores: Tensor, generators: Sequence[torch.Generator | None]) -> Tensor:
    """Draw an index of every row by the softmax of `scores`, without waiting for the device: [B, V] -> [B, 1].

    A row has the index that `draw` gives it alone, as `torch.multinomial` takes the largest of probability / noise, too
    (https://arxiv.org/abs/1611.00712). Where probabilities aren't numbers, at which `draw` fails, the index is -1.

    Args:
        scores: FP32.
        generators: Source of each row's random numbers; None: the device's own.
    """
    probabilities = scores.softmax(-1)
    noise = torch.empty_like(probabilities)
    for row, generator in zip(noise, generators, strict=True):
        row.exponential_(generator=generator)
    return first_best(probabilities / noise).masked_fill(probabilities.isnan().any(-1, keepdim=True), -1)


def filtered(scores: Tensor, tensors: Sequence[Tensor], filters: Sequence[Filter]) -> Tensor:
    """Return filtered scores.

    Args:
        scores: [B, V], FP32. Not overwritten.
        tensors: Those of the filters; see `Choice`.
        filters: Applied one after the other.
    """
    allowed_from = iter(tensors[1:])
    for each in filters:
        if each.name == FORBID:
            scores = _forbidden(scores, next(allowed_from) > tensors[0], each.fill)
        else:
            scores = FILTERS[each.name](scores, each)
    return scores


def _forbidden(scores: Tensor, forbidden: Tensor, fill: float) -> Tensor:
    """Return scores [B, V] with `fill` for the ids that are `forbidden`, bool [V]."""
    if on_cpu(scores):  # few ids of many, and their number is known without waiting for a device
        return scores.index_fill(1, forbidden.nonzero()[:, 0], fill)
    return scores.masked_fill(forbidden, fill)


def _top_k(scores: Tensor, spec: Filter) -> Tensor:
    """Keep the `value` best ids, and those as good as the last of them."""
    return scores.masked_fill(scores < _best(scores, int(spec.value)), spec.fill)


def _top_p(scores: Tensor, spec: Filter) -> Tensor:
    """Keep the best ids whose probabilities reach `value`: https://arxiv.org/abs/1904.09751."""
    ranked, order = scores.sort(-1)
    removed = ranked.softmax(-1).cumsum(-1) <= 1 - spec.value  # the worst ones, up to the rest of 1
    removed[:, -spec.least :] = False
    return scores.masked_fill(removed.scatter(1, order, removed), spec.fill)


def _min_p(scores: Tensor, spec: Filter) -> Tensor:
    """Keep ids of at least `value` times the probability of the best one: https://arxiv.org/abs/2407.01082."""
    probabilities = scores.softmax(-1)
    removed = probabilities < spec.value * probabilities.amax(-1, keepdim=True)
    kept = probabilities.topk(min(spec.least, scores.shape[-1]), -1).indices
    return scores.masked_fill(removed.scatter(-1, kept, False), spec.fill)


def _typical_p(scores: Tensor, spec: Filter) -> Tensor:
    """Keep ids whose information is nearest to the entropy, which reach `value`: https://arxiv.org/abs/2202.00666."""
    logarithms = scores.log_softmax(-1)
    entropy = -(logarithms * logarithms.exp()).nansum(-1, keepdim=True)
    distances, order = (-logarithms - entropy).abs().sort(-1)
    reached = scores.gather(-1, order).softmax(-1).cumsum(-1)
    last = (reached < spec.value).sum(1, keepdim=True).clamp(max=scores.shape[-1] - 1)
    removed = distances > distances.gather(1, last)
    removed[:, : spec.least] = False
    return scores.masked_fill(removed.scatter(1, order, removed), spec.fill)


def _least_probability(scores: Tensor, spec: Filter) -> Tensor:
    """Keep ids of at least the probability `value`: https://arxiv.org/abs/2210.15191."""
    removed = (scores.softmax(-1) < spec.value) & (scores < _best(scores, spec.least))
    return scores.masked_fill(removed, spec.fill)


def _finite(scores: Tensor, spec: Filter) -> Tensor:
    """Replace NaN by 0, and infinities by the largest magnitude."""
    limits = torch.finfo(scores.dtype)
    return scores.nan_to_num(0.0, limits.max, limits.min)


def _best(scores: Tensor, count: int) -> Tensor:
    """Return the score of the best id number `count`, or of the last: [B, V] -> [B, 1]."""
    return scores.topk(min(count, scores.shape[-1])).values[:, -1:]


FILTERS: dict[str, Callable[[Tensor, Filter], Tensor]] = {
    "temperature": lambda scores, spec: scores / spec.value,
    "top k": _top_k,
    "top p": _top_p,
    "min p": _min_p,
    "typical p": _typical_p,
    "least probability": _least_probability,
    "finite": _finite,
    "log softmax": lambda scores, spec: scores.log_softmax(-1),
}
"""Name -> function of scores [B, V] and the filter. Bit for bit what transformers' logits processors return."""

Array = NDArray[Any]


def reference(
    logits: Array,
    *,
    spec: Choice,
    chosen: int = 0,
    allowed_from: Sequence[Array] = (),
    noise: Array | None = None,
    ends: Sequence[int] = (),
    padding: int = 0,
    ended: Array | None = None,
) -> tuple[Array, Array]:
    """Return `choice` in numpy.

    Args:
        logits: [B, V], the last ones of every row.
        spec: What is chosen.
        chosen: Number of ids chosen so far.
        allowed_from: For each filter `forbid` [V].
        noise: Exponentially distributed [B, V], for a draw as the largest of probability / noise
            (https://arxiv.org/abs/1611.00712).
        ends: Ids that end a row.
        padding: Id that follows them.
        ended: Rows that have ended before, bool [B].

    Returns:
        Ids [B], and the rows that have ended now, bool [B].
    """
    scores = reference_scores(logits, spec.filters, chosen, allowed_from)
    ids = (scores if noise is None else _softmax(scores) / noise).argmax(-1)
    ended = np.zeros(len(ids), np.bool_) if ended is None else ended
    ids = np.where(ended, padding, ids)
    return ids, ended | np.isin(ids, ends)


def reference_scores(
    scores: Array, filters: Sequence[Filter], chosen: int = 0, allowed_from: Sequence[Array] = ()
) -> Array:
    """Return `filtered` in numpy, row by row: scores [B, V] -> [B, V]. See `reference`."""
    rest = list(allowed_from)
    for each in filters:
        if each.name == FORBID:
            scores = np.where(rest.pop(0) > chosen, each.fill, scores)
        else:
            scores = np.stack([_reference_row(row, each) for row in scores])
    return scores


def _reference_row(row: Array, spec: Filter) -> Array:
    """Return the filtered scores [V] of one row [V], for any filter but `forbid`."""
    p, best = _softmax(row), np.argsort(row, kind="stable")[::-1]  # [V]; ids from the best to the worst
    everything: Array = np.ones(len(row), np.bool_)
    match spec.name:
        case "temperature":
            return row / spec.value
        case "log softmax":
            with np.errstate(divide="ignore"):
                return np.log(p)
        case "finite":
            largest = float(np.finfo(np.float32).max)
            return np.where(np.isnan(row), 0, np.clip(row, -largest, largest))
        case "top k":
            kept = row >= row[best[min(int(spec.value), len(row)) - 1]]
        case "top p":
            before = np.cumsum(p[best]) - p[best]  # of better ids together
            kept = ~everything
            kept[best[before < spec.value]] = True
            kept[best[: spec.least]] = True
        case "min p":
            kept = p >= spec.value * p.max()
            kept[best[: spec.least]] = True
        case "least probability":
            kept = (p >= spec.value) | (row >= row[best[min(spec.least, len(row)) - 1]])
        case "typical p":
            with np.errstate(divide="ignore"):
                information = -np.log(p)
            distance = np.abs(information - (p[p > 0] * information[p > 0]).sum())
            near = np.argsort(distance, kind="stable")
            last = min(int((np.cumsum(p[near]) < spec.value).sum()), len(row) - 1)
            kept = distance <= distance[near[last]]
            kept[near[: spec.least]] = True
        case _:
            raise ValueError(f"no filter {spec.name!r}: {', '.join((*FILTERS, FORBID))}")
    return np.where(kept, row, spec.fill)


def _softmax(scores: Array) -> Array:
    """Return the probabilities of scores [..., V]."""
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    result: Array = powers / powers.sum(-1, keepdims=True)
    return result
