"""Continuous batching: every request has the tokens that it has alone, whatever happens beside it."""

import gc
import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor

from accel.errors import DeviceMemoryError
from accel.models.generation import AcceleratedModel
from accel.models.rows import Rows
from accel.serve import loop_calls
from accel.serve.protocol import FinishReason, Listener, QueueFullError, Request, RequestTooLongError
from accel.serve.scheduling.limits import SchedulerLimits
from accel.serve.scheduling.opening import open_scheduler
from accel.serve.scheduling.row_scheduler import RowScheduler
from tests.serve.collector import UNIQUE, Collector, alone, submit
from tests.serve.test_loop_calls import Loop

LIMITS = SchedulerLimits(rows=4, queue=64, prompt_tokens=40, total_tokens=60)
LENGTHS = (9, 3, 14, 5, 21, 7, 2, 11)
NEW = (12, 4, 20, 1, 9, 25, 6, 15)
NEVER = 118  # an id that isn't the best one here


def prompt(model: AcceleratedModel, length: int, seed: int = 0) -> Tensor:
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    return torch.randint(3, vocabulary, (1, length), generator=torch.Generator().manual_seed(100 * seed + length))


def wait_until_idle(scheduler: RowScheduler) -> None:
    """Rows are released just after a request's last event."""
    end = time.monotonic() + 30
    while scheduler.status().running and time.monotonic() < end:
        time.sleep(0.01)


@pytest.fixture(params=[False, True], ids=["settled", "ahead"])
def scheduler(model: AcceleratedModel, request: pytest.FixtureRequest) -> Iterator[RowScheduler]:
    """Steps are launched before the tokens of the last one are known, as on a GPU, or not."""
    opened = open_scheduler(model, LIMITS)
    assert isinstance(opened, RowScheduler)
    opened.runs_ahead = request.param
    yield opened
    opened.close()


def test_mixed_lengths(model: AcceleratedModel, scheduler: RowScheduler) -> None:
    """More requests than rows, of other lengths, joining while others run: tokens of each alone, one an event."""
    scheduler.warm_up()
    work = [
        (prompt(model, length), {"max_new_tokens": new, **UNIQUE}) for length, new in zip(LENGTHS, NEW, strict=True)
    ]
    expected = [alone(model, ids, **options) for ids, options in work]
    assert len({tuple(tokens) for tokens in expected}) == len(work)
    assert sum(len(set(tokens)) for tokens in expected) > 60
    found = []
    for number, (ids, options) in enumerate(work):
        found.append(submit(scheduler, ids, **options))
        if number in (1, 4):
            assert found[number].begun.wait(30)
    assert [each.tokens() for each in found] == expected
    assert [each.chunks for each in found] == [len(tokens) for tokens in expected]
    wait_until_idle(scheduler)
    assert scheduler.status().generated_tokens == sum(map(len, expected))
    assert (scheduler.status().running, scheduler.status().cached_tokens) == (0, 0)


def test_plain_greedy_and_the_end(model: AcceleratedModel, scheduler: RowScheduler) -> None:
    """Without processors; a token that comes third ends a request, and is its last one."""
    ids = [prompt(model, length) for length in LENGTHS[:4]]
    expected = [alone(model, each, max_new_tokens=16) for each in ids]
    found = [submit(scheduler, each, max_new_tokens=16) for each in ids]
    assert [each.tokens() for each in found] == expected
    whole = alone(model, ids[0], max_new_tokens=8, **UNIQUE)
    ended = submit(scheduler, ids[0], max_new_tokens=8, eos_token_id=whole[2], **UNIQUE)
    assert ended.tokens() == whole[:3] == alone(model, ids[0], max_new_tokens=8, eos_token_id=whole[2], **UNIQUE)
    assert ended.wait().reason is FinishReason.STOP
    assert found[0].wait().reason is (FinishReason.STOP if len(expected[0]) < 16 else FinishReason.LENGTH)


OPTIONS: tuple[dict[str, Any], ...] = (
    {"repetition_penalty": 3.0},
    {"no_repeat_ngram_size": 2, "min_new_tokens": 10},
    {"forced_bos_token_id": 7, "forced_eos_token_id": 9, **UNIQUE},
    {"suppress_tokens": [4, 5, 6], "begin_suppress_tokens": [8], **UNIQUE},
    {"min_length": 6, "bad_words_ids": [[11], [12, 13]], **UNIQUE},
    {"encoder_no_repeat_ngram_size": 1, **UNIQUE},
    {"exponential_decay_length_penalty": (3, 1.5), **UNIQUE},
)


def test_options(model: AcceleratedModel, scheduler: RowScheduler) -> None:
    """Each beside the others."""
    options = [
        each for each in OPTIONS if model.config.is_encoder_decoder or "encoder_no_repeat_ngram_size" not in each
    ]
    work = [(prompt(model, 6 + number), {"max_new_tokens": 12} | each) for number, each in enumerate(options)]
    expected = [alone(model, ids, **each) for ids, each in work]
    found = [submit(scheduler, ids, **each) for ids, each in work]
    assert [each.tokens() for each in found] == expected


def test_sampling(model: AcceleratedModel, scheduler: RowScheduler) -> None:
    """A seed a request: the tokens of `generate` behind that seed, in any company; without one, others each time."""
    options = {"do_sample": True, "max_new_tokens": 12, "temperature": 1.5, "top_k": 30, "top_p": 0.9}
    ids = prompt(model, 8)
    expected = [alone(model, ids, seed=seed, **options) for seed in range(6)]
    assert len({tuple(tokens) for tokens in expected}) == 6
    found = [submit(scheduler, ids, seed=seed, **options) for seed in range(6)]
    assert [each.tokens() for each in found] == expected
    one_by_one = [submit(scheduler, ids, seed=seed, **options).tokens() for seed in (3, 0)]
    assert one_by_one == [expected[3], expected[0]]
    first, second = (submit(scheduler, ids, **options).tokens() for _ in range(2))
    assert first != second


def test_log_probabilities(model: AcceleratedModel, scheduler: RowScheduler) -> None:
    """Of the model's own distribution, in rows and for requests that `generate` runs."""
    ids = prompt(model, 8)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, **UNIQUE}
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), **options, return_dict_in_generate=True, output_logits=True
    )
    expected = torch.stack(output.logits)[:, 0].log_softmax(-1)
    for more in ({}, {"max_time": 100.0}):
        found = submit(scheduler, ids, logprobs=3, **options, **more)
        tokens = found.tokens()
        assert len(found.logprobs) == 5
        for token, logprobs, right in zip(tokens, found.logprobs, expected, strict=True):
            assert logprobs.token == pytest.approx(float(right[token]), abs=1e-3)
            assert [value for _, value in logprobs.top] == pytest.approx(right.topk(3).values.tolist(), abs=1e-3)


def test_beams_between_steps(model: AcceleratedModel, scheduler: RowScheduler) -> None:
    """Beams and an option that only `generate` knows, while rows go on: all have the tokens that they have alone."""
    ids = prompt(model, 9)
    beams = {"num_beams": 3, "max_new_tokens": 12, **UNIQUE}
    timed = {"max_time": 100.0, "max_new_tokens": 10, **UNIQUE}
    sampled = {"num_beams": 2, "do_sample": True, "max_new_tokens": 8}
    row = {"max_new_tokens": 30, **UNIQUE}
    expected = [alone(model, ids, **options) for options in (beams, timed, row)]
    expected_sampled = alone(model, ids, seed=5, **sampled)
    found = [submit(scheduler, ids, **options) for options in (beams, timed, row)]
    found_sampled = submit(scheduler, ids, seed=5, **sampled)
    assert [each.tokens() for each in found] == expected
    assert found_sampled.tokens() == expected_sampled
    assert [each.chunks for each in found] == [1, len(expected[1]), len(expected[2])]


class Slow(LogitsProcessor):
    """Leave the scores as they are, and take time for it."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        time.sleep(0.02)
        return scores


class Broken(LogitsProcessor):
    """Fail at the third token."""

    calls = 0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.calls += 1
        if self.calls == 3:
            raise RuntimeError("the grammar is broken")
        return scores


@pytest.mark.parametrize("more", [{}, {"num_beams": 2}, {"max_time": 100.0}])
def test_cancel_and_deadline(model: AcceleratedModel, scheduler: RowScheduler, more: dict[str, Any]) -> None:
    """Midway, of running and of waiting requests; the one beside them is as if nothing had happened."""
    ids = prompt(model, 9)
    slow: dict[str, Any] = {"max_new_tokens": 50 - 9, "min_new_tokens": 50 - 9, "logits_processor": Slow(), **UNIQUE}
    expected = alone(model, ids, max_new_tokens=30, **UNIQUE)
    beside = submit(scheduler, ids, max_new_tokens=30, **UNIQUE)
    cancelled = submit(scheduler, ids, **slow, **more)
    late = submit(scheduler, ids, deadline=time.monotonic() + 0.3, **slow, **more)
    if "num_beams" not in more:
        assert cancelled.begun.wait(30)
    assert cancelled.ticket is not None
    cancelled.ticket.cancel()
    assert cancelled.wait().reason is FinishReason.CANCELLED
    assert late.wait().reason is FinishReason.TIMEOUT
    assert len(late.ids) < 50 - 9
    assert beside.tokens() == expected
    cancelled.ticket.cancel()
    passed = submit(scheduler, ids, deadline=time.monotonic() - 1, max_new_tokens=2)
    assert (passed.wait().reason, passed.ids) == (FinishReason.TIMEOUT, [])


def test_failures_of_one_request(model: AcceleratedModel, scheduler: RowScheduler) -> None:
    """A listener or a processor that raises ends its own request only."""
    ids = prompt(model, 9)
    expected = alone(model, ids, max_new_tokens=20, **UNIQUE)
    calls: list[object] = []

    def raising(event: object) -> None:
        calls.append(event)
        if len(calls) == 2:
            raise RuntimeError("the client's queue is gone")

    beside = submit(scheduler, ids, max_new_tokens=20, **UNIQUE)
    scheduler.submit(Request({"input_ids": ids}, {"max_new_tokens": 30, **UNIQUE}), raising)
    broken = submit(scheduler, ids, max_new_tokens=20, logits_processor=Broken())
    error = broken.wait().error
    assert (broken.wait().reason, str(error), len(broken.ids)) == (FinishReason.ERROR, "the grammar is broken", 2)
    assert beside.tokens() == expected
    assert len(calls) == 2
    wait_until_idle(scheduler)
    assert scheduler._rows.free == scheduler._rows.capacity


def test_refusals(model: AcceleratedModel) -> None:
    """Before a request is queued; each names the value."""
    scheduler = open_scheduler(model, SchedulerLimits(rows=1, queue=2, prompt_tokens=10, total_tokens=50))
    ids = prompt(model, 9)
    with pytest.raises(RequestTooLongError, match="the prompt has 11 tokens: this server allows 10"):
        submit(scheduler, prompt(model, 11))
    with pytest.raises(RequestTooLongError, match="and 50 new ones: this server allows 50 together"):
        submit(scheduler, ids, max_new_tokens=50)
    with pytest.raises(ValueError, match="no option of GenerationConfig: num_beam"):
        submit(scheduler, ids, num_beam=4)
    with pytest.raises(ValueError, match="temperature"):
        submit(scheduler, ids, do_sample=True, temperature=-1.0)
    with pytest.raises(ValueError, match="input_ids contains 99999"):
        submit(scheduler, torch.tensor([[99999]]))
    with pytest.raises(ValueError, match="input_ids is empty"):
        submit(scheduler, ids[:, :0])
    with pytest.raises(ValueError, match="expected one sequence"):
        submit(scheduler, ids.repeat(2, 1))
    with pytest.raises(ValueError, match="the request has no input_ids"):
        scheduler.submit(Request({}), Collector())
    with pytest.raises(ValueError, match="num_return_sequences"):
        submit(scheduler, ids, num_return_sequences=2, num_beams=2)
    slow = [submit(scheduler, ids, max_new_tokens=30, min_new_tokens=30, logits_processor=Slow())]
    assert slow[0].begun.wait(30)
    slow += [submit(scheduler, ids, max_new_tokens=2) for _ in range(2)]
    with pytest.raises(QueueFullError, match="2 requests wait already"):
        submit(scheduler, ids, max_new_tokens=2)
    assert (scheduler.status().waiting, scheduler.status().running) == (2, 1)
    assert len(slow[0].tokens()) == 30
    scheduler.close(drain_s=30)
    assert [each.wait().reason for each in slow] == [FinishReason.LENGTH] * 3
    with pytest.raises(RuntimeError, match="this scheduler is closed"):
        submit(scheduler, ids)


def test_close_cancels(model: AcceleratedModel) -> None:
    """Running and waiting requests get their last event, and the thread ends."""
    scheduler = open_scheduler(model, SchedulerLimits(rows=1, queue=2, total_tokens=60))
    options = {"max_new_tokens": 40, "min_new_tokens": 40}
    running = submit(scheduler, prompt(model, 9), logits_processor=Slow(), **options)
    assert running.begun.wait(30)
    waiting = submit(scheduler, prompt(model, 9), **options)
    scheduler.close()
    assert [each.wait().reason for each in (running, waiting)] == [FinishReason.CANCELLED] * 2
    assert not [thread for thread in threading.enumerate() if thread.name == "accel-rows"]


def test_steps_ahead(model: AcceleratedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most steps get the last one's tokens from the device; a row that ends computes one token that nobody sees."""
    opened = open_scheduler(model, LIMITS)
    assert isinstance(opened, RowScheduler)
    opened.runs_ahead = True
    given: list[Any] = []
    step = Rows.step
    monkeypatch.setattr(Rows, "step", lambda rows, tokens: (given.append(tokens), step(rows, tokens))[1])
    ids = [prompt(model, length) for length in (9, 4, 14)]
    expected = [alone(model, each, max_new_tokens=30, eos_token_id=NEVER) for each in ids]
    assert [len(tokens) for tokens in expected] == [30] * 3
    with opened.changed:
        found = [submit(opened, each, max_new_tokens=30, eos_token_id=NEVER) for each in ids]
    assert [each.tokens() for each in found] == expected
    wait_until_idle(opened)
    assert [isinstance(tokens, Tensor) for tokens in given[:2]] == [False, True]
    assert sum(isinstance(tokens, Tensor) for tokens in given) > 20
    assert len(given) <= 31, "the end by length is known ahead"
    options: dict[str, Any] = {"max_new_tokens": 30, "do_sample": True}
    drawn = [alone(model, ids[0], seed=seed, **options) for seed in range(3)]
    ends = drawn[0][5]
    right = [alone(model, ids[0], seed=seed, eos_token_id=ends, **options) for seed in range(3)]
    assert len(right[0]) <= 6
    assert max(map(len, right)) > 10
    for more in ({}, {"logprobs": 2}):
        with opened.changed:
            found = [submit(opened, ids[0], seed=seed, eos_token_id=ends, **options, **more) for seed in range(3)]
            greedy = submit(opened, ids[1], max_new_tokens=30, eos_token_id=NEVER)
        assert [each.tokens() for each in found] == right
        assert greedy.tokens() == expected[1]
        assert [len(each.logprobs) for each in found] == [len(tokens) if more else 0 for tokens in right]
    opened.close()


def test_a_step_wakes_an_event_loop_once(causal: AcceleratedModel) -> None:
    """However many rows report a token to it."""
    scheduler, loop = open_scheduler(causal, LIMITS), Loop()
    options = {"max_new_tokens": 12, **UNIQUE}
    prompts = [prompt(causal, length) for length in LENGTHS[:4]]
    expected = [alone(causal, ids, **options) for ids in prompts]
    found = [Collector() for _ in prompts]

    def listener(collector: Collector) -> Listener:
        return lambda event: loop_calls.call(loop, lambda: collector(event))

    for ids, each in zip(prompts, found, strict=True):
        scheduler.submit(Request({"input_ids": ids}, options, None), listener(each))
    end = time.monotonic() + 30
    while len(loop.calls) < sum(len(tokens) + 1 for tokens in expected) and time.monotonic() < end:
        time.sleep(0.01)
    scheduler.close()
    for function in loop.calls:
        function()
    assert [each.tokens() for each in found] == expected
    assert loop.wake_ups <= 12 + 3 * 4  # steps of all, and first ones of requests that began before others


def test_first_tokens_by_a_step(t5: AcceleratedModel) -> None:
    """As on a GPU, also of a request whose decoder prompt has two tokens and one that `generate` runs."""
    opened = open_scheduler(t5, LIMITS)
    assert isinstance(opened, RowScheduler)
    opened._prompts.begins_with_step = True
    opened.warm_up()
    work = [(prompt(t5, length), {"max_new_tokens": new, **UNIQUE}) for length, new in zip(LENGTHS, NEW, strict=True)]
    work.append((prompt(t5, 6), {"max_new_tokens": 8, "num_beams": 2}))
    expected = [alone(t5, ids, **options) for ids, options in work]
    begins = torch.tensor([[0, 9]])
    expected_prefix = alone(t5, prompt(t5, 5), decoder_input_ids=begins, max_new_tokens=9, **UNIQUE)[1:]
    with opened.changed:
        found = [submit(opened, ids, **options) for ids, options in work]
        prefix = submit(opened, prompt(t5, 5), inputs={"decoder_input_ids": begins}, max_new_tokens=9, **UNIQUE)
    assert [each.tokens() for each in found] == expected
    assert prefix.tokens() == expected_prefix
    sampled = {"do_sample": True, "max_new_tokens": 8}
    assert submit(opened, prompt(t5, 7), seed=3, **sampled).tokens() == alone(t5, prompt(t5, 7), seed=3, **sampled)
    opened.close()


def test_gathering(causal: AcceleratedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """New requests wait for others until they have waited as long as the running ones would for their prompts."""
    opened = open_scheduler(causal, LIMITS)
    assert isinstance(opened, RowScheduler)
    running: Any = [object(), object()]
    waiting: Any = [Collector() for _ in range(3)]
    ids = prompt(causal, 5)
    opened.close()
    jobs = [opened._job(Request({"input_ids": ids}, {"max_new_tokens": 4}), each) for each in waiting]
    now = jobs[0].submitted
    monkeypatch.setattr(time, "monotonic", lambda: now)
    opened._prompts.budget.least_s, opened._row_limit = 1.0, 5
    for submitted, expected in (
        ([0], True),
        ([-1.9], True),
        ([-2.1], False),
        ([-1.2, -0.9], False),
        ([-1.0, -0.9], True),
        ([0, 0, 0], False),  # as many as there are rows
        ([], False),
    ):
        opened.waiting.clear()
        for job, since in zip(jobs, submitted, strict=False):
            job.submitted = now + since
            opened.waiting.append(job)
        opened._active = running
        assert opened._gathers() is expected, submitted
        opened._active = []
        assert not opened._gathers()
    opened._active, opened._row_limit = [running] * 20, 30
    jobs[0].submitted = now - 7.9
    opened.waiting.append(jobs[0])
    assert opened._gathers()
    jobs[0].submitted = now - 8.1  # together, the others would wait longer, but this is long enough
    assert not opened._gathers()


def test_too_little_memory(model: AcceleratedModel, scheduler: RowScheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    """For more than two rows: the others wait. For longer rows: that request ends with the error, the others go on."""
    whole = Rows.resize

    def resize(rows: Rows, capacity: int, max_length: int, source_length: int | None = None) -> dict[int, int]:
        if capacity > 2 or max_length > 40:
            raise DeviceMemoryError(f"{capacity} rows of {max_length} tokens don't fit")
        return whole(rows, capacity, max_length, source_length)

    monkeypatch.setattr(Rows, "resize", resize)
    ids = [prompt(model, 3, seed) for seed in range(5)]
    expected = [alone(model, each, max_new_tokens=12, **UNIQUE) for each in ids]
    found = [submit(scheduler, each, max_new_tokens=12, **UNIQUE) for each in ids]
    assert [each.tokens() for each in found] == expected
    wait_until_idle(scheduler)
    assert scheduler._rows.capacity <= 2
    long = submit(scheduler, ids[0], max_new_tokens=56, min_new_tokens=56)
    short = submit(scheduler, ids[1], max_new_tokens=12, **UNIQUE)
    assert short.tokens() == expected[1]
    finished = long.wait()
    assert finished.reason is FinishReason.ERROR
    assert isinstance(finished.error, DeviceMemoryError)
    assert 30 < len(long.ids) < 56


def test_failed_step(model: AcceleratedModel, scheduler: RowScheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    """The requests in it end with the error; later ones are served."""
    with monkeypatch.context() as broken:
        broken.setattr(Rows, "step", lambda *_: (_ for _ in ()).throw(RuntimeError("the device fell off the bus")))
        failed = submit(scheduler, prompt(model, 5), max_new_tokens=8, **UNIQUE).wait()
    assert (failed.reason, str(failed.error)) == (FinishReason.ERROR, "the device fell off the bus")
    expected = alone(model, prompt(model, 5), max_new_tokens=8, **UNIQUE)
    assert submit(scheduler, prompt(model, 5), max_new_tokens=8, **UNIQUE).tokens() == expected


def test_long_prompts_in_parts(causal: AcceleratedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A running request gets tokens between the parts of a long prompt beside it."""
    scheduler = open_scheduler(causal, SchedulerLimits(rows=2, prompt_tokens=200, total_tokens=250, stall_s=1e-9))
    long, short = prompt(causal, 120), prompt(causal, 5)
    lasting = {"max_new_tokens": 80, "min_new_tokens": 80, **UNIQUE}
    expected = [alone(causal, short, **lasting), alone(causal, long, max_new_tokens=12, **UNIQUE)]
    running = submit(scheduler, short, **lasting)
    assert running.begun.wait(30)
    seen: list[int] = []
    joined = Collector()

    def first_token(event: Any) -> None:
        seen.append(len(running.ids))
        joined(event)

    before = len(running.ids)
    scheduler.submit(Request({"input_ids": long}, {"max_new_tokens": 12, **UNIQUE}), first_token)
    assert [running.tokens(), joined.tokens()] == expected
    scheduler.close()
    assert seen[0] - before >= 120 // 8 - 2, "parts have 8 tokens, with a step between two of them"


def test_prompts_together(causal: AcceleratedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that arrive together, within the budget and the memory: tokens are those of each alone."""
    groups: list[int] = []
    together = Rows.prefill_together

    def note(self: Rows, rows: Any, **inputs: Any) -> Tensor:
        groups.append(len(rows))
        if len(groups) == 2:
            raise DeviceMemoryError("for four at most")
        return together(self, rows, **inputs)

    limits = SchedulerLimits(rows=16, prompt_tokens=40, total_tokens=60)
    prompts = [prompt(causal, length, seed) for seed in range(5) for length in (7, 9, 20)]
    expected = [alone(causal, ids, max_new_tokens=8, **UNIQUE) for ids in prompts]
    assert len({tuple(tokens) for tokens in expected}) > 10
    opened = open_scheduler(causal, limits)
    assert isinstance(opened, RowScheduler)
    opened.warm_up()
    monkeypatch.setattr(Rows, "prefill_together", note)
    monkeypatch.setattr(opened._prompts.budget, "tokens", lambda limited: 100)
    with opened.changed:  # the thread sees all of them at once
        found = [submit(opened, ids, max_new_tokens=8, **UNIQUE) for ids in prompts]
    assert [each.tokens() for each in found] == expected
    opened.close()
    assert groups == [5, 5, 2, 3, 5], "padded to 20, of 100 tokens; the second batch once more in two parts"


def test_shared_beginnings(causal: AcceleratedModel) -> None:
    """The third prompt with a beginning takes it from the second's caches, and has the tokens that it has alone."""
    scheduler = open_scheduler(causal, LIMITS)
    assert isinstance(scheduler, RowScheduler)
    beginning = prompt(causal, 34)
    prompts = [torch.cat([beginning, prompt(causal, 4, seed)], 1) for seed in (1, 2, 3, 4)]
    expected = [alone(causal, each, max_new_tokens=12, **UNIQUE) for each in prompts]
    computed: list[int] = []
    measured = scheduler._prompts.budget.measured
    scheduler._prompts.budget.measured = lambda tokens, seconds: (computed.append(tokens), measured(tokens, seconds))[1]  # type: ignore[method-assign]
    found = [submit(scheduler, each, max_new_tokens=12, **UNIQUE).tokens() for each in prompts]
    scheduler.close()
    assert found == expected
    assert computed == [38, 32, 6, 6, 6]


@pytest.mark.slow
def test_random_requests(t5: AcceleratedModel) -> None:
    """200 of all kinds, some cancelled: each that succeeds is right, and neither threads nor memory are left."""
    generator = torch.Generator().manual_seed(1)

    def pick(count: int) -> int:
        return int(torch.randint(count, (), generator=generator))

    work: list[tuple[Tensor, int | None, dict[str, Any]]] = []
    for number in range(200):
        options: dict[str, Any] = {"max_new_tokens": 1 + pick(20), **UNIQUE}
        kind, seed = pick(12), None
        if kind == 0:
            options |= {"num_beams": 2}
        elif kind < 4:
            options, seed = {"max_new_tokens": 1 + pick(20), "do_sample": True, "top_k": 20}, number
        work.append((prompt(t5, 1 + pick(30), seed=number), seed, options))
    expected = [alone(t5, ids, seed=seed, **options) for ids, seed, options in work]
    scheduler = open_scheduler(t5, SchedulerLimits(rows=8, prompt_tokens=40, total_tokens=60))
    scheduler.warm_up()
    threads: list[int] = []
    for repeat in range(2):
        found = []
        for number, (ids, seed, options) in enumerate(work):
            found.append(submit(scheduler, ids, seed=seed, **options))
            if number % 20 == 7:
                ticket = found[-1].ticket
                assert ticket is not None
                ticket.cancel()
        for number, (each, right) in enumerate(zip(found, expected, strict=True)):
            cancelled = each.wait().reason is FinishReason.CANCELLED
            assert not cancelled or number % 20 == 7
            assert each.ids == right[: len(each.ids)] if cancelled else each.ids == right
        gc.collect()
        threads.append(threading.active_count())
        memory = psutil.Process().memory_info().rss
        if repeat == 0:
            before = memory
    scheduler.close()
    assert threads[0] == threads[1]
    assert threading.active_count() == threads[0] - 1
    assert memory < before * 1.03
