"""Next tokens of all rows of a step, and their log probabilities, with one transfer from the device."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from accel.engine.operations.choice import Filter, draw_each, filtered, first_best
from accel.serve.protocol import TokenLogprobs
from accel.serve.scheduling.job import Job


class Selected(NamedTuple):
    """What a row got in a step.

    Attributes:
        token: The token.
        logprobs: Its log probabilities, one entry where the request asked for them, else none.
    """

    token: int
    logprobs: tuple[TokenLogprobs, ...] = ()


class TokenSelection:
    """Next token of every row, equal to the one that its request has alone.

    Computed on the device, whose next step can begin with `tokens` before the host knows them. Rows of equal filters
    are computed in one batch, each with random numbers of its own generator. Logits processors that are no filters,
    such as grammars, run row by row; what these read from the device are transfers of their own.

    Args:
        jobs: The requests.
        logits: The model's logits of a batch, [batch, vocabulary]. Not overwritten.
        places: Place of each request's logits in the batch.
    """

    def __init__(self, jobs: Sequence[Job], logits: Tensor, places: Sequence[int]) -> None:
        self._rows, self._places, self._batch = len(jobs), places, len(logits)
        self._errors: dict[int, Exception] = {}
        self._chosen = _not_greedy(jobs, logits, places, self._errors)
        greedy = [row for row, job in enumerate(jobs) if job.sequence.greedy]
        self._greedy = first_best(logits) if greedy else None
        if self._greedy is not None:  # of all places, as computing more of them costs less than gathering these
            self._chosen.append((greedy, self._greedy, [places[row] for row in greedy]))
        parts = [ids for _, ids, _ in self._chosen]
        counts = {row: count for row, job in enumerate(jobs) if (count := job.request.logprobs) is not None}
        self._asked = {row: count for row, count in counts.items() if row not in self._errors}
        if self._asked:
            chosen = self._chosen
            ids_of = {row: ids[at] for rows, ids, lines in chosen for row, at in zip(rows, lines, strict=True)}
            own = torch.stack([logits[places[row]] for row in self._asked])
            ids = torch.stack([ids_of[row] for row in self._asked])
            parts += _logprobs(own, ids, max(self._asked.values()))
        self._copy = _HostCopy(parts)

    def tokens(self) -> Tensor:
        """Return the token of each place in the batch on the device, int64 [batch]; any one where no request is."""
        if self._greedy is None:
            tokens = torch.zeros(self._batch, dtype=torch.int64, device=self._chosen[0][1].device)
        else:
            tokens = self._greedy.flatten().clone()
        for rows, ids, _ in self._chosen:
            if ids is not self._greedy:
                places = torch.tensor([self._places[row] for row in rows]).to(ids.device, non_blocking=True)
                tokens.index_copy_(0, places, ids.flatten())
        return tokens.clamp_(min=0)  # -1 where none can be drawn

    def results(self) -> list[Selected | Exception]:
        """Wait for the device, in one transfer; return the tokens, or the error of a request whose options failed."""
        found = self._copy.lists()
        asked = self._asked
        entries = dict(zip(asked, _entries(found[len(self._chosen) :], asked.values()), strict=True))
        results: dict[int, Selected | Exception] = dict(self._errors)
        for (rows, _, lines), lists in zip(self._chosen, found, strict=False):
            for row, at in zip(rows, lines, strict=True):
                token = int(lists[at][0])
                if token < 0:
                    results[row] = ValueError(
                        "no token can be drawn: the options leave no probabilities that are numbers"
                    )
                else:
                    results[row] = Selected(token, (entries[row],) if row in entries else ())
        return [results[row] for row in range(self._rows)]


Chosen: TypeAlias = tuple[list[int], Tensor, Sequence[int]]
"""Rows, a tensor of ids, int64 [..., 1], and for each of these rows the line of this tensor that holds its token."""


def _not_greedy(
    jobs: Sequence[Job], logits: Tensor, places: Sequence[int], errors: dict[int, Exception]
) -> list[Chosen]:
    """Return the next tokens of all rows but greedy ones: -1 where none can be drawn.

    Args:
        jobs: The requests.
        logits: [batch, vocabulary].
        places: Place of each request's logits in the batch.
        errors: Gets the errors of rows.
    """
    groups: dict[tuple[tuple[Filter, ...], bool], dict[int, Tensor]] = {}  # scores [vocabulary] of rows
    for row, job in enumerate(jobs):
        sequence = job.sequence
        if sequence.greedy:
            continue
        scores = logits[places[row]]
        if sequence.filters is None:
            try:
                scores = sequence.processed(scores)
            except Exception as error:  # of the request's own: the others go on
                errors[row] = error
                continue
        groups.setdefault((sequence.filters or (), sequence.samples), {})[row] = scores
    chosen: list[Chosen] = []
    for (filters, samples), group in groups.items():
        part = torch.stack(list(group.values()))  # without sending indices to the device
        if filters or samples:
            part = filtered(part.float(), [], filters)
        ids = draw_each(part, [jobs[row].sequence.generator for row in group]) if samples else first_best(part)
        chosen.append((list(group), ids, range(len(group))))
    return chosen


def logprobs_of(logits: Tensor, tokens: Sequence[int], count: int) -> list[TokenLogprobs]:
    """Return the log probabilities of tokens and of the `count` most likely ones at each position.

    Args:
        logits: Logits of each, [tokens, vocabulary].
        tokens: The tokens.
        count: Number of most likely tokens.
    """
    chosen = torch.tensor(tokens, device=logits.device)[:, None]
    return _entries(_HostCopy(_logprobs(logits, chosen, count)).lists(), [count] * len(tokens))


def _logprobs(logits: Tensor, ids: Tensor, count: int) -> list[Tensor]:
    """Return the log probabilities of `ids` [rows, 1] and of the best ids, and the best ids, [rows, count] both."""
    scores = logits.float().log_softmax(-1)
    best = scores.topk(min(count, scores.shape[-1]))
    return [scores.gather(-1, ids.clamp(min=0)), best.values, best.indices]


class _HostCopy:
    """Copy of tensors [rows, columns] to the host, in one transfer that begins at once.

    FP64 holds token ids and FP32 exactly.
    """

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self._shapes, self._copied = [tuple(part.shape) for part in parts], None
        self._values: Tensor | None = None
        if not parts:
            return
        values = parts[0].flatten() if len(parts) == 1 else torch.cat([part.flatten().double() for part in parts])
        if values.device.type == "cuda":
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(
                values, non_blocking=True
            )
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._values = values

    def lists(self) -> list[list[list[float]]]:
        """Wait for the device and return the tensors as lists."""
        if self._values is None:
            return []
        if self._copied is not None:
            self._copied.synchronize()
        values, lists, start = self._values.tolist(), [], 0
        for rows, columns in self._shapes:
            lists.append([values[start + row * columns : start + (row + 1) * columns] for row in range(rows)])
            start += rows * columns
        return lists


def _entries(lists: Sequence[list[list[float]]], counts: Iterable[int]) -> list[TokenLogprobs]:
    """Return what `_logprobs` found, as lists, with as many of the best ids as each row asked for."""
    if not lists:
        return []
    return [
        TokenLogprobs(
            token[0], tuple((int(best), value) for best, value in zip(ids[:count], values[:count], strict=True))
        )
        for token, values, ids, count in zip(*lists, counts, strict=True)
    ]
