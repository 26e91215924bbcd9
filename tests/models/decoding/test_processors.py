"""Filters do bit for bit what transformers' logits processors do."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process

from accel.engine.operations.choice import filtered
from accel.models.decoding.processors import FILTERS, FORBIDDING, as_filters

INF = float("inf")
PROMPT, VOCABULARY = 4, 501
PROCESSORS: dict[str, Any] = {
    "temperature": logits_process.TemperatureLogitsWarper(0.7),
    "top k": logits_process.TopKLogitsWarper(20),
    "top k, least": logits_process.TopKLogitsWarper(2, filter_value=-7.0, min_tokens_to_keep=5),
    "top k of all": logits_process.TopKLogitsWarper(5000),
    "top p": logits_process.TopPLogitsWarper(0.9),
    "top p, least": logits_process.TopPLogitsWarper(0.1, filter_value=-7.0, min_tokens_to_keep=30),
    "min p": logits_process.MinPLogitsWarper(0.1),
    "min p, least": logits_process.MinPLogitsWarper(1.0, min_tokens_to_keep=30),
    "typical p": logits_process.TypicalLogitsWarper(0.6),
    "typical p, least": logits_process.TypicalLogitsWarper(0.01, min_tokens_to_keep=30),
    "epsilon": logits_process.EpsilonLogitsWarper(0.003),
    "epsilon, least": logits_process.EpsilonLogitsWarper(0.9, min_tokens_to_keep=30),
    "finite": logits_process.InfNanRemoveLogitsProcessor(),
    "log softmax": logits_process.LogitNormalization(),
    "suppressed": logits_process.SuppressTokensLogitsProcessor([3, 400, 10_000]),
    "suppressed at the beginning": logits_process.SuppressTokensAtBeginLogitsProcessor([3, 4], PROMPT),
    "suppressed before": logits_process.SuppressTokensAtBeginLogitsProcessor([3, 4], PROMPT - 1),
    "least length": logits_process.MinLengthLogitsProcessor(PROMPT + 2, [1, 9]),
    "least length, reached": logits_process.MinLengthLogitsProcessor(PROMPT - 1, 1),
    "least number": logits_process.MinNewTokensLengthLogitsProcessor(PROMPT, 2, [1, 9]),
    "least number after less": logits_process.MinNewTokensLengthLogitsProcessor(PROMPT - 1, 2, 1),
}


def scores(kind: str) -> Tensor:
    """Return scores [5, VOCABULARY]."""
    found = torch.randn(5, VOCABULARY, generator=torch.Generator().manual_seed(2)) * 3
    if kind == "ties":
        found = found.round()
    if kind == "forbidden":
        found[:, ::3] = -INF
        found[2, torch.arange(VOCABULARY) != 250] = -INF
        found[3] = -INF
    return found


def compare(processors: list[Any], found: Tensor) -> None:
    """Compare processors and their filters at several lengths, for equal bits."""
    known = as_filters(LogitsProcessorList(processors), PROMPT, VOCABULARY, torch.device("cpu"))
    assert known is not None
    filters, allowed_from = known
    for selected in range(4):
        ids: Any = torch.zeros(5, PROMPT + selected, dtype=torch.int64)
        expected = LogitsProcessorList(processors)(ids, found.clone())
        actual = filtered(found, [torch.tensor([selected]), *allowed_from], filters)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", ["spread", "ties", "forbidden"])
@pytest.mark.parametrize("processor", PROCESSORS.values(), ids=PROCESSORS)
def test_one(processor: Any, kind: str) -> None:
    compare([processor], scores(kind))


def test_not_finite() -> None:
    found = scores("forbidden")
    found[:, 7], found[:, 8] = float("nan"), INF
    compare([PROCESSORS["finite"]], found)


def test_all() -> None:
    """One after the other, the forbidding ones between the others."""
    compare(list(PROCESSORS.values()), scores("spread"))
    compare(list(reversed(PROCESSORS.values())), scores("ties"))


def test_neighbours_that_forbid_are_one_filter() -> None:
    names = ("least length", "least number", "suppressed", "top k", "suppressed at the beginning")
    processors = [PROCESSORS[name] for name in names]
    compare(processors, scores("spread"))
    known = as_filters(LogitsProcessorList(processors), PROMPT, VOCABULARY, torch.device("cpu"))
    assert known is not None
    assert [each.name for each in known[0]] == ["forbid", "top k", "forbid"]
    assert known[1].shape == (2, VOCABULARY)


def test_every_class_is_compared() -> None:
    assert {type(processor) for processor in PROCESSORS.values()} == FILTERS.keys() | FORBIDDING.keys()


@pytest.mark.parametrize(
    "processor",
    [
        logits_process.RepetitionPenaltyLogitsProcessor(2.0),  # reads the ids
        logits_process.SuppressTokensAtBeginLogitsProcessor([3], PROMPT + 1),  # allowed before that, too
        type("Custom", (logits_process.TopKLogitsWarper,), {})(3),  # may do anything
    ],
    ids=lambda processor: type(processor).__name__,
)
def test_no_filter(processor: Any) -> None:
    processors = LogitsProcessorList([PROCESSORS["top k"], processor])
    assert as_filters(processors, PROMPT, VOCABULARY, torch.device("cpu")) is None
