"""Tokens of a mixed batch: those of each request alone, with one transfer from the device."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, RepetitionPenaltyLogitsProcessor
from transformers.generation import logits_process

from accel.engine.operations import choice
from accel.models.decoding.sequence import Sequence
from accel.models.generation import AcceleratedModel
from accel.serve.protocol import Request
from accel.serve.scheduling.job import Job
from accel.serve.scheduling.limits import SchedulerLimits
from accel.serve.scheduling.opening import open_scheduler
from accel.serve.scheduling.row_scheduler import RowScheduler
from accel.serve.scheduling.token_selection import Selected, TokenSelection
from tests.serve.collector import UNIQUE, alone, submit

VOCABULARY = 501
PROMPT = torch.tensor([[5, 9, 7]])
TEMPERATURE, TOP_K = logits_process.TemperatureLogitsWarper(1.7), logits_process.TopKLogitsWarper(50)
TOP_P, MIN_P = logits_process.TopPLogitsWarper(0.8), logits_process.MinPLogitsWarper(0.02)
READING = {"tolist", "item", "cpu", "numpy", "nonzero", "__int__", "__float__", "__bool__", "__index__", "__array__"}


class Even(LogitsProcessor):
    """A grammar that allows ids of one remainder by 2, other than that of the last token."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        ids = torch.arange(scores.shape[1], device=scores.device)
        return scores.masked_fill((ids % 2 == input_ids[:, -1] % 2)[None], -torch.inf)


class Broken(LogitsProcessor):
    """Fail."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        raise RuntimeError("the grammar is broken")


def job(*processors: LogitsProcessor, seed: int | None = None, logprobs: int | None = None) -> Job:
    """Return a request that is drawn where it has a seed."""
    config = GenerationConfig(max_length=100, do_sample=seed is not None)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    sequence = Sequence(PROMPT, config, LogitsProcessorList(processors), generator)
    return Job(Request({"input_ids": PROMPT}, logprobs=logprobs), lambda _: None, sequence, None, lambda: None)


# Rows of the same filters lie apart, and rows of the same method beside rows of another.
MIXED: tuple[Callable[[], Job], ...] = (
    lambda: job(),
    lambda: job(TEMPERATURE, TOP_K, TOP_P, seed=1),
    lambda: job(Even(), logprobs=2),
    lambda: job(seed=2, logprobs=0),
    lambda: job(TEMPERATURE, TOP_K, TOP_P, seed=3, logprobs=4),
    lambda: job(MIN_P, seed=3),
    lambda: job(logprobs=3),
    lambda: job(Even(), TEMPERATURE, seed=4),
    lambda: job(RepetitionPenaltyLogitsProcessor(5.0)),
    lambda: job(TEMPERATURE, TOP_K, TOP_P, seed=1),
)


def logits_of(step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return logits [rows, VOCABULARY]."""
    found = torch.randn(len(MIXED), VOCABULARY, generator=torch.Generator().manual_seed(step))
    return (found * 2).to(dtype)


def as_transformers(one: Job, logits: Tensor, generator: torch.Generator | None) -> int:
    """Return the token that transformers' loops select: its processors, then `argmax` or `torch.multinomial`."""
    scores = one.sequence._processors(one.sequence.ids.clone(), logits[None].float())  # type: ignore[arg-type]
    if generator is None:
        return int(scores.argmax())
    return int(torch.multinomial(scores.softmax(-1), 1, generator=generator))


class Transfers(TorchFunctionMode):
    """Count the calls that read values of tensors on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        self.calls.update({name} & READING)
        return func(*args, **(kwargs or {}))


def selected(jobs: list[Job], logits: Tensor) -> list[Selected]:
    """Return what the rows got."""
    found = TokenSelection(jobs, logits, range(len(jobs))).results()
    assert all(isinstance(each, Selected) for each in found), found
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_mixed_batch(dtype: torch.dtype) -> None:
    """Token by token what transformers selects for each row, whose generators go on over the steps."""
    jobs = [make() for make in MIXED]
    generators = [None if each.sequence.generator is None else each.sequence.generator.clone_state() for each in jobs]
    tokens = []
    for step in range(12):
        logits = logits_of(step, dtype)
        before = logits.clone()
        expected = [as_transformers(*each) for each in zip(jobs, logits, generators, strict=True)]
        found = [each.token for each in selected(jobs, logits)]
        assert found == expected
        assert torch.equal(logits, before)
        for one, token in zip(jobs, found, strict=True):
            one.sequence.append(token)
        tokens.append(found)
    columns = list(zip(*tokens, strict=True))
    assert min(len(set(column)) for column in columns) > 5
    assert columns[1] != columns[9], "rows of the same seed but other logits"


def test_log_probabilities() -> None:
    """Of the model's distribution, for the rows that asked, as many as each asked for."""
    jobs, logits = [make() for make in MIXED], logits_of(0)
    right = logits.log_softmax(-1)
    for row, (one, found) in enumerate(zip(jobs, selected(jobs, logits), strict=True)):
        count = one.request.logprobs
        assert len(found.logprobs) == (0 if count is None else 1)
        if count is not None:
            assert found.logprobs[0].token == float(right[row, found.token])
            best = right[row].topk(count)
            assert found.logprobs[0].top == tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))


@pytest.mark.parametrize("rows", [1, len(MIXED)])
def test_one_transfer(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the rows ask for; what transformers' own selection reads shows that all reads are counted."""
    monkeypatch.setattr(choice, "on_cpu", lambda _: False)  # else numpy reads the memory that it shares with torch
    jobs = [make() for make in MIXED]
    logits = logits_of(0)
    with Transfers() as transfers:
        selected(jobs[-rows:], logits[-rows:])
    assert transfers.calls == {"tolist": 1}
    with Transfers() as each_alone:
        for one, scores in zip(jobs, logits, strict=True):
            as_transformers(one, scores, one.sequence.generator)
    assert each_alone.calls.total() == len(MIXED)


def test_failures_of_one_row() -> None:
    """A processor that raises, and scores of which none can be drawn: the other rows have their tokens."""
    jobs = [job(seed=1), job(Broken()), job(logits_process.TemperatureLogitsWarper(1e-45), seed=2, logprobs=1), job()]
    logits = logits_of(0)
    expected = [each.token for each in selected([job(seed=1), job()], logits[[5, 2]])]
    first, broken, infinite, last = TokenSelection(jobs, logits, [5, 0, 1, 2]).results()
    assert [first, last] == [Selected(token) for token in expected]
    assert isinstance(broken, RuntimeError)
    assert isinstance(infinite, ValueError)
    assert "no token can be drawn" in str(infinite)
    only = TokenSelection(jobs[1:2], logits, [0]).results()
    assert [type(each) for each in only] == [RuntimeError]


def test_a_mixed_batch_through_the_model(model: AcceleratedModel) -> None:
    """Greedy, sampled, with processors, a grammar and log probabilities at once: tokens of each alone."""
    scheduler = open_scheduler(model, SchedulerLimits(rows=8, queue=64, prompt_tokens=40, total_tokens=60))
    assert isinstance(scheduler, RowScheduler)
    work: list[tuple[int | None, dict[str, Any]]] = [
        (None, UNIQUE),
        (None, {"no_repeat_ngram_size": 2, "repetition_penalty": 2.0}),
        (1, {"do_sample": True}),
        (2, {"do_sample": True, "temperature": 1.5, "top_k": 30}),
        (3, {"do_sample": True, "temperature": 1.5, "top_k": 30}),
        (4, {"do_sample": True, "top_p": 0.7, "min_new_tokens": 8, **UNIQUE}),
        (5, {"do_sample": True, "min_p": 0.001, "typical_p": 0.9}),
    ]
    ids = torch.randint(3, 90, (1, 9), generator=torch.Generator().manual_seed(1))
    constrained = {"logits_processor": LogitsProcessorList([Even()]), "max_new_tokens": 14}
    expected = [alone(model, ids, seed=seed, max_new_tokens=14, **options) for seed, options in work]
    expected.append(alone(model, ids, **constrained))
    assert len({tuple(tokens) for tokens in expected}) >= len(expected) - 1
    found = [
        submit(scheduler, ids, seed=seed, max_new_tokens=14, logprobs=number if number % 2 else None, **options)
        for number, (seed, options) in enumerate(work)
    ]
    found.append(submit(scheduler, ids, max_new_tokens=14, logits_processor=Even()))
    assert [each.tokens() for each in found] == expected
    assert [len(each.logprobs) for each in found] == [
        len(each.ids) if number % 2 and number < len(work) else 0 for number, each in enumerate(found)
    ]
    scheduler.close()
