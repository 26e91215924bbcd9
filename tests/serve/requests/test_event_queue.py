"""Events of a scheduler's thread: gathered for a time, but for the first and the last ones of a sequence."""

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from accel.serve.protocol import Event, Finished, FinishReason, TokenLogprobs, Tokens
from accel.serve.requests.event_queue import EventQueue

STOP = Finished(FinishReason.STOP)
LONG_S = 0.4  # more than a busy machine takes for what a test does at once


def tokens(*ids: int) -> Tokens:
    return Tokens(ids)


def run(coalesce_s: float, play: Callable[[EventQueue, Callable[[Event], None]], object]) -> None:
    """Run `play(queue, listener)` on an event loop."""

    async def main() -> None:
        queue = EventQueue(100, coalesce_s, lambda: None)
        await play(queue, queue.listener(3))  # type: ignore[misc]

    asyncio.run(main())


@pytest.mark.parametrize("coalesce_s", [0.0, LONG_S])
def test_what_is_gathered(coalesce_s: float) -> None:
    """Events from another thread, 20 ms apart: the first is taken at once, the others together if there is time."""

    async def play(queue: EventQueue, listen: Callable[[Event], None]) -> None:
        def send() -> None:
            for number in range(6):
                listen(tokens(number))
                time.sleep(0.02)

        thread = threading.Thread(target=send)
        start = time.monotonic()
        thread.start()
        taken = [await queue.take()]
        first_s = time.monotonic() - start
        while sum(len(each.ids) for arrivals in taken for each in arrivals) < 6:
            taken.append(await queue.take())
        thread.join()
        assert [token for arrivals in taken for each in arrivals for token in each.ids] == list(range(6))
        assert {each.index for arrivals in taken for each in arrivals} == {3}
        assert first_s < LONG_S
        assert len(taken[0][0].ids) < 6
        if coalesce_s:
            assert len(taken) == 2
            assert time.monotonic() - start >= coalesce_s
        else:
            assert len(taken) > 2

    run(coalesce_s, play)


def test_the_last_event_ends_the_wait() -> None:
    """Whatever time is left, with all that came before it."""

    async def play(queue: EventQueue, listen: Callable[[Event], None]) -> None:
        listen(tokens(1))
        (first,) = await queue.take()
        assert (first.ids, first.end) == ([1], None)
        listen(tokens(2))
        asyncio.get_running_loop().call_later(0.05, listen, STOP)
        start = time.monotonic()
        (rest,) = await queue.take()
        assert (rest.ids, rest.end) == ([2], STOP)
        assert time.monotonic() - start < 10

    run(20.0, play)


def test_ends_only() -> None:
    """Nothing is handed over before the end of a sequence, then all that there is, of the others as well."""

    async def main() -> None:
        queue = EventQueue(100, 20.0, lambda: None, ends_only=True)
        first, second = queue.listener(0), queue.listener(1)
        for number in range(3):
            first(Tokens((number,), (TokenLogprobs(-number),)))
            second(tokens(10 + number, 20 + number))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(queue.take(), 0.1)
        second(STOP)
        before, ended = await queue.take()
        assert (before.index, before.ids, before.end) == (0, [0, 1, 2], None)
        assert [each.token for each in before.logprobs] == [0, -1, -2]
        assert before.times[0] < before.times[1]
        assert (ended.index, ended.ids, ended.logprobs, ended.end) == (1, [10, 20, 11, 21, 12, 22], [], STOP)
        first(STOP)
        while not (rest := await queue.take()):
            pass
        assert [(each.index, each.ids, each.end) for each in rest] == [(0, [], STOP)]

    asyncio.run(main())


def test_the_end_arrives_behind_an_overflow() -> None:
    """Tokens that nobody takes are dropped; that the sequence has ended is not."""

    async def main() -> None:
        called = asyncio.Event()
        queue = EventQueue(2, 0.0, called.set)
        listen = queue.listener(0)
        for number in range(5):
            listen(tokens(number))
        listen(STOP)
        await asyncio.wait_for(called.wait(), 10)
        (found,) = await queue.take()
        assert (found.ids, found.end) == ([0, 1, 2], STOP)

    asyncio.run(main())


def test_the_server_s_setting(play: Callable[..., Any]) -> None:
    """`serve.coalesce_s` is the time that a token behind the first one waits for others."""
    waited = {}
    for coalesce_s in (LONG_S, 0.0):
        server, scheduler = play(coalesce_s=coalesce_s)
        scheduler.on_submit = lambda _: [tokens(10)]
        events = iter(server.openai.completions.create(model="played", prompt="x", stream=True))
        next(events)
        start = time.monotonic()
        scheduler.listeners[0](tokens(11))
        assert next(events).choices[0].text
        waited[coalesce_s] = time.monotonic() - start
        scheduler.listeners[0](STOP)
        assert [event.choices[0].finish_reason for event in events] == ["stop"]
    assert waited[0.0] < 0.9 * LONG_S < waited[LONG_S]
