"""The side that answers HTTP: schedulers whose work another process does."""

import asyncio
import itertools
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing.connection import Connection
from typing import Any

from accel.serve import loop_calls
from accel.serve.protocol import Finished, FinishReason, Listener, Request, Status, Tokens
from accel.serve.remote import messages
from accel.serve.remote.messages import Answer, Call, Reply

logger = logging.getLogger(__name__)

ANSWER_S = 5.0  # for calls that take no time
END_S = 20.0  # for the other process to free its models
ENDED = "the process that decodes has ended"


class Link:
    """Connection to a `scheduler_server.SchedulerServer`, whose replies one thread takes.

    Args:
        connection: The connection. It is closed with the link.
        on_lost: Called once, with the error that requests end with, when the other process has ended by itself.
    """

    def __init__(self, connection: Connection, on_lost: Callable[[Exception], None]) -> None:
        self._connection, self._on_lost = connection, on_lost
        self._numbers = itertools.count()
        self._sending = threading.Lock()
        self._answers: dict[int, Future[Any]] = {}
        self._listeners: dict[int, Listener] = {}
        self._closing = self._ended = False
        self._thread = threading.Thread(target=self._receive, name="accel-events", daemon=True)
        self._thread.start()

    def call(self, model: str, method: str, argument: Any = None, listener: Listener | None = None) -> "Pending":
        """Let the other process make a call.

        Args:
            model: Name of the model.
            method: See `messages.Call`.
            argument: Its argument.
            listener: Gets the events of the request that the call submits.
        """
        number: int = next(self._numbers)
        answer: Future[Any] = Future()
        answer.set_running_or_notify_cancel()  # whoever waits for it may stop waiting, and it comes none the less
        self._answers[number] = answer
        if listener is not None:
            self._listeners[number] = listener
        self._send(Call(number, model, method, argument))
        if self._ended:
            self._end()
        return Pending(self, number, model, answer)

    def cancel(self, number: int, model: str) -> None:
        """Cancel a request, if it hasn't ended."""
        if number in self._listeners:
            self._send(Call(number, model, "cancel"))

    def close(self) -> None:
        """End the other process's part, and wait for its last replies."""
        if not self._closing:
            self._closing = True
            self._send(None)
            self._thread.join(END_S)
            self._connection.close()

    def _send(self, call: Call | None) -> None:
        """Send a call. Where the other process has ended, `_receive` says so to all that wait."""
        try:
            with self._sending:
                messages.send(self._connection, call)
        except OSError:
            logger.debug(ENDED)

    def _receive(self) -> None:
        """Take replies until the other process has ended."""
        try:
            while True:
                replies: list[Reply] = messages.receive(self._connection)
                with loop_calls.batched():
                    for number, content in replies:
                        self._take(number, content)
        except (EOFError, OSError):
            logger.debug(ENDED)
        finally:
            self._ended = True
            self._end()
            if not self._closing:
                self._on_lost(RuntimeError(ENDED))

    def _take(self, number: int, content: Any) -> None:
        """Take a reply."""
        if isinstance(content, Answer):
            answer = self._answers.pop(number)
            if content.error is None:
                answer.set_result(content.result)
            else:
                self._listeners.pop(number, None)
                answer.set_exception(content.error)
            return
        ends = isinstance(content, Finished)
        listener = self._listeners.pop(number, None) if ends else self._listeners.get(number)
        if listener is not None:
            listener(Tokens((content,)) if isinstance(content, int) else content)

    def _end(self) -> None:
        """End everything that waits for the other process."""
        for number in list(self._answers):
            if (answer := self._answers.pop(number, None)) is not None:
                answer.set_exception(RuntimeError(ENDED))
        for number in list(self._listeners):
            if (listener := self._listeners.pop(number, None)) is not None:
                listener(Finished(FinishReason.ERROR, RuntimeError(ENDED)))


class Pending:
    """A call whose answer may not be here yet. That of `submit` implements `protocol.Ticket`.

    Args:
        link: The link.
        number: Number of the call.
        model: Name of the model.
        answer: Its answer.
    """

    def __init__(self, link: Link, number: int, model: str, answer: Future[Any]) -> None:
        self._link, self._number, self._model, self._answer = link, number, model, answer

    def result(self, timeout_s: float | None = None) -> Any:
        """Wait for the answer and return it, or raise the error that it is."""
        return self._answer.result(timeout_s)

    async def accepted(self) -> None:
        """Wait until the request is queued; raise what refuses it."""
        await asyncio.wrap_future(self._answer)

    def cancel(self) -> None:
        """End the request with `CANCELLED` soon; of no effect once it has ended."""
        self._link.cancel(self._number, self._model)


class RemoteScheduler:
    """Scheduler of a model in another process. Implements `protocol.Scheduler`.

    Args:
        link: Link to the process.
        name: Name of the model.
    """

    def __init__(self, link: Link, name: str) -> None:
        self._link, self._name = link, name

    def warm_up(self) -> None:
        """Run what a first request would otherwise wait for."""
        self._link.call(self._name, "warm_up").result()

    def submit(self, request: Request, listener: Listener) -> Pending:
        """Submit a request. What refuses it is raised by the ticket's `accepted`, since this method doesn't wait."""
        return self._link.call(self._name, "submit", messages.pack(request), listener)

    def status(self) -> Status:
        """Return the present state."""
        status: Status = self._link.call(self._name, "status").result(ANSWER_S)
        return status

    def close(self, drain_s: float = 0.0) -> None:
        """Refuse new requests, wait up to `drain_s` seconds for those that run, and cancel the rest."""
        try:
            self._link.call(self._name, "close", drain_s).result()
        except RuntimeError:  # the process has ended, and its requests with it
            logger.debug(ENDED)
