"""Filters of scores, and the choice of the next ids, against their references in numpy."""

import numpy as np
import pytest
import torch
from torch import Tensor

from accel.engine.operations.choice import (
    FORBID,
    Choice,
    Filter,
    choice,
    filtered,
    first_best,
    reference,
    reference_scores,
)

INF = float("inf")
VALUES = {
    "temperature": (0.3, 1.7),
    "top k": (1, 5, 1000),
    "top p": (0.0, 0.3, 0.9, 1.0),
    "min p": (0.0, 0.05, 0.5, 1.0),
    "typical p": (0.1, 0.5, 1.5),
    "least probability": (0.001, 0.05, 0.9),
    "finite": (0.0,),
    "log softmax": (0.0,),
}
FILTERS = [Filter(name, value) for name, values in VALUES.items() for value in values]
LEAST = [Filter(name, 0.05, least=3) for name in ("top p", "min p", "typical p")]
LEAST += [Filter("least probability", 0.9, least=3), Filter("min p", 1.0, least=500), Filter("top k", 2, fill=-9.0)]
EVERY = tuple(Filter(name, values[-2 if len(values) > 1 else 0]) for name, values in VALUES.items())


def rows(kind: str, vocabulary: int) -> Tensor:
    """Return scores [4, vocabulary]."""
    scores = torch.randn(4, vocabulary, generator=torch.Generator().manual_seed(vocabulary)) * 3
    if kind == "ties":
        scores = scores.round()
    if kind == "forbidden":
        scores[:, 1::3] = -INF
        scores[2] = -INF
        scores[2, vocabulary // 2] = 1.5  # one id is left
    return scores


def same(found: Tensor, expected: np.ndarray) -> bool:
    """Return whether scores are equal up to rounding, and infinite at the same places."""
    return bool(np.allclose(found.double().numpy(), expected, rtol=1e-5, atol=1e-5))


@pytest.mark.parametrize("spec", FILTERS + LEAST, ids=lambda spec: f"{spec.name} {spec.value} {spec.least}")
@pytest.mark.parametrize("vocabulary", [1, 37, 1001])
@pytest.mark.parametrize("kind", ["spread", "ties", "forbidden"])
def test_filters(kind: str, vocabulary: int, spec: Filter) -> None:
    scores = rows(kind, vocabulary)
    kept = scores.clone()
    found = filtered(scores, [], [spec])
    expected = reference_scores(scores.double().numpy(), [spec])
    if kind == "ties":  # which of equally good ids are kept isn't specified, how many are is
        assert same(found.sort(-1).values, np.sort(expected, -1))
    else:
        assert same(found, expected)
    assert torch.equal(scores, kept)  # they may be a graph's output
    assert bool(found.isfinite().any(-1).all())  # no row without an id


@pytest.mark.parametrize(("spec", "kept"), [(Filter("top p", 0.5), 2), (Filter("min p", 1.0), 4)], ids=str)
def test_bounds_that_are_met(spec: Filter, kept: int) -> None:
    """Four equal probabilities: sums and comparisons are exact."""
    assert int(filtered(torch.zeros(1, 4), [], [spec]).isfinite().sum()) == kept


def test_not_finite() -> None:
    scores = torch.tensor([[float("nan"), INF, -INF, 2.0]])
    found = filtered(scores, [], [Filter("finite")])
    assert found.tolist() == [[0.0, torch.finfo(torch.float32).max, torch.finfo(torch.float32).min, 2.0]]


@pytest.mark.parametrize("chosen", [0, 1, 4, 5, 6])
def test_forbidden_ids(chosen: int) -> None:
    """Each id until its number of chosen ids, in two filters with another between them."""
    scores = rows("spread", 37)
    allowed_from = [torch.arange(37) % 7, torch.where(torch.arange(37) == 30, 2**62, 0)]
    filters = [Filter(FORBID), Filter("top k", 3), Filter(FORBID)]
    found = filtered(scores, [torch.tensor([chosen]), *allowed_from], filters)
    assert same(found, reference_scores(scores.numpy(), filters, chosen, [each.numpy() for each in allowed_from]))
    assert bool((found[:, 30] == -INF).all())
    assert bool((found[:, torch.arange(37) % 7 > chosen] == -INF).all())


@pytest.mark.parametrize("filters", [(), EVERY], ids=["plain", "all filters"])
@pytest.mark.parametrize("vocabulary", [1, 37, 1001])
@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_ids(dtype: torch.dtype, sample: bool, vocabulary: int, filters: tuple[Filter, ...]) -> None:
    """The best ids, or those that torch's random numbers draw, of the last of several tokens."""
    last = rows("spread", vocabulary).to(dtype)
    logits = torch.stack([last.flip(1), last], dim=1)  # [4, 2, vocabulary]
    spec = Choice(filters, sample)
    torch.manual_seed(3)
    noise = torch.empty(4, vocabulary).exponential_(1).double().numpy() if sample else None
    torch.manual_seed(3)
    found = choice(logits, spec=spec)
    ids, _ = reference(last.double().numpy(), spec=spec, noise=noise)
    assert found.tolist() == ids[:, None].tolist()
    assert vocabulary == 1 or len(set(ids.tolist())) > 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_probabilities_are_in_fp32(dtype: torch.dtype) -> None:
    """Draws from 16-bit logits are those from the same logits in FP32."""
    logits = torch.randn(500, 1, 1001, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = []
    for each in (logits, logits.float()):
        torch.manual_seed(3)
        found.append(choice(each, spec=Choice((Filter("temperature", 0.7),), sample=True)))
    assert torch.equal(*found)


def test_the_first_of_several_best_ids() -> None:
    logits = torch.tensor([[[1.0, 3.0, 3.0, 2.0]], [[-INF, -INF, -INF, -INF]]])
    for filters in ((), (Filter("temperature", 0.5),)):
        assert choice(logits, spec=Choice(filters)).tolist() == [[1], [0]]


@pytest.mark.parametrize("vocabulary", [1, 7, 8, 33, 1001])
def test_best_ids_are_torchs(vocabulary: int) -> None:
    """On the CPU NumPy finds them: with NaN, infinities, zeros of both signs and ties as `torch.argmax` does."""
    generator = torch.Generator().manual_seed(vocabulary)
    special = torch.tensor([0.0, -0.0, INF, -INF, float("nan"), 1.0, 1e-40])
    for share in (0.0, 0.1, 1.0):
        scores = torch.randn(64, 2, vocabulary, generator=generator).round(decimals=1)
        chosen = special[torch.randint(len(special), scores.shape, generator=generator)]
        scores = torch.where(torch.rand(scores.shape, generator=generator) < share, chosen, scores)
        last = scores[:, -1]  # not contiguous
        assert torch.equal(first_best(last), last.argmax(-1, keepdim=True))
        assert vocabulary == 1 or len(first_best(last).unique()) > 2


def test_ends() -> None:
    """Rows end at different times, by either of two ids; then the padding follows, which is an end id itself."""
    ends, padding = torch.tensor([5, 1]), torch.tensor(1)
    ended, finished = torch.zeros(4, 1, dtype=torch.bool), torch.zeros((), dtype=torch.bool)
    spec = Choice(ends=2)
    sequences = [[3, 5, 7, 8, 9], [1, 4, 4, 4, 5], [2, 2, 2, 5, 2], [2, 2, 2, 1, 6]]
    found, all_ended, rows_ended = [], [], np.zeros(4, np.bool_)
    for step in range(5):
        logits = torch.nn.functional.one_hot(torch.tensor([row[step] for row in sequences]), 11).float()
        expected, rows_ended = reference(logits.numpy(), spec=spec, ends=(5, 1), padding=1, ended=rows_ended)
        ids = choice(logits[:, None], ends, padding, ended, finished, spec=spec)
        assert ids.flatten().tolist() == expected.tolist()
        assert ended.flatten().tolist() == rows_ended.tolist()
        found.append(ids.flatten().tolist())
        all_ended.append(bool(finished))
    assert list(zip(*found, strict=True)) == [(3, 5, 1, 1, 1), (1, 1, 1, 1, 1), (2, 2, 2, 5, 1), (2, 2, 2, 1, 1)]
    assert all_ended == [False, False, False, True, True]
