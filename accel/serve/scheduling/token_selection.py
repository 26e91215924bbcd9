"""Next tokens of all rows of a step, and their log probabilities, with one transfer from the device."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from accel.engine.operations.choice import Filter, draw_each, filtered, first_best
from accel.serve.protocol import TokenLogprobs
from accel.serve.scheduling.job import Job


@dataclass(frozen=True)
class Selected:
    """What a row got in a step.

    Attributes:
        token: The token.
        logprobs: Its log probabilities, one entry where the request asked for them, else none.
    """

    token: int
    logprobs: tuple[TokenLogprobs, ...] = ()


def select_tokens(jobs: Sequence[Job], logits: Tensor, places: Sequence[int]) -> list[Selected | Exception]:
    """Select the next token of every row, equal to the one that its request has alone.

    Rows of equal filters are computed in one batch, each with random numbers of its own generator. Logits processors
    that are no filters, such as grammars, run row by row; what these read from the device are transfers of their own.

    Args:
        jobs: The requests.
        logits: The model's logits of a batch, [batch, vocabulary]. Not overwritten.
        places: Place of each request's logits in the batch.

    Returns:
        The tokens, or the error of a request whose own options or processors failed.
    """
    own = [logits[place] for place in places]
    scores: list[Tensor] = list(own)
    errors: dict[int, Exception] = {}
    for row, job in enumerate(jobs):
        if job.sequence.filters is None:
            try:
                scores[row] = job.sequence.processed(scores[row])
            except Exception as error:  # of the request's own: the others go on
                errors[row] = error
    best = first_best(logits) if any(job.sequence.greedy for job in jobs) else logits[:, :0]
    rows, ids = _ids(
        jobs, scores, [best[place] for place in places], [row for row in range(len(jobs)) if row not in errors]
    )
    counts = {row: count for row in rows if (count := jobs[row].request.logprobs) is not None}
    parts = [ids]
    if counts:
        chosen = torch.stack([ids[rows.index(row)] for row in counts])
        parts += _logprobs(torch.stack([own[row] for row in counts]), chosen, max(counts.values()))
    found = _to_host(parts)
    tokens = dict(zip(rows, found[0], strict=True))
    entries = dict(zip(counts, _entries(found[1:], counts.values()), strict=True))
    results: list[Selected | Exception] = []
    for row in range(len(jobs)):
        if row not in errors and tokens[row][0] < 0:
            errors[row] = ValueError("no token can be drawn: the options leave no probabilities that are numbers")
        selected = None if row in errors else Selected(int(tokens[row][0]), (entries[row],) if row in entries else ())
        results.append(selected or errors[row])
    return results


def _ids(
    jobs: Sequence[Job], scores: Sequence[Tensor], best: Sequence[Tensor], rows: Sequence[int]
) -> tuple[list[int], Tensor]:
    """Return the next tokens of some rows.

    Args:
        jobs: The requests.
        scores: The scores of each, [vocabulary].
        best: The next token of each that is greedy, int64 [1].
        rows: Which of them count.

    Returns:
        These rows in another order, and their tokens, int64 [rows, 1]: -1 where none can be drawn.
    """
    groups: dict[tuple[tuple[Filter, ...], bool] | None, list[int]] = {}
    for row in rows:
        sequence = jobs[row].sequence
        key = None if sequence.greedy else (sequence.filters or (), sequence.samples)
        groups.setdefault(key, []).append(row)
    ids = []
    for key, group in groups.items():
        if key is None:
            ids.append(torch.stack([best[row] for row in group]))
            continue
        filters, samples = key
        part = torch.stack([scores[row] for row in group])  # [group, vocabulary], without sending indices to the device
        if filters or samples:
            part = filtered(part.float(), [], filters)
        generators = [jobs[row].sequence.generator for row in group]
        ids.append(draw_each(part, generators) if samples else first_best(part))
    return [row for group in groups.values() for row in group], torch.cat(ids) if ids else torch.empty(0, 1)


def logprobs_of(logits: Tensor, tokens: Sequence[int], count: int) -> list[TokenLogprobs]:
    """Return the log probabilities of tokens and of the `count` most likely ones at each position.

    Args:
        logits: Logits of each, [tokens, vocabulary].
        tokens: The tokens.
        count: Number of most likely tokens.
    """
    chosen = torch.tensor(tokens, device=logits.device)[:, None]
    return _entries(_to_host(_logprobs(logits, chosen, count)), [count] * len(tokens))


def _logprobs(logits: Tensor, ids: Tensor, count: int) -> list[Tensor]:
    """Return the log probabilities of `ids` [rows, 1] and of the best ids, and the best ids, [rows, count] both."""
    scores = logits.float().log_softmax(-1)
    best = scores.topk(min(count, scores.shape[-1]))
    return [scores.gather(-1, ids.clamp(min=0)), best.values, best.indices]


def _to_host(parts: Sequence[Tensor]) -> list[list[list[float]]]:
    """Return tensors [rows, columns] as lists, in one transfer. FP64 holds token ids and FP32 exactly."""
    values = torch.cat([part.flatten().double() for part in parts]).tolist()
    lists, start = [], 0
    for rows, columns in (part.shape for part in parts):
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
