"""Messages between the process that answers HTTP and the one that decodes, pickled: both belong to one server."""

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from traceback import format_exception
from typing import Any

import numpy as np
import torch

from accel.serve.protocol import Event, Finished, Request, Tokens
from accel.serve.requests.grammar import GrammarProcessor


@dataclass(frozen=True)
class Call:
    """A method to call on a model's scheduler.

    Attributes:
        number: Number of the call, and of the request that it submits.
        model: Name of the model.
        method: `submit`, `cancel`, `status`, `warm_up` or `close`.
        argument: Its argument.
    """

    number: int
    model: str
    method: str
    argument: Any = None


@dataclass(frozen=True)
class Answer:
    """What a call returned or raised.

    Attributes:
        result: What it returned.
        error: What it raised.
    """

    result: Any = None
    error: Exception | None = None


Reply = tuple[int, int | Event | Answer]
"""Number of a call, and its answer, or an event of its request: a token alone is its id."""


@dataclass(frozen=True)
class SentRequest:
    """A request in a message: arrays in place of tensors, a grammar's text in place of its state.

    Attributes:
        inputs: As `Request.inputs`.
        options: The other arguments of `Request`.
        grammar: Grammar of the output; None: any text.
    """

    inputs: Mapping[str, np.ndarray[Any, Any]]
    options: Mapping[str, Any]
    grammar: str | None


def pack(request: Request) -> SentRequest:
    """Return what is sent of a request.

    Raises:
        TypeError: Its logits processor is no grammar.
    """
    processor = request.logits_processor
    if processor is not None and not isinstance(processor, GrammarProcessor):
        raise TypeError(f"a logits processor of type {type(processor).__name__} can't be sent to another process")
    options = {name: getattr(request, name) for name in ("generation", "seed", "logprobs", "deadline", "gather_s")}
    inputs = {name: tensor.numpy() for name, tensor in request.inputs.items()}
    return SentRequest(inputs, options, None if processor is None else processor.grammar)


def unpack(sent: SentRequest, processor: GrammarProcessor | None) -> Request:
    """Return a request that was sent, with the logits processor of its grammar."""
    inputs = {name: torch.from_numpy(array.copy()) for name, array in sent.inputs.items()}
    return Request(inputs, logits_processor=processor, **sent.options)


def event_reply(number: int, event: Event) -> Reply:
    """Return the reply that an event is sent as."""
    if isinstance(event, Tokens):
        return number, event.ids[0] if len(event.ids) == 1 and not event.logprobs else event
    return number, event if event.error is None else Finished(event.reason, sendable(event.error))


def sendable(error: Exception) -> Exception:
    """Return a copy of an error that can be pickled, with the place that it comes from as a note."""
    try:
        copied: Exception = pickle.loads(pickle.dumps(error))  # noqa: S301
    except Exception:  # its class asks for other arguments, or what it holds can't be pickled
        copied = RuntimeError(f"{type(error).__name__}: {error}")
    copied.add_note("in the process that decodes:\n" + "".join(format_exception(error)))
    return copied


def send(connection: Connection, message: Call | Answer | Sequence[Reply] | None) -> None:
    """Send a message; None ends the process that decodes.

    Raises:
        OSError: The other process has ended.
    """
    connection.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))


def receive(connection: Connection) -> Any:
    """Wait for a message and return it.

    Raises:
        EOFError, OSError: The other process has ended.
    """
    return pickle.loads(connection.recv_bytes())  # noqa: S301  # of a process of this server
