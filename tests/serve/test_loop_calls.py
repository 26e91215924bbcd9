"""Calls on an event loop from other threads: one wake-up for many, none lost."""

import asyncio
from collections.abc import Callable

from accel.serve.loop_calls import batched, call


class Loop(asyncio.AbstractEventLoop):
    """Event loop that only notes what it is to call."""

    def __init__(self, closed: bool = False) -> None:
        self.wake_ups, self.calls, self._closed = 0, [], closed

    def call_soon_threadsafe(self, callback: Callable[[], None], *arguments: object, **_: object) -> None:  # type: ignore[override]
        if self._closed:
            raise RuntimeError("Event loop is closed")
        self.wake_ups += 1
        callback()

    def call_soon(self, callback: Callable[[], None], *arguments: object, **_: object) -> None:  # type: ignore[override]
        self.calls.append(callback)


def one() -> None: ...


def two() -> None: ...


def test_calls_of_a_context_wake_each_loop_once() -> None:
    first, second = Loop(), Loop()
    with batched():
        for function in (one, two, one):
            call(first, function)
        call(second, two)
        assert first.wake_ups == second.wake_ups == 0
    assert (first.wake_ups, first.calls) == (1, [one, two, one])
    assert (second.wake_ups, second.calls) == (1, [two])
    call(first, two)
    assert (first.wake_ups, first.calls) == (2, [one, two, one, two])


def test_an_error_loses_no_call() -> None:
    """Neither one in the context nor a closed loop beside another one."""
    closed, loop = Loop(closed=True), Loop()
    try:
        with batched():
            call(closed, one)
            call(loop, two)
            raise ValueError
    except ValueError:
        pass
    assert loop.calls == [two]
    assert closed.calls == []
    call(closed, one)


def test_a_call_that_raises_stops_no_other() -> None:
    done, errors = [], []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda loop, context: errors.append(context["exception"]))

        def fails() -> None:
            raise ZeroDivisionError

        def from_a_thread() -> None:
            with batched():
                call(loop, fails)
                call(loop, lambda: done.append(1))

        await asyncio.to_thread(from_a_thread)
        await asyncio.sleep(0.01)

    asyncio.run(main())
    assert done == [1]
    assert [type(each) for each in errors] == [ZeroDivisionError]
