"""The side that decodes: calls from the other process are made on schedulers, whose events are sent back."""

import logging
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from accel.serve import loop_calls
from accel.serve.protocol import Event, Finished, Request, Ticket
from accel.serve.remote import messages
from accel.serve.remote.messages import Answer, Call, Reply
from accel.serve.requests.grammar import Grammars
from accel.serve.requests.served_model import ServedModel
from accel.system.process_state import short_thread_switches

logger = logging.getLogger(__name__)

SLOW = {"warm_up", "close"}  # calls that others don't wait for


class SchedulerServer:
    """Makes the calls that come over a connection, until it ends.

    Args:
        models: Name -> model, which stay the caller's.
        connection: Connection to a `remote_scheduler.Link`.
    """

    def __init__(self, models: Mapping[str, ServedModel], connection: Connection) -> None:
        self._models, self._connection = models, connection
        self._grammars = {name: Grammars(served) for name, served in models.items()}
        self._tickets: dict[int, Ticket] = {}  # of requests that haven't ended
        self._replies: SimpleQueue[list[Reply] | None] = SimpleQueue()

    def run(self) -> None:
        """Serve the other process until it asks for the end or has ended itself; then cancel its requests."""
        sender = threading.Thread(target=self._send, name="accel-replies", daemon=True)
        sender.start()
        try:
            with short_thread_switches():  # the schedulers' threads don't wait for these ones
                while (call := messages.receive(self._connection)) is not None:
                    self._take(call)
        except (EOFError, OSError):
            logger.debug("the process that answers HTTP has ended")
        for ticket in list(self._tickets.values()):
            ticket.cancel()
        self._replies.put(None)
        sender.join()

    def _take(self, call: Call) -> None:
        """Make a call, on another thread if it takes long."""
        if call.method == "cancel":
            ticket = self._tickets.get(call.number)
            if ticket is not None:
                ticket.cancel()
        elif call.method in SLOW:
            threading.Thread(target=self._answer, args=(call,), daemon=True).start()
        else:
            self._answer(call)

    def _answer(self, call: Call) -> None:
        """Make a call and answer it."""
        try:
            answer = Answer(self._result(call))
        except Exception as error:  # the other process raises it
            answer = Answer(error=messages.sendable(error))
        self._replies.put([(call.number, answer)])

    def _result(self, call: Call) -> Any:
        """Return the result of a call."""
        scheduler = self._models[call.model].scheduler
        if call.method == "submit":
            sent = call.argument
            processor = None if sent.grammar is None else self._grammars[call.model].of(sent.grammar)
            self._submit(call, messages.unpack(sent, processor))
            return None
        if call.method == "status":
            return scheduler.status()
        if call.method == "warm_up":
            return scheduler.warm_up()
        return scheduler.close(call.argument)

    def _submit(self, call: Call, request: Request) -> None:
        """Submit a request, whose events are sent under the number of the call."""
        number, ended = call.number, threading.Event()

        def listen(event: Event) -> None:
            if isinstance(event, Finished):
                ended.set()
                self._tickets.pop(number, None)
            loop_calls.hand_over(self._replies.put, messages.event_reply(number, event))

        ticket = self._models[call.model].scheduler.submit(request, listen)
        self._tickets[number] = ticket
        if ended.is_set():  # before the line above
            self._tickets.pop(number, None)

    def _send(self) -> None:
        """Send replies, all that there are in one message, until there is a None among them."""
        waiting: list[list[Reply] | None] = []
        while None not in waiting:
            waiting = [self._replies.get()]
            while not self._replies.empty():  # no other thread takes any
                waiting.append(self._replies.get())
            replies = [reply for each in waiting for reply in each or ()]
            try:
                messages.send(self._connection, replies)
            except OSError:  # the other process has ended, which `run` notices as well
                return
