"""Events of a scheduler's thread: gathered for a time, but for the first and the last ones of a sequence."""

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from accel.serve.protocol import Event, Finished, FinishReason, Tokens
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
        while sum(map(len, taken)) < 6:
            taken.append(await queue.take())
        thread.join()
        assert [event for events in taken for _, event in events] == [tokens(number) for number in range(6)]
        assert {index for events in taken for index, _ in events} == {3}
        assert first_s < LONG_S
        assert len(taken[0]) < 6
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
        assert await queue.take() == [(3, tokens(1))]
        listen(tokens(2))
        asyncio.get_running_loop().call_later(0.05, listen, STOP)
        start = time.monotonic()
        assert await queue.take() == [(3, tokens(2)), (3, STOP)]
        assert time.monotonic() - start < 10

    run(20.0, play)


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
